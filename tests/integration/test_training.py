"""Whole runs: resumed, on other numbers of ranks, interrupted, accumulated, and what they leave behind."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recognition import config, hardware
from recognition.data.procedural.dataset import write_faces
from recognition.deploy.onnx_embedder import OnnxEmbedder
from recognition.evaluation.pairs import read_pairs
from recognition.evaluation.verification import embed_pairs, verify
from recognition.models.backbone import BackboneEmbedder
from recognition.runs.checkpoint import Checkpoints, read_manifest, read_tensors
from recognition.runs.folder import load_backbone
from recognition.runs.metadata import recorded_precisions
from recognition.training import trainer
from tests.support.faults import fault
from tests.support.ranks import launch_ranks, launched

TINY = Path(__file__).parent / "tiny.toml"
STEPS = 6
SAME_LOSS = 2e-5
"""Relative error of losses whose sums are taken in another order: float32's 6e-8, of logits of 64, after six steps."""
SETTINGS = (
    "run.seed=3",
    "backbone.name=resnet10t",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float32",
    "backbone.dropout=0.2",
    "head.loss.name=cosface",
    "head.loss.margin=0.2",
    "head.chunk=5",
    "training.global_batch=24",
    f"training.epochs={STEPS * 24 / 90}",
    "training.warmup_epochs=0.5",
    "data.augment={shift = 0.05, brightness = 0.2}",
    "data.threads=1",
    "evaluation.batch_per_rank=20",
    "checkpoint.every_steps=4",
    "tracking.every_steps=1",
    "export.enabled=false",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=15, images_per_identity=6, pairs=20, seed=1, workers=1)
    return folder


def settings(faces: Path, run: Path, *overrides: str) -> list[str]:
    return [*SETTINGS, f"data.path={faces}", f"run.folder={run}", *overrides]


