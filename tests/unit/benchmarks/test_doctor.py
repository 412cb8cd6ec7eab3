"""What the doctor says of a machine and of what was measured."""

import dataclasses
from pathlib import Path

import pytest

from recognition import hardware
from recognition.benchmarks import doctor
from recognition.benchmarks.machine import Convolution, Disk, Exchange, Measurements
from recognition.config import Config, Data
from recognition.hardware import Hardware

HAS = Hardware("cpu", "a processor", "AVX-512 with bfloat16", "bfloat16")
LACKS = Hardware("cpu", "a processor", "AVX2", "float32")


def _convolutions(float32: tuple[float, float], bfloat16: tuple[float, float]) -> list[Convolution]:
    """By rates of channels-last and of contiguous."""
    found = []
    for precision, rates in (("float32", float32), ("bfloat16", bfloat16)):
        for layout, rate in zip((True, False), rates, strict=True):
            found.append(Convolution(precision, layout, forward=rate, backward=rate))
    return found


GOOD = Measurements(
    products={"float32": 1e11, "bfloat16": 3e11},
    convolutions=_convolutions((1e11, 0.9e11), (1.05e11, 1e11)),
    decoding={"Pillow": 5000.0},
    exchange=Exchange("gloo", 2, 1e9),
    disk=Disk("/data", 1e9, 1e9),
)


def _verdicts(found: Hardware, measured: Measurements, ranks: int = 1, loader: str = "dali") -> list[str]:
    resolved = hardware.resolve(Config(data=Data(path=Path())), found, local_world=ranks)
    data = resolved.config.data.model_copy(update={"loader": loader})
    config = resolved.config.model_copy(update={"data": data})
    return doctor.verdicts(dataclasses.replace(resolved, config=config), measured, ranks)


@pytest.fixture(autouse=True)
def _uncapped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.CAPS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(hardware, "compile_lacks", lambda device: None)


def test_nothing_is_said_of_what_is_as_usual() -> None:
    assert _verdicts(HAS, GOOD) == []


@pytest.mark.parametrize(
    ("found", "changes", "verdict"),
    [
        # Of the faster layout each.
        (
            LACKS,
            {"convolutions": _convolutions((2e11, 7e11), (1e11, 0.5e11))},
            "bfloat16 is emulated here: 7.0x slower",
        ),
        (HAS, {"convolutions": _convolutions((1e11, 0.5e11), (4e11, 2e11))}, "bfloat16 is 4.0x faster than float32 in"),
        (HAS, {"convolutions": _convolutions((3e11, 1e11), (1e11, 1e11))}, "try backbone.precision=float32"),
        (HAS, {"convolutions": _convolutions((1e11, 1e11), (1e11, 1.15e11))}, None),
        (HAS, {"convolutions": _convolutions((1e11, 1e11), (1e11, 1.5e11))}, "is 1.5x faster the other way"),
        (HAS, {"load": 0.9}, None),
        (HAS, {"load": 1.5}, "other work keeps 2 cores busy (load 1.5)"),
        (HAS, {"disk": Disk("/data", 1e9, 20e6)}, "/data is read at 20 MB/s"),
    ],
)
def test_verdicts(found: Hardware, changes: dict, verdict: str | None) -> None:
    said = _verdicts(found, dataclasses.replace(GOOD, **changes))
    assert any(verdict in line for line in said) if verdict else not said, said


def test_verdicts_on_what_is_installed_and_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    said = "\n".join(_verdicts(HAS, GOOD, ranks=3, loader="torchvision"))
    assert "ATEN_CPU_CAPABILITY=avx2" in said
    assert "3 processes share 2 cores" in said
    assert "Pillow decodes, 5,000 faces a second" in said


def test_packages_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def __init__(self, name: str) -> None:
            self.metadata, self.version = {"Name": name}, f"{name}'s"

    there = [Distribution(name) for name in ("torch", "torch-geometric", "nvidia-dali-cuda130", "onnxruntime-gpu")]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: there)
    found = doctor.packages()
    assert {name: version for name, version in found.items() if version} == {
        "torch": "torch's",
        "nvidia-dali": "nvidia-dali-cuda130's",
        "onnxruntime": "onnxruntime-gpu's",
    }
    assert set(found) == set(doctor.PACKAGES)


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "compile_lacks", lambda device: "the C++ compiler g++")
    assert any("torch.compile lacks the C++ compiler g++" in line for line in _verdicts(HAS, GOOD))
