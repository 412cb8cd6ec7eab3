"""Where torch.compile cannot build its kernels, a run that asks for it is refused before it starts."""

import sys
from pathlib import Path

import pytest

from recognition import hardware
from recognition.config import Backbone, Config, Data
from recognition.errors import UserError

CPU = hardware.Hardware("cpu", "a processor", "AVX2", "float32")
COMPILED = Config(data=Data(path=Path()), backbone=Backbone(compile=True))


@pytest.fixture(autouse=True)
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Python's, with a compiler that is there."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CXX", f"{sys.executable} --with-an-option")
    path = tmp_path / "Python.h"
    path.touch()
    return path


def test_a_machine_that_has_all_compiles() -> None:
    assert hardware.compile_lacks("cpu") is None
    assert hardware.resolve(COMPILED, CPU).config.backbone.compile is True


def test_python_headers_are_needed(headers: Path) -> None:
    headers.unlink()
    with pytest.raises(UserError, match=r"torch\.compile lacks Python's headers in .*backbone\.compile=false"):
        hardware.resolve(COMPILED, CPU)


def test_a_compiler_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"torch\.compile lacks the C\+\+ compiler no-such-compiler"):
        hardware.resolve(COMPILED, CPU)
    auto = Config(data=Data(path=Path()))
    assert hardware.resolve(auto, CPU).config.backbone.compile is False


def test_a_card_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hardware.compile_lacks("cuda") == "Triton (pip install triton)"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert hardware.compile_lacks("cuda") is None