class Linear(nn.Module):
    """A backbone without BatchNorm: what it gives for an image does not depend on the rest of the batch."""

    def __init__(self, embedding_size: int) -> None:
        super().__init__()
        self.embedding_size, self.image_size = embedding_size, 32
        self.projection = nn.Linear(3 * 8 * 8, embedding_size)
        nn.init.normal_(self.projection.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.projection.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.projection(nn.functional.avg_pool2d(images, 4).flatten(1))


def run(overrides: list[str], signal_at: int | None = None, linear: bool = False) -> dict:
    """Train on this rank; on the last rank, a SIGINT arrives in step `signal_at`."""
    fired = []
    if linear:
        module: Any = trainer
        module.build_backbone = lambda settings, seed: Linear(settings.embedding_size)

    def send_signal(*, step: int, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        fired.append(step)

    with fault("step done", send_signal, step=signal_at, rank=-1) if signal_at else contextlib.nullcontext():
        return {"complete": trainer.train(config.load(TINY, overrides)), "fired": fired}


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    return [record["loss"] for record in steps]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = Checkpoints(folder / "checkpoints", 2).find()
    assert found is not None
    return {name: tensor.numpy() for name, tensor in read_tensors(found, "").items()}


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    launch_ranks(run, 2, settings(faces, folder))
    return folder


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_stopped_at_any_step_and_resumed_is_bitwise_the_run_that_was_not(
    faces: Path, whole: Path, tmp_path: Path, stop: int
) -> None:
    stopped = launch_ranks(run, 2, settings(faces, tmp_path / "parts"), stop)
    assert [rank["complete"] for rank in stopped] == [False, False]
    assert stopped[1]["fired"] == [stop]
    assert (tmp_path / "parts/checkpoints/latest").read_text().strip() == f"step-{stop:08d}"
    resumed = launch_ranks(run, 2, settings(faces, tmp_path / "parts"))
    assert all(rank["complete"] for rank in resumed)
    assert losses(tmp_path / "parts") == losses(whole)
    expected, found = tensors(whole), tensors(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # BatchNorm's running statistics, which training does not read, are averaged once more at the interruption.
        tolerance = 1e-6 if ".running_" in name else 0
        np.testing.assert_allclose(found[name], tensor, rtol=tolerance, atol=tolerance, err_msg=name)


def test_how_gradients_are_sent_does_not_matter(faces: Path, whole: Path, tmp_path: Path) -> None:
    launch_ranks(run, 2, settings(faces, tmp_path / "buckets", "distributed.bucket_mib=1"))
    assert losses(tmp_path / "buckets") == losses(whole)


@pytest.fixture(scope="module")
def alone(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one rank."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    launch_ranks(run, 1, settings(faces, folder), None, True)
    found = losses(folder)
    # Each batch has a loss of its own, and so does each state of the backbone and the head.
    assert len(set(found)) == STEPS
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_ranks_trains_alike(faces: Path, alone: list[float], tmp_path: Path, world: int) -> None:
    launch_ranks(run, world, settings(faces, tmp_path / "run"), None, True)
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=SAME_LOSS)


def test_every_number_of_ranks_continues_the_others_run(faces: Path, alone: list[float], tmp_path: Path) -> None:
    launch_ranks(run, 4, settings(faces, tmp_path / "mixed"), 2, True)
    launch_ranks(run, 1, settings(faces, tmp_path / "mixed"), 4, True)
    launch_ranks(run, 3, settings(faces, tmp_path / "mixed"), None, True)
    np.testing.assert_allclose(losses(tmp_path / "mixed"), alone, rtol=SAME_LOSS)


def run_without_dali(overrides: list[str]) -> list[str]:
    """Train where DALI cannot be imported; returns what of it was."""
    sys.modules["nvidia.dali"] = None  # type: ignore[assignment]
    run(overrides, None, True)
    return [name for name, module in sys.modules.items() if name.startswith("nvidia.dali") and module is not None]


def test_a_system_without_dali_trains_alike(faces: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    flips = "data.augment={flip = 0.5}"
    launch_ranks(run, 1, settings(faces, tmp_path / "with", flips), None, True)
    assert launch_ranks(run_without_dali, 1, settings(faces, tmp_path / "without", flips)) == [[]]
    np.testing.assert_allclose(losses(tmp_path / "without"), losses(tmp_path / "with"), rtol=2e-5)


def test_accumulated_passes_equal_the_large_batch(faces: Path, tmp_path: Path) -> None:
    launch_ranks(run, 2, settings(faces, tmp_path / "whole"), None, True)
    launch_ranks(run, 2, settings(faces, tmp_path / "passes", "training.accumulation_steps=3"), None, True)
    np.testing.assert_allclose(losses(tmp_path / "passes"), losses(tmp_path / "whole"), rtol=SAME_LOSS)
    whole, passes = tensors(tmp_path / "whole"), tensors(tmp_path / "passes")
    for name in ("head.weight", "backbone.projection.weight"):
        # Of the largest number, as the losses: what is near zero is a difference of larger ones.
        largest = np.abs(whole[name]).max()
        np.testing.assert_allclose(passes[name], whole[name], rtol=0, atol=SAME_LOSS * largest, err_msg=name)


def test_the_file_that_is_shipped_verifies_as_the_checkpoint_does(faces: Path, tmp_path: Path) -> None:
    changes = (f"evaluation.pairs={faces / 'pairs.bin'}", "backbone.image_size=112", "export.enabled=true")
    overrides = settings(faces, tmp_path / "run", *changes)
    launch_ranks(run, 2, overrides)
    pairs = read_pairs(faces / "pairs.bin")
    backbone, facts = load_backbone(tmp_path / "run")
    assert facts["step"] == STEPS and facts["identities"] == 15
    embedded = embed_pairs(BackboneEmbedder(backbone, float32=True), pairs, 20)
    shipped = embed_pairs(OnnxEmbedder(tmp_path / "run/model.onnx"), pairs, 20)
    # ONNX Runtime's float32 against torch's: some 1e-6 of embeddings whose numbers are about 1.
    np.testing.assert_allclose(shipped, embedded, atol=1e-4)
    card = json.loads((tmp_path / "run/model.json").read_text())
    found = Checkpoints(tmp_path / "run/checkpoints", 2).find()
    assert found is not None
    resolved = read_manifest(found).metadata["resolved"]
    assert card["resolved"] == resolved
    assert resolved["device"] == str(hardware.detect(torch.device("cpu")))
    assert resolved["backbone.precision"] == "float32" and "auto" not in resolved.values()
    told = (tmp_path / "run/log.txt").read_text()
    assert f"2 processes on {resolved['device']}" in told and "backbone in float32, channels-last" in told
    assert (
        f"complete: {STEPS} steps in " in told
        and f"accuracy on pairs: {card['verification']['pairs']['accuracy']:.2%}" in told
    )
    result = verify(shipped, pairs.same)
    assert card["verification"]["pairs"]["accuracy"] == pytest.approx(result.accuracy)
    best, facts = load_backbone(tmp_path / "run", "best")
    assert facts["accuracy"] == pytest.approx(result.accuracy)
    for ours, theirs in zip(best.state_dict().values(), backbone.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_changed_run_is_not_continued_and_every_change_is_named(faces: Path, tmp_path: Path) -> None:
    launch_ranks(run, 1, settings(faces, tmp_path / "run"), 2)
    before = (tmp_path / "run/config.toml").read_text()
    changed = settings(faces, tmp_path / "run", "training.global_batch=12", "head.loss.margin=0.3")
    with pytest.raises(AssertionError) as error:
        launch_ranks(run, 1, changed)
    message = str(error.value)
    assert "UserError" in message
    assert "training.global_batch: was 24, is 12" in message
    assert "head.loss.margin: was 0.2, is 0.3" in message
    assert (tmp_path / "run/config.toml").read_text() == before


def test_a_checkpoint_that_does_not_say_its_precision_has_it_in_its_settings() -> None:
    facts = {"config": {"backbone": {"precision": "bfloat16"}, "head": {"precision": "auto"}}}
    assert recorded_precisions(facts) == {"backbone.precision": "bfloat16"}
    assert recorded_precisions(facts | {"resolved": {"head.precision": "float32"}}) == {"head.precision": "float32"}
    assert recorded_precisions({}) == {}


def test_too_few_images_for_the_ranks_is_said(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leaves a rank 1 images"):
        launch_ranks(run, 2, settings(faces, tmp_path / "run", "training.global_batch=3"))


def test_a_verification_set_that_does_not_fit_is_said_before_the_first_step(faces: Path, tmp_path: Path) -> None:
    pairs = f"evaluation.pairs={faces / 'pairs.bin'}"
    with pytest.raises(AssertionError, match="40 images are not 64 x 64 pixels"):
        launch_ranks(run, 1, settings(faces, tmp_path / "run", pairs, "backbone.image_size=64", "data.fit=exact"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def hanging(overrides: list[str]) -> str:
    """Train; the second rank's images of the third step never come."""
    try:
        with fault("batch", lambda **_: time.sleep(600), step=2, rank=1):
            trainer.train(config.load(TINY, overrides))
    except config.UserError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_hangs_in_reading_is_named(faces: Path, tmp_path: Path) -> None:
    overrides = settings(faces, tmp_path / "run", "distributed.timeout_seconds=2", "data.loader=torchvision")
    with launched(hanging, 2, overrides) as launch:
        rank, text, error = launch.results.get(timeout=90)
    assert (rank, error) == (0, None)
    assert "rank 1 has not taken part for 2 seconds" in text
