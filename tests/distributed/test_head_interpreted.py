"""The whole head on Triton's kernels, in its interpreter: the tests of the PyTorch path, once more."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from recognition import config
from recognition.distributed import split
from recognition.head.backends import select
from recognition.head.backends.pytorch import PyTorchBackend
from recognition.head.backends.triton_backend import TritonBackend
from tests.support.head_checks import against_reference, batches, fused_training
from tests.support.ranks import run_ranks
from tests.support.reference_head import data, dense_training, fill, make, run, whole
from tests.support.reference_losses import LOSSES

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the device"),
]
WORLD = 2
TRAINED = ("arcface", "softmax", "uce", "cosface-subcenters", "curricularface")
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {"sample_rate": 0.4},
    "lazy": {"sample_rate": 0.4, "inactive_rows": "lazy"},
    "split": {"row_format": "split"},
    "adamw": {"optimizer": config.AdamW().model_dump(), "sample_rate": 0.4},
    "accumulated": {"sample_rate": 0.4, "update_in_backward": False},
    "kept": {"chunk": None},
    "kept, sampled": {"chunk": None, "sample_rate": 0.4},
    "kept, accumulated": {"chunk": None, "update_in_backward": False},
}


def errors(batch: str) -> dict[str, list[float]]:
    return against_reference("float32", {batch: batches(WORLD)[batch]}, "triton")


def training() -> dict[str, dict[str, np.ndarray]]:
    return {name: fused_training(name, backend="triton") for name in TRAINED}


def options() -> dict[str, list[np.ndarray]]:
    """Rows, momentum and losses of four sampled steps by the kernels and by PyTorch."""
    found = {}
    for name, settings in OPTIONS.items():
        for kernels in ("triton", "torch"):
            x, labels, weight, _ = data(40, 32)
            head = make(config.ArcFace(), 40, backend=kernels, **settings)
            fill(head, weight)
            losses = []
            for step in range(4):
                part = slice(8 * step, 8 * step + 8)
                output, _ = run(head, x[part], labels[part], split(8, head.world), step=step)
                losses.append(output.loss.item())
                if head.accumulated is not None:
                    head.apply_gradient(0.1, step=step)
            head.state_dict_tensors()
            found[f"{name} {kernels}"] = [np.array(losses), whole(head, head.rows.read(slice(None))).numpy()]
    return found


@cache
def results(function: Callable[..., dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    return run_ranks(function, WORLD, *arguments)


@pytest.mark.parametrize("batch", ["uneven", "one-class"])
def test_loss_and_gradients_are_the_papers(batch: str) -> None:
    for found in results(errors, batch):
        assert len(found) == len(LOSSES)
        for name, each in found.items():
            # A float32 logit of 256 is known to 3e-5, and so is its exponential.
            scale = getattr(LOSSES[name.split()[0]].loss, "scale", 0.0)
            assert max(each) <= 1e-5 * max(1, scale / 64), name


@pytest.mark.parametrize("name", TRAINED)
def test_fused_update_is_torch_sgd(name: str) -> None:
    expected = dense_training(name)
    for found in results(training):
        for key, value in expected.items():
            # As on the PyTorch path: the errors of float32 after six steps.
            assert np.abs(found[name][key] - value).max() <= 1e-4 * np.abs(value).max(), key


@pytest.mark.parametrize("name", [*OPTIONS])
def test_options_do_as_with_pytorch(name: str) -> None:
    for found in results(options):
        for ours, theirs in zip(found[f"{name} triton"], found[f"{name} torch"], strict=True):
            assert ours.shape == theirs.shape
            # Both in float32, for four steps; AdamW magnifies what is rounded off gradients near zero.
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_who_goes_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(select.select_backend("triton", CPU), TritonBackend)
    for setting in ("auto", "torch"):
        assert isinstance(select.select_backend(setting, CPU), PyTorchBackend)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(config.UserError, match=r"head\.backend is triton, but the device is cpu, not an NVIDIA GPU"):
        select.select_backend("triton", CPU)


@pytest.mark.parametrize(
    ("capability", "cuda", "lacking"),
    [((9, 0), "13.0", ""), ((8, 0), "13.0", ""), ((7, 5), "13.0", "older than Ampere"), ((9, 4), None, "not NVIDIA's")],
)
def test_which_gpus_take_the_kernels(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str | None, lacking: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    gpu = torch.device("cuda")
    assert isinstance(select.select_backend("auto", gpu), PyTorchBackend if lacking else TritonBackend)
    if lacking:
        with pytest.raises(config.UserError, match=lacking):
            select.select_backend("triton", gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(select.select_backend("auto", gpu), PyTorchBackend)
    with pytest.raises(config.UserError, match="Triton is not installed"):
        select.select_backend("triton", gpu)
