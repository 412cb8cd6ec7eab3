"""What is planned against what is measured, and the tool that measures."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from recognition import config, hardware
from recognition.benchmarks.head_rank import RankBenchmark
from recognition.planning.head import HeadPlan
from tests.support.ranks import run_ranks

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_head.py"


def _plan(classes: int, optimizer: config.Optimizer | None = None, **settings) -> HeadPlan:
    return HeadPlan(config.Head(**settings), classes, ranks=1, batch=16, device="cpu", optimizer=optimizer)


PLANS = {
    "100,000": _plan(100_000, precision="float32"),
    "200,000": _plan(200_000, precision="float32"),
    "400,000": _plan(400_000, precision="float32"),
    "split": _plan(100_000, row_format="split", precision="bfloat16"),
    "bfloat16": _plan(200_000, row_format="bfloat16", precision="bfloat16"),
    "AdamW, sampled": _plan(100_000, config.AdamW(), sample_rate=0.1, precision="float32"),
}


def _measured(plan: HeadPlan) -> tuple[int, int]:
    bench = RankBenchmark(plan, torch.device(plan.device))
    bench.run_steps(1)
    return bench.peak_bytes(), sum(bench.state_bytes().values())


@pytest.mark.parametrize("name", PLANS)
def test_planned_memory_is_what_is_measured(name: str) -> None:
    plan = PLANS[name]
    [(peak, state)] = run_ranks(_measured, 1, plan)
    assert state == plan.state_bytes
    # Beside tensors there are the buffers of the library that multiplies: up to 6 % here.
    assert sum(plan.memory.values()) == pytest.approx(peak, rel=0.1)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_head_tool", TOOL)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_benchmark(tool: ModuleType, capsys) -> None:
    arguments = "--ranks 2 --classes 4000 --batch 8 --steps 4 --sample-rate 0.5 --embedding-size 64 --precision float32"
    assert tool.main([*arguments.split(), "--reference", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert list(found) == [
        "step_seconds",
        "forward_seconds",
        "backward_seconds",
        "images_per_second",
        "peak_bytes",
        "state_bytes",
        "flops_per_second",
        "floor_seconds",
        "floor_ratio",
        "baseline_step_seconds",
        "baseline_peak_bytes",
        "baseline_ratio",
    ]
    assert min(found.values()) > 0
    step = found["step_seconds"]
    assert max(found["forward_seconds"], found["backward_seconds"]) < step
    assert found["images_per_second"] == pytest.approx(16 / step)
    assert found["state_bytes"] == 2000 * (2 * 4 * 64 + 4)
    # Half the rank's 2000 classes take part.
    assert found["flops_per_second"] == pytest.approx(8 * 16 * 1000 * 64 / step)
    assert found["floor_ratio"] == pytest.approx(step / found["floor_seconds"])
    assert found["baseline_ratio"] == pytest.approx(found["baseline_step_seconds"] / step)
    assert "in turns" in text
    assert str(hardware.detect(torch.device("cpu"))) in text
    assert "in float32" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "100", "--sample-rate", "1.5"], "--sample-rate: "),
        (["--classes", "1000000000000", "--ranks", "2"], "GB are available"),
        pytest.param(
            ["--classes", "100", "--device", "cuda", "--ranks", "100"],
            "each rank needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.device_count() >= 100, reason="there are that many"),
        ),
    ],
)
def test_mistakes_are_told(tool: ModuleType, capsys, arguments: list[str], message: str) -> None:
    assert tool.main(arguments) == 2
    assert message in capsys.readouterr().err
