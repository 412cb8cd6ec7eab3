"""tools/doctor.py: what it prints of this machine, and of one that is capped."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from recognition import hardware
from recognition.benchmarks import machine
from recognition.config import Config, Data

TOOL = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"
CAP = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, which measures each thing once, and leaves torch's threads as they were."""
    specification = importlib.util.spec_from_file_location("doctor_tool", TOOL)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(machine, "QUICK", machine.Effort(seconds=0.0, bucket=1 << 16, file=1 << 20))
    monkeypatch.setattr(machine, "_FACES", 4)
    for name in CAP:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def _numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict | list):
        return [number for each in (tree.values() if isinstance(tree, dict) else tree) for number in _numbers(each)]
    return [tree] if isinstance(tree, float) else []


@pytest.mark.parametrize("ranks", [1, 2])
def test_doctor(tool: ModuleType, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--quick", "--json", "--folder", str(tmp_path), "--ranks", str(ranks)]
    assert tool.main(arguments) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert list(found) == ["system", "packages", "ranks", "resolved", "measured", "verdicts"]
    here = hardware.detect(torch.device("cpu"))
    resolved = hardware.resolve(Config(data=Data(path=tmp_path)), here, local_world=ranks)
    assert found["resolved"] == resolved.to_json()
    for name, value in resolved.to_json().items():
        assert name == "device" or any(name in line and str(value).lower() in line for line in text.splitlines())
    assert found["system"]["processor"] == str(here) and found["system"]["capped by"] == "nothing"
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    measured = found["measured"]
    assert set(measured) == {field.name for field in dataclasses.fields(machine.Measurements)}
    assert set(measured["products"]) == set(hardware.DTYPES)
    assert ("DALI" in measured["decoding"]) == (hardware.loader("auto") == "dali")
    assert measured.pop("load") >= 0
    assert all(number > 0 and math.isfinite(number) for number in _numbers(measured))
    assert (measured["exchange"]["backend"], measured["exchange"]["ranks"]) == ("gloo", 2)
    for verdict in found["verdicts"]:
        assert verdict.split()[0] in text
    assert not list(tmp_path.iterdir())
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_a_capped_processor_is_one_without_bfloat16(tmp_path: Path) -> None:
    # In a process of its own: torch and oneDNN ask the environment once. What is emulated there is measured in small.
    small = "import runpy, recognition.benchmarks.machine as m; m._SIDE, m._BATCH, m._FACES = {'cpu': 64}, 2, 4"
    program = f"{small}; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, "--quick", "--json", "--folder", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, env=os.environ | CAP, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "(AVX2)" in found["system"]["processor"]
    assert "ATEN_CPU_CAPABILITY=avx2" in found["system"]["capped by"]
    assert found["resolved"]["backbone.precision"] == found["resolved"]["head.precision"] == "float32"
    assert any(verdict.startswith("ATEN_CPU_CAPABILITY=avx2") for verdict in found["verdicts"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folder", "/missing/folder"], "/missing/folder: No such file or directory"),
        pytest.param(
            ["--device", "cuda"],
            "there is no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_mistakes_are_told(
    tool: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--quick", *arguments]) == 2
    assert message in capsys.readouterr().err
