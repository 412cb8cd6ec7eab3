"""Training in float16, whose steps may overflow, on the CPU: what the same code does on a GPU."""

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recognition import config
from recognition.data.procedural.dataset import write_faces
from recognition.runs.checkpoint import Checkpoints, read_tensors
from recognition.training import trainer
from recognition.training.trainer import Trainer
from tests.support.faults import fault
from tests.support.ranks import launch_ranks

TINY = Path(__file__).parent / "tiny.toml"
STEPS, OVERFLOW = 7, 3
SETTINGS = (
    "run.seed=3",
    "backbone.name=test_resnet",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float16",
    "head.loss.name=adaface",
    "head.center={weight = 0.01}",
    "head.chunk=5",
    "optimizer.lr=0.02",
    "training.global_batch=8",
    f"training.epochs={STEPS * 8 / 60}",
    "training.initial_loss_scale=64.0",
    "training.loss_scale_growth_steps=3",
    "data.threads=1",
    "checkpoint.every_steps=0",
    "tracking.every_steps=1",
    "export.enabled=false",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=15, images_per_identity=4, pairs=20, seed=1, workers=1)
    return folder


def settings(faces: Path, run: Path, *overrides: str) -> list[str]:
    return [*SETTINGS, f"data.path={faces}", f"run.folder={run}", *overrides]


def run(overrides: list[str], overflow_at: int | None = None, stop_at: int | None = None) -> dict[str, Any]:
    """Train; in step `overflow_at` a gradient of the last rank alone is infinite. Which tensors that step changed."""
    seen: dict[str, Any] = {}
    before: dict[str, torch.Tensor] = {}

    def overflow(*, trainer: Trainer, **_: Any) -> None:
        before.update({n: tensor.clone() for n, tensor in trainer.state_tensors().items() if ".running_" not in n})
        if trainer.ranks.rank == trainer.ranks.world - 1:
            weight = next(iter(trainer.backbone.parameters()))
            hook: Any = weight.register_hook(lambda gradient: (hook.remove(), gradient * torch.inf)[1])

    def look(*, trainer: Trainer, **_: Any) -> None:
        after = trainer.state_tensors()
        seen["changed"] = [
            name
            for name, tensor in before.items()
            if not name.endswith("num_batches_tracked") and not _equal(tensor, after[name])
        ]
        seen["compared"] = len(before)

    def end(*, trainer: Trainer, step: int) -> None:
        if overflow_at is not None and step == overflow_at + 1:
            look(trainer=trainer)
        trainer.interrupt.requested = step == stop_at

    with contextlib.ExitStack() as stack:
        if overflow_at is not None:
            stack.enter_context(fault("step", overflow, step=overflow_at))
        stack.enter_context(fault("step done", end))
        complete = trainer.train(config.load(TINY, overrides))
    return {"complete": complete, **seen}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (getattr(tensor, "_local_tensor", tensor) for tensor in (one, other))
    return torch.equal(one, other)


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in lines if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return found


def state(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    found = checkpoints.find()
    assert found is not None
    return {name: tensor.numpy() for name, tensor in read_tensors(found).items()}, checkpoints.metadata(found)


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, launch_ranks(run, 2, settings(faces, folder), OVERFLOW)


def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(whole: tuple[Path, list[dict]]) -> None:
    folder, ranks = whole
    for rank in ranks:
        assert rank["complete"]
        assert rank["compared"] > 50
        assert rank["changed"] == []
    scales = [record["loss_scale"] for record in records(folder)]
    # As they are after each step: grown after three, halved in the fourth, grown three steps later.
    assert scales == [64, 64, 128, 64, 64, 64, 128]
    losses = [record["loss"] for record in records(folder)]
    assert all(np.isfinite(losses))
    assert len(set(losses)) == STEPS
    assert state(folder)[1]["loss_scale"] == {"value": 128.0, "good_steps": 0}


def test_a_run_resumed_in_mid_growth_is_bitwise_the_run_that_was_not(
    faces: Path, whole: tuple[Path, list[dict]], tmp_path: Path
) -> None:
    parts = settings(faces, tmp_path / "parts")
    assert not any(rank["complete"] for rank in launch_ranks(run, 2, parts, OVERFLOW, OVERFLOW + 2))
    assert state(tmp_path / "parts")[1]["loss_scale"] == {"value": 64.0, "good_steps": 1}
    assert all(rank["complete"] for rank in launch_ranks(run, 2, parts))
    shown = ("loss", "loss_scale", "gradient_norm")
    expected, found = (
        [[record[name] for name in shown] for record in records(each)] for each in (whole[0], tmp_path / "parts")
    )
    assert found == expected
    (expected_tensors, _), (found_tensors, _) = state(whole[0]), state(tmp_path / "parts")
    assert found_tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        # BatchNorm's running statistics, which training does not read, are averaged once more at the interruption.
        tolerance = 1e-6 if ".running_" in name else 0
        np.testing.assert_allclose(found_tensors[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_scale_that_is_too_large_falls_until_nothing_overflows(faces: Path, tmp_path: Path) -> None:
    start = 2.0**17  # its half alone is beyond float16's 65504 where a gradient is 1
    launch_ranks(run, 1, settings(faces, tmp_path / "run", f"training.initial_loss_scale={start}"))
    scales = [record["loss_scale"] for record in records(tmp_path / "run")]
    assert scales[0] == start / 2
    assert scales[-1] == scales[-2] < start / 2
    assert all(new in (old, old / 2) for old, new in itertools.pairwise(scales))
    _, metadata = state(tmp_path / "run")
    assert metadata["resolved"]["backbone.precision"] == "float16"


def test_the_precision_of_a_run_stays_and_can_be_changed(faces: Path, tmp_path: Path) -> None:
    launch_ranks(run, 1, settings(faces, tmp_path / "run"), None, 2)
    as_it_comes = settings(faces, tmp_path / "run", "backbone.precision=auto")
    launch_ranks(run, 1, as_it_comes, None, 4)
    assert state(tmp_path / "run")[1]["resolved"]["backbone.precision"] == "float16"
    assert "backbone.precision: the run goes on in float16, as it began" in (tmp_path / "run/log.txt").read_text()
    launch_ranks(run, 1, settings(faces, tmp_path / "run", "backbone.precision=float32"))
    assert state(tmp_path / "run")[1]["resolved"]["backbone.precision"] == "float32"
    assert "the run began in float16 and goes on in float32" in (tmp_path / "run/log.txt").read_text()
    assert len(records(tmp_path / "run")) == STEPS
