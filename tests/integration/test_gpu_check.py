"""`tools/gpu_check.py` without a GPU, and, with a Python that only pretends, what it makes of its parts' ends."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
HEAD = {
    "step_seconds": 0.0123,
    "floor_ratio": 1.25,
    "flops_per_second": 5e14,
    "peak_bytes": 3e9,
    "baseline_ratio": None,
}
TRAINING = {"images_per_second": 5000.0, "mfu": 0.25, "baseline_ratio": 2.5, "eager_ratio": 1.5}
PARTS = 13


def check(folder: Path, **environment: str) -> tuple[int, list[str], list[dict[str, Any]]]:
    """Exit status, the table's lines, and the objects."""
    found = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not found.stderr, found.stderr
    _, table = found.stdout.split("\n---\n")
    parts = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return found.returncode, table.splitlines(), parts


def test_without_a_gpu_every_part_is_skipped(tmp_path: Path) -> None:
    status, table, parts = check(tmp_path)
    assert status == 0
    assert len(parts) == PARTS
    assert {part["status"] for part in parts} == {"skipped"}
    assert {part["reason"] for part in parts} == {"there is no CUDA device"}
    assert {part["result"] for part in parts} == {None}
    assert table[0].startswith("none, torch ")
    assert len(table) == PARTS + 1
    assert all(line.endswith("skipped: there is no CUDA device") for line in table[1:])
    assert [line.split("  ")[0] for line in table[1:]] == [part["part"] for part in parts]


def pretend(folder: Path, case: str, **facts: object) -> dict[str, str]:
    """The environment with a Python that has a GPU; `case` is what it does in a part, shell patterns on its command."""
    facts = {"device": "Pretended", "gpus": 1, "memory_gb": 85, "dali": False, "pytest": True, "lacking": ""} | facts
    python = folder / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
if [ "$2" = recognition.benchmarks.gpu_check ]; then echo {shlex.quote(json.dumps(facts))}; exit; fi
case "$*" in
{case}
*pytest*) echo "== 5 passed in 1 s ==" ;;
*"benchmark head"*) echo measured; echo {shlex.quote(json.dumps(HEAD))} ;;
*"benchmark training"*) echo {shlex.quote(json.dumps(TRAINING))} ;;
*) echo '{{"flip_images_per_second": 9000.4}}' ;;
esac
"""
    )
    python.chmod(0o755)
    return {"PYTHON": str(python)}


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    status, table, parts = check(tmp_path / "out", **pretend(tmp_path, "", memory_gb=48))
    named = {part["part"]: part for part in parts}
    lines = {line.split("  ")[0]: line for line in table[1:]}
    assert status == 0
    assert len(parts) == len(named) == PARTS
    assert named["tests"]["status"] == "passed" and named["tests"]["result"] == "5 passed in 1 s"
    assert named["head 1M B1024"]["result"] == HEAD
    assert "--classes 1000000 --batch 1024" in named["head 1M B1024"]["command"]
    assert named["head 1M B1024"]["device"] == "Pretended"
    assert "12.30 ms, 1.25 x floor, 500 TFLOP/s" in lines["head 1M B1024"]
    assert "plain head: out of memory" in lines["head 1M B1024"]
    assert "plain head" not in lines["head 10M B8192"]
    assert "5,000 img/s, MFU 25.0%, 2.50 x eager fp16 NCHW" in lines["training IResNet-50"]
    assert named["head 30M bfloat16 B1024"]["reason"] == "needs 68 GB of memory, the GPU has 48"
    assert named["head 10M B1024 on all GPUs"]["reason"] == "needs 2 GPUs, there is 1"
    assert named["data pipeline"]["reason"] == "DALI is not installed"


@pytest.mark.parametrize(
    ("case", "status", "reason", "exit_status"),
    [
        ("*10000000*8192*) echo broken; exit 3 ;;", "failed", "status 3", 1),
        ('*10000000*8192*) echo "error: the GPU\'s memory has run out"; exit 2 ;;', "skipped", "memory ran out", 0),
        ("*10000000*8192*) sleep 60 ;;", "skipped", "time was used up while it ran", 0),
    ],
)
def test_a_part_that_does_not_end_well(tmp_path: Path, case: str, status: str, reason: str, exit_status: int) -> None:
    found, _, parts = check(tmp_path / "out", **pretend(tmp_path, case), GPU_CHECK_SECONDS="17")
    named = {part["part"]: part for part in parts}
    part = named.pop("head 10M B8192")
    assert found == exit_status
    assert part["status"] == status
    assert reason in part["reason"]
    others = {each["status"] for each in named.values()}
    assert others == {"passed", "skipped"}
    if "time" in reason:
        assert named["training IResNet-50"]["reason"] == "the time is used up"
