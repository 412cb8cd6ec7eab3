"""Training as on a processor with AVX2 and nothing newer, which torch and oneDNN can be told to take any other for."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from recognition import config
from recognition.data.procedural.dataset import write_faces
from recognition.runs.checkpoint import Checkpoints, read_manifest
from recognition.training import trainer
from tests.support.ranks import launch_ranks

TINY = Path(__file__).parent / "tiny.toml"
TRAIN = Path(__file__).resolve().parents[2] / "train.py"
CAP = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
STEPS, IMAGES = 5, 40
# Every step has the same images, so the loss of each says what the one before has learned.
SETTINGS = (
    "backbone.name=resnet10t",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "head.loss.name=cosface",
    "data.augment={flip = 0.0}",
    "data.threads=1",
    "optimizer.lr=0.02",
    f"training.epochs={STEPS}",
    f"training.global_batch={IMAGES}",
    "training.threads=1",
    "tracking.every_steps=1",
    "export.enabled=false",
)

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not an x86-64 processor with AVX2"
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=10, images_per_identity=IMAGES // 10, pairs=20, seed=1, workers=1)
    return folder


def settings(faces: Path, run: Path, *overrides: str) -> list[str]:
    return [*SETTINGS, f"data.path={faces}", f"run.folder={run}", *overrides]


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def train(overrides: list[str]) -> bool:
    return trainer.train(config.load(TINY, overrides))


def test_a_run_on_avx2_alone_learns_what_any_other_in_float32_learns(faces: Path, tmp_path: Path) -> None:
    automatic = settings(faces, tmp_path / "capped", "backbone.precision=auto", "head.precision=auto")
    command = [sys.executable, str(TRAIN), str(TINY), *automatic]
    done = subprocess.run(command, env=os.environ | CAP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    float32 = settings(faces, tmp_path / "any", "backbone.precision=float32", "head.precision=float32")
    assert launch_ranks(train, 1, float32) == [True]

    found = Checkpoints(tmp_path / "capped" / "checkpoints", 1).find()
    assert found is not None
    resolved = read_manifest(found).metadata["resolved"]
    assert resolved["device"].endswith("(AVX2)")
    assert (resolved["backbone.precision"], resolved["head.precision"]) == ("float32", "float32")
    capped, others = losses(tmp_path / "capped"), losses(tmp_path / "any")
    assert len(capped) == STEPS and np.isfinite(capped).all()
    assert all(after < before for before, after in pairwise(capped))
    # The same sums in another order: float32's 6e-8, which four steps made 4e-7; training magnifies it as it goes on.
    np.testing.assert_allclose(capped, others, rtol=1e-4)
