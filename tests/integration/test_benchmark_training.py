"""The benchmark of training: what it prints, what it counts, and that its trainings are what they are said to be."""

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recognition import config
from recognition.benchmarks import training
from recognition.benchmarks.training import BaselineLoop, Float16, TrainingLoop, Variant, peak_flops
from recognition.models.backbone import build_backbone
from recognition.models.layers import GroupedConv2d, PReLU
from tests.support.ranks import launch_ranks, run_ranks

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_training.py"
TINY = ["--backbone", "resnet10t", "--image-size", "32", "--batch", "4", "--classes", "50", "--steps", "3"]


def _tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_training_tool", TOOL)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _main(arguments: list[str]) -> tuple[int, str, str]:
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = _tool().main(arguments)
    return status, output.getvalue(), errors.getvalue()


def _run(*arguments: str) -> tuple[int, str, str]:
    """In a process of its own: the tool starts a process group."""
    [result] = launch_ranks(_main, 1, list(arguments), timeout=240)
    return result


def _flops(backbone: nn.Module, size: int) -> int:
    """Of an image's forward pass, layer by layer."""
    total = 0

    def count(layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        total += 2 * output.numel() * layer.weight[0].numel()

    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    backbone.eval()(torch.zeros(1, 3, size, size))
    return total


@pytest.mark.timeout(300)
@pytest.mark.parametrize("compiler", ["aot_eager", "none"])
def test_benchmark(compiler: str) -> None:
    status, text, errors = _run(*TINY, "--compiler", compiler, "--peak", "0.5", "--json")
    assert status == 0, errors
    found = json.loads(text.splitlines()[-1])
    assert list(found) == [
        "images_per_second",
        "eager_images_per_second",
        "baseline_images_per_second",
        "eager_ratio",
        "baseline_ratio",
        "flops_per_image",
        "flops_per_second",
        "peak_flops",
        "mfu",
        "memory_bytes",
    ]
    assert found.pop("memory_bytes") is None
    assert min(found.values()) > 0
    ours = found["images_per_second"]
    assert found["eager_ratio"] == pytest.approx(ours / found["eager_images_per_second"])
    assert found["baseline_ratio"] == pytest.approx(ours / found["baseline_images_per_second"])
    backbone = build_backbone(config.Backbone(name="resnet10t", image_size=32))
    assert found["flops_per_image"] == 3 * _flops(backbone, 32)
    assert found["flops_per_second"] == pytest.approx(ours * found["flops_per_image"])
    assert found["peak_flops"] == 0.5e12
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / 0.5e12)
    assert f"{found['baseline_ratio']:.2f} than the baseline" in text
    assert f"{found['mfu']:.1%} of 0.5 TFLOP/s" in text


@pytest.mark.timeout(300)
def test_grid() -> None:
    status, text, errors = _run(*TINY, "--grid", "--compiler", "aot_eager", "--layouts", "channels-last", "--json")
    assert status == 0, errors
    found = json.loads(text.splitlines()[-1])
    ways = [(each["precision"], each["channels_last"], each["compiled"]) for each in found]
    assert ways == [(precision, True, compiled) for precision in ("float32", "bfloat16") for compiled in (False, True)]
    eager = max(each["images_per_second"] for each in found if not each["compiled"])
    for each in found:
        assert each["images_per_second"] > 0
        assert f"{each['images_per_second']:,.1f}" in text
        if not each["compiled"]:
            assert each["compile_seconds"] is None and each["pays_after_images"] is None
        elif each["images_per_second"] <= eager:
            assert each["pays_after_images"] is None
        else:
            gained = 1 / eager - 1 / each["images_per_second"]
            assert each["pays_after_images"] == pytest.approx(each["compile_seconds"] / gained, abs=1)


