"""Two whole trainings of 50 steps, whose every step is as `golden_curve.json` says.

A change that is to leave the arithmetic as it is leaves these numbers as they are. One that is to change it, a new
default or another rounding, writes new ones, which its commit gives the reason for:

    PYTHONPATH=tests python tests/integration/test_golden_curve.py --write

`--train FOLDER [section.key=value ...]` trains the same runs into a folder, with settings changed; `make soak
SOAK=golden` compares those of two commits by it, bit for bit.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ranks import launch_ranks
from recognition import config, trainer
from recognition.data.faces import write_faces

TINY = Path(__file__).parent / "tiny.toml"
GOLDEN = Path(__file__).parent / "golden_curve.json"
STEPS, IDENTITIES, IMAGES = 50, 24, 10

# All that a recipe says stands here, in today's names: where settings are renamed, rename them here.
BOTH = (
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float32",
    "head.precision=float32",
    "run.seed=7",
    f"training.epochs={STEPS * 24 / (IDENTITIES * IMAGES)}",
    "training.global_batch=24",
    "training.threads=1",
    "data.threads=1",
    "tracking.every_steps=1",
    "checkpoint.every_steps=0",
    "export.enabled=false",
)
RECIPES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process, ArcFace": (
        1,
        (
            "backbone.name=test_convnext",
            "backbone.dropout=0.1",
            "head.loss={name = 'arcface', scale = 16.0, margin = 0.5}",
            "head.margin_warmup_epochs=1.0",
            "head.chunk=7",
            "optimizer.name=sgd",
            "optimizer.lr=0.005",
            "optimizer.momentum=0.9",
            "optimizer.weight_decay=1e-2",
            "training.warmup_epochs=1.0",
            "training.schedule=cosine",
            "training.clip_norm=5.0",
            "data.loader=torchvision",
            "data.augment={flip = 0.5, shift = 0.06, zoom = 0.1, rotate_degrees = 8.0, brightness = 0.2,"
            " contrast = 0.2, saturation = 0.2, gray = 0.1, erase = 0.2}",
        ),
    ),
    "two processes, sampled, accumulated, split": (
        2,
        (
            "backbone.name=test_vit",
            "head.loss={name = 'curricularface', scale = 16.0, margin = 0.4}",
            "head.sample_rate=0.5",
            "head.untouched=lazy",
            "head.state=split",
            "head.subcenters=2",
            "head.chunk=5",
            "head.optimizer={name = 'sgd', lr = 0.01, momentum = 0.9, weight_decay = 1e-3}",
            "optimizer.name=adamw",
            "optimizer.lr=3e-4",
            "optimizer.weight_decay=0.05",
            "training.accumulation=2",
            "training.warmup_epochs=1.0",
            "data.loader=auto",
            "data.augment={flip = 0.5, shift = 0.06, brightness = 0.2}",
            "distributed.backend=gloo",
        ),
    ),
}
RECORDED = ("loss", "target_cosine", "gradient_norm", "embedding_norm", "lr")
TOLERANCE = 1e-4
"""Relative. With torch and oneDNN held to AVX2, no number of the 50 steps differed by more than 2e-6; held to no vector
instructions (ATEN_CPU_CAPABILITY=default), by 2e-5 at most. The recipes are chosen for it: smooth activations and
little BatchNorm; of a ResNet on these faces the same differences made some percent."""


def render(folder: Path) -> None:
    """Draw the faces to train on."""
    write_faces(
        folder, identities=IDENTITIES, images=IMAGES, pairs=20, image_size=32, seed=5, workers=1, progress=False
    )


def train(overrides: list[str]) -> bool:
    """Train on this rank."""
    return trainer.train(config.load(TINY, overrides))


def curve(name: str, faces: Path, run: Path, *overrides: str) -> dict[str, list[float]]:
    """Train the recipe `name` into the folder `run`; returns what was recorded, a number for each step."""
    world, settings = RECIPES[name]
    places = (f"data.path={faces}", f"run.folder={run}")
    assert all(launch_ranks(train, world, [*BOTH, *settings, *places, *overrides]))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return {key: [record[key] for record in records] for key in RECORDED}


def curves(folder: Path, *overrides: str) -> dict[str, dict[str, list[float]]]:
    """Train all recipes, each into a folder of its own in `folder`."""
    render(folder / "faces")
    return {
        name: curve(name, folder / "faces", folder / f"run-{number}", *overrides) for number, name in enumerate(RECIPES)
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text())
    return found


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    render(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_is_as_it_was(name: str, golden: dict[str, Any], faces: Path, tmp_path: Path) -> None:
    if name not in golden:
        pytest.fail(f"{GOLDEN.name} has no {name}")
    found = curve(name, faces, tmp_path / "run")
    for key in RECORDED:
        np.testing.assert_allclose(found[key], golden[name][key], rtol=TOLERANCE, atol=1e-6, err_msg=key)


def main(arguments: list[str]) -> int:
    """Write the numbers anew, or train into a folder."""
    parser = argparse.ArgumentParser()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true")
    what.add_argument("--train", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    folder = options.train or Path(tempfile.mkdtemp())
    found = curves(folder, *options.overrides)
    if options.write:
        shutil.rmtree(folder)
        rounded = {
            name: {key: [float(f"{value:.9g}") for value in values] for key, values in numbers.items()}
            for name, numbers in found.items()
        }
        GOLDEN.write_text(json.dumps(rounded, indent=1) + "\n")
    else:
        (folder / "curves.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
