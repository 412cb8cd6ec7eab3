"""The whole head on Triton's kernels, in its interpreter: the tests of the PyTorch path, once more."""

from typing import Any

import numpy as np
import pytest
import torch
from dense_head import data, dense_training, fill, make, run, whole
from dense_losses import LOSSES
from head_checks import against_reference, batches, fused_training

from ranks import run_ranks
from recognition import config
from recognition.distributed import split
from recognition.head import fused, makers

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the device"),
    pytest.mark.timeout(300),
]
WORLD = 2
TRAINED = ("arcface", "softmax", "uce", "cosface-subcenters", "curricularface")
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "sampled": {"sample_rate": 0.4},
    "lazy": {"sample_rate": 0.4, "untouched": "lazy"},
    "split": {"state": "split"},
    "adamw": {"optimizer": config.AdamW().model_dump(), "sample_rate": 0.4},
    "accumulated": {"sample_rate": 0.4, "fused": False},
    "kept": {"chunk": None},
    "kept, sampled": {"chunk": None, "sample_rate": 0.4},
    "kept, accumulated": {"chunk": None, "fused": False},
}


def everything() -> dict[str, Any]:
    cases = batches(WORLD)
    chosen = {name: cases[name] for name in ("uneven", "one-class")}
    return {
        "errors": against_reference("float32", chosen, "triton"),
        "training": {name: fused_training(name, kernels="triton") for name in TRAINED},
        "options": options(),
    }


def options() -> dict[str, list[np.ndarray]]:
    """Rows, momentum and losses of four sampled steps by the kernels and by PyTorch."""
    found = {}
    for name, settings in OPTIONS.items():
        for kernels in ("triton", "torch"):
            x, labels, weight, _ = data(40, 32)
            head = make(config.ArcFace(), 40, kernels=kernels, **settings)
            fill(head, weight)
            losses = []
            for step in range(4):
                part = slice(8 * step, 8 * step + 8)
                output, _ = run(head, x[part], labels[part], split(8, head.world), step=step)
                losses.append(output.loss.item())
                if head.row_sum is not None:
                    head.apply_gradient(0.1, step=step)
            head.state()
            found[f"{name} {kernels}"] = [np.array(losses), whole(head, head.rows.read(slice(None))).numpy()]
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(everything, WORLD, timeout=280)


def test_loss_and_gradients_are_the_papers(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert len(rank["errors"]) == 2 * len(LOSSES)
        for name, errors in rank["errors"].items():
            # A float32 logit of 256 is known to 3e-5, and so is its exponential.
            scale = getattr(LOSSES[name.split()[0]].loss, "scale", 0.0)
            assert max(errors) <= 1e-5 * max(1, scale / 64), name


@pytest.mark.parametrize("name", TRAINED)
def test_fused_update_is_torch_sgd(results: list[dict[str, Any]], name: str) -> None:
    expected = dense_training(name)
    for rank in results:
        for key, value in expected.items():
            assert np.abs(rank["training"][name][key] - value).max() <= 1e-4 * np.abs(value).max(), key


@pytest.mark.parametrize("name", [*OPTIONS])
def test_options_do_as_with_pytorch(results: list[dict[str, Any]], name: str) -> None:
    for rank in results:
        for ours, theirs in zip(rank["options"][f"{name} triton"], rank["options"][f"{name} torch"], strict=True):
            assert ours.shape == theirs.shape
            # Rounding: with a scale of 64 gradients are larger than the rows, which are about 1.
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-6)


def test_who_goes_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = makers.choose("triton", CPU)
    assert chosen.backward is fused.backward
    assert makers.choose("auto", CPU) == makers.choose("torch", CPU)
    assert makers.choose("auto", CPU).backward is not fused.backward
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(config.UserError, match=r"head\.kernels is triton, but the device is cpu, not an NVIDIA GPU"):
        makers.choose("triton", CPU)


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
    assert (makers.choose("auto", gpu).backward is fused.backward) == (not lacking)
    if lacking:
        with pytest.raises(config.UserError, match=lacking):
            makers.choose("triton", gpu)
    monkeypatch.setattr(makers.importlib.util, "find_spec", lambda name: None)
    assert makers.choose("auto", gpu).backward is not fused.backward
    with pytest.raises(config.UserError, match="Triton is not installed"):
        makers.choose("triton", gpu)