class _Scripted:
    """A training of one second a step: twice as long contiguous, half as long compiled, after 12 seconds."""

    def __init__(self, settings: config.Backbone, device: torch.device, batch: int, classes: int) -> None:
        assert settings.compile is False and (batch, classes) == (8, 20)
        self.settings, self.compiled, self.begun = settings, False, False
        self.backbone = SimpleNamespace(trunk=SimpleNamespace(compile=self._compile))

    def _compile(self, backend: str) -> None:
        assert backend == "inductor"
        self.compiled = True

    def run_steps(self, count: int) -> float:
        seconds = count * (1.0 if self.settings.channels_last else 2.0) * (0.5 if self.compiled else 1.0)
        first = 0.0 if self.begun or not self.compiled else 12.0
        self.begun = True
        return seconds + first


def test_a_compilation_pays_against_the_fastest_eager_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TrainingLoop", _Scripted)
    variants = training.measure_grid(
        config.Backbone(), torch.device("cpu"), batch=8, classes=20, steps=5, precisions=["bfloat16"]
    )
    assert variants == [
        Variant("bfloat16", channels_last=True, compiled=False, images_per_second=8.0),
        # 12 seconds, at half a second saved for 8 images.
        Variant("bfloat16", True, True, 16.0, compile_seconds=12.0, pays_after_images=192),
        Variant("bfloat16", channels_last=False, compiled=False, images_per_second=4.0),
        Variant("bfloat16", False, True, 8.0, compile_seconds=12.0, pays_after_images=None),
    ]


def _trainings() -> list[dict[str, Any]]:
    settings = config.Backbone(name="mobilefacenet", image_size=32, embedding_size=16, precision="bfloat16")
    found = []
    for kind in (TrainingLoop, BaselineLoop):
        torch.manual_seed(0)
        training = kind(settings, torch.device("cpu"), batch=8, classes=20)
        layers = {type(layer) for layer in training.backbone.modules()}
        types: list[torch.dtype] = []
        training.backbone.trunk.register_forward_hook(lambda _, inputs, output, types=types: types.append(output.dtype))
        before = training.head.rows.weight.clone(), training.backbone.neck.linear.weight.detach().clone()
        loss = float(training._step())
        training.run_steps(1)
        after = training.head.rows.weight, training.backbone.neck.linear.weight.detach()
        found.append(
            {
                "loss": loss,
                "dtype": str(types[0]),
                "channels last": training.images.is_contiguous(memory_format=torch.channels_last),
                "own layers": bool(layers & {PReLU, GroupedConv2d}),
                "torch's layers": {nn.PReLU, nn.Conv2d} <= layers,
                "moved": all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            }
        )
    return found


def test_the_baseline_differs_in_what_it_should_alone() -> None:
    [[ours, baseline]] = run_ranks(_trainings, 1)
    assert ours["dtype"] == "torch.bfloat16" and baseline["dtype"] == "torch.float32"
    assert ours["channels last"] and not baseline["channels last"]
    assert ours["own layers"] and not baseline["own layers"] and baseline["torch's layers"]
    assert ours["moved"] and baseline["moved"]
    # bfloat16 beside float32: 4e-3 of an embedding, times the scale, of a loss of about 60; 0.3 % was found.
    assert ours["loss"] == pytest.approx(baseline["loss"], rel=0.02)


def test_float16_overrules_autocast_that_is_off() -> None:
    module = Float16(nn.Linear(4, 4))
    with torch.autocast("cpu", enabled=False):
        assert module(torch.ones(2, 4)).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks(name: str, tflops: int) -> None:
    assert peak_flops(name) == 1e12 * tflops


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("Radeon") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "iresnet51"], "no timm model iresnet51"),
        pytest.param(
            ["--device", "cuda"],
            "there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str) -> None:
    status, _, errors = _run(*TINY, *arguments)
    assert status == 2
    assert message in errors


def test_a_recipe_has_the_backbone_of_the_one_that_it_extends() -> None:
    from recognition.cli.benchmark_training import _backbone

    assert _backbone({"recipe": Path("glint360k_r100"), "image_size": 112}).name == "iresnet100"


def test_a_recipe_that_is_not_there_is_named() -> None:
    status, _, errors = _main(["--recipe", "missing.toml"])
    assert status == 2
    assert "missing.toml: No such file" in errors
