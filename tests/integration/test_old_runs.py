"""Runs and an ONNX file that were written before settings and tensors were renamed: they are read as they ever were.

`tests/fixtures/run_before` has them, the script that made them and, in `expected.json`, what is to come back, under the
names of then. Where something has another name today, `TODAY` says which.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ranks import launch_ranks
from recognition import config, trainer
from recognition.deploy.embedder import OnnxEmbedder
from recognition.run_folder import load_backbone

BEFORE = Path(__file__).resolve().parents[1] / "fixtures" / "run_before"

# Today's names of what has another name than then: of settings, and of tensors in what a trainer saves.
TODAY: dict[str, str] = {}
RANKS = {"fused": 1, "split": 2, "lazy": 1}
# Two steps more, in today's names: a run that is complete gets more epochs.
PLACES = ("data.path={folder}/faces", "run.folder={folder}/{name}", "evaluation.pairs=[]", "evaluation.images={folder}")
GOING_ON = {
    "fused": ("training.epochs=1.5", "training.extend=stretch", "export.enabled=false"),
    "split": (),
    "lazy": (),
}
RECORDED = ("loss", "lr", "target_cosine", "gradient_norm", "embedding_norm")
TOLERANCE = 1e-4
"""Relative. Held to AVX2, no number differed by more than 3e-6; without vector instructions, by 2e-5 at most."""


def digest(tensor: Tensor) -> list[Any]:
    """Shape, type and a hash of all numbers of a tensor."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), hashlib.sha256(content).hexdigest()[:16]]


def whole(tensor: DTensor) -> Tensor:
    """All rows of a tensor that is sharded by rows; gloo itself does not gather every type."""
    shards: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shards, tensor.to_local().clone())
    return torch.cat(shards)


def go_on(name: str, folder: str) -> dict[str, Any]:
    """Train the run `name` in `folder` to its end on this rank; returns what was there before the first step."""
    loaded: dict[str, Any] = {}
    step = trainer.Trainer._train_step

    def watched(self: trainer.Trainer, number: int) -> Any:
        if not loaded:
            for key, tensor in self._tensors().items():
                loaded[key] = digest(whole(tensor) if isinstance(tensor, DTensor) else tensor)
        return step(self, number)

    trainer.Trainer._train_step = watched
    overrides = [override.format(folder=folder, name=name) for override in (*PLACES, *GOING_ON[name])]
    complete = trainer.train(config.load(Path(folder) / name / "config.toml", overrides))
    return {"complete": complete, "tensors": loaded}


def curve(run: Path) -> dict[str, dict[str, float]]:
    """What the run has recorded of every step, by its number."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(record["step"]): {key: record[key] for key in RECORDED} for record in records if "loss" in record}


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """All settings of a configuration, by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def settings(run: Path) -> dict[str, Any]:
    """The settings that a run's config.toml gives."""
    return dict(leaves(json.loads(config.load(run / "config.toml", check_paths=False).model_dump_json())))


def probe() -> np.ndarray:
    """The images whose embeddings are recorded, uint8 [3, 32, 32, 3]: squares of some colours."""
    colours = (np.arange(3 * 4 * 4 * 3).reshape(3, 4, 4, 3) * 89 % 251).astype(np.uint8)
    return colours.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(BEFORE / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("name", RANKS)
def test_a_run_goes_on_from_all_that_it_has_saved(name: str, expected: dict[str, Any], folder: Path) -> None:
    of_run, before = expected[name], curve(folder / name)
    for rank in launch_ranks(go_on, RANKS[name], name, str(folder)):
        assert rank["complete"]
        assert rank["tensors"] == {TODAY.get(key, key): value for key, value in of_run["tensors"].items()}
    found = curve(folder / name)
    assert found.keys() == of_run["curve"].keys() and len(found) == len(before) + 2
    assert {number: found[number] for number in before} == before
    for number, values in of_run["curve"].items():
        assert found[number] == pytest.approx(values, rel=TOLERANCE), number


@pytest.mark.parametrize("name", RANKS)
def test_its_settings_and_its_backbone_are_read(name: str, expected: dict[str, Any], folder: Path) -> None:
    found = settings(folder / name)
    for key, value in expected[name]["settings"].items():
        assert found[TODAY.get(key, key)] == value, key
    for which in ("last", "best") if name == "fused" else ("last",):
        backbone, facts = load_backbone(folder / name, which)
        state = {f"backbone.{key}": digest(tensor) for key, tensor in backbone.state_dict().items()}
        assert facts["step"] == expected[name][which]
        saved = {key: value for key, value in expected[name]["tensors"].items() if key.startswith("backbone.")}
        assert state == {TODAY.get(key, key): value for key, value in saved.items()}


def test_its_onnx_file_embeds_as_it_did(expected: dict[str, Any], folder: Path) -> None:
    embedder = OnnxEmbedder(folder / "fused/model.onnx", threads=1)
    embeddings = np.array(expected["embeddings"])
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder(probe()) / length, embeddings / length, rtol=0, atol=1e-5)
    card = json.loads((folder / "fused/model.json").read_text())
    for key in ("input_color", "input_size", "embedding_size", "step", "fingerprint", "backbone", "loss"):
        assert embedder.facts[key] == str(card[key])
    assert hashlib.sha256((folder / "fused/model.onnx").read_bytes()).hexdigest() == card["sha256"]
