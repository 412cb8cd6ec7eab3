"""Run the tests and benchmarks that one GPU has to show, each within its time; results as JSON lines and a table.

Imports the standard library alone, so that it can name the packages that a machine lacks. `python -m
recognition.benchmarks.gpu_check` prints the properties of the machine that the parts depend on, as one JSON object.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LEAST = 15
"""Seconds that have to be left for a part to start."""
_KEPT = ("device", "gpus", "memory_gb", "torch", "triton", "cuda", "python_version", "commit")
_NOTHING = {"gpus": 0, "memory_gb": 0, "dali": False, "pytest": False}
_LINES = 25


@dataclass(frozen=True)
class Part:
    """One test or benchmark."""

    name: str
    limit: int
    """Seconds that it may take."""
    reason: str
    """Reason to skip it on this machine; empty: it is run."""
    command: list[str]


def check(folder: Path, *, python: str, seconds: int, echo: Callable[[str], None]) -> int:
    """Run all parts with the interpreter `python`, in `seconds` at most; returns 1 if one failed, else 0.

    `folder`/results.jsonl gets a JSON object for each part, with the machine it was measured on, and `folder`/NAME.txt
    what the part printed. A part is skipped, with a reason, where the machine lacks something, and once the time is
    used up. The last lines given to `echo` are a table.
    """
    end = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    machine = _machine(python)
    records = []
    with (folder / "results.jsonl").open("w", encoding="utf-8") as file:
        for part in parts(python, folder, machine):
            echo(f"=== {part.name}")
            record = _run(part, folder, end - time.monotonic(), machine, echo)
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
    for line in _table(records):
        echo(line)
    return int(any(record["status"] == "failed" for record in records))


def parts(python: str, folder: Path, machine: dict[str, Any]) -> list[Part]:
    """Return all parts, the most telling first."""

    def lacking(*reasons: str) -> str:
        return machine["lacking"] or next(filter(None, reasons), "")

    def memory(least: int) -> str:
        has = machine["memory_gb"]
        return "" if has >= least else f"needs {least} GB of memory, the GPU has {has}"

    def head(name: str, limit: int, reason: str, options: str) -> Part:
        return Part(name, limit, lacking(reason), [*program, *f"benchmark head --device cuda --json {options}".split()])

    def training(name: str, limit: int, least: int, options: str) -> Part:
        command = f"benchmark training --device cuda --json {options}"
        return Part(name, limit, lacking(memory(least)), [*program, *command.split()])

    program = [python, "-m", "recognition.cli.main"]
    no_pytest = "" if machine["pytest"] else "pytest is not installed"
    no_tests = "" if (REPOSITORY / "tests/gpu").is_dir() else "the tests are not here, but in the repository"
    no_dali = "" if machine["dali"] else "DALI is not installed"
    gpus = machine["gpus"]
    too_few = "" if gpus >= 2 else f"needs 2 GPUs, there is {gpus}"
    # Foreign packages' warnings depend on their versions, which are this machine's.
    tests = [python, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-W", "default"]
    faces = ["faces", "--identities", "100", "--images", "20", "--pairs", "20", "--output", str(folder / "faces")]
    data = [
        "benchmark",
        "data",
        "--data",
        str(folder / "faces"),
        "--device",
        "cuda",
        "--batch",
        "256",
        "--threads",
        "4",
    ]
    million, ten_million = "--classes 1000000", "--classes 10000000"
    thirty_million = "--classes 30000000 --batch 1024 --steps 5"
    return [
        Part("tests", 200, lacking(no_pytest, no_tests), tests),
        head("head 1M B1024", 60, memory(36), f"{million} --batch 1024 --steps 20 --reference"),
        head("head 1M B1024 without Triton", 40, memory(8), f"{million} --batch 1024 --steps 10 --backend torch"),
        head("head 1M B8192", 60, memory(8), f"{million} --batch 8192 --steps 10 --reference"),
        head("head 10M B1024", 60, memory(46), f"{ten_million} --batch 1024 --steps 10 --reference"),
        head("head 10M B8192", 75, memory(46), f"{ten_million} --batch 8192 --steps 5"),
        head("head 10M sampled 0.1 B1024", 60, memory(46), f"{ten_million} --batch 1024 --steps 10 --sample-rate 0.1"),
        head("head 30M bfloat16 B1024", 75, memory(68), f"{thirty_million} --row-format bfloat16"),
        head("head 10M B1024 on all GPUs", 75, too_few, f"{ten_million} --batch 1024 --steps 5 --ranks {gpus}"),
        training("training IResNet-50", 150, 20, "--backbone iresnet50 --batch 256"),
        Part("data faces", 60, lacking(no_dali), [*program, *faces]),
        Part("data pipeline", 60, lacking(no_dali), [*program, *data, "--json"]),
        training("training IResNet-100", 200, 30, "--backbone iresnet100 --batch 256 --steps 24"),
    ]


def _run(part: Part, folder: Path, left: float, machine: dict[str, Any], echo: Callable[[str], None]) -> dict[str, Any]:
    """Run a part, or skip it; returns its record."""
    log = folder / f"{re.sub(r'[^A-Za-z0-9]', '_', part.name)}.txt"
    log.unlink(missing_ok=True)
    reason = part.reason or ("the time is used up" if left < LEAST else "")
    status, spent = "skipped", 0
    if reason:
        echo(f"skipped: {reason}")
    else:
        start = time.monotonic()
        exit_status = _execute(part.command, log, min(left, part.limit))
        spent = int(time.monotonic() - start)
        text = log.read_text(encoding="utf-8", errors="replace")
        echo("\n".join(text.splitlines()[-_LINES:]))
        status, reason = _outcome(part, exit_status, text, left)
    result = _result(log) if status != "skipped" else None
    record = {"part": part.name, "status": status, "reason": reason, "seconds": spent}
    return record | {"command": shlex.join(part.command), "result": result} | {name: machine[name] for name in _KEPT}


def _execute(command: list[str], log: Path, limit: float) -> int | None:
    """Run a command and what it starts for `limit` seconds; returns the exit status, or None where it took longer."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment,
            start_new_session=True,
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: asked first, killed after five seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(part: Part, exit_status: int | None, text: str, left: float) -> tuple[str, str]:
    """Return a part's status, and the reason for it."""
    if exit_status == 0:
        return "passed", ""
    if exit_status is None:
        if left < part.limit:
            return "skipped", "the time was used up while it ran"
        return "failed", f"it took longer than {part.limit} s"
    if "the GPU's memory has run out" in text:
        return "skipped", "the GPU's memory ran out"
    return "failed", f"status {exit_status}"


def _result(log: Path) -> Any:
    """Return the last line of a log, or the object that it is in JSON."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return None
    try:
        return json.loads(lines[-1])
    except json.JSONDecodeError:
        return lines[-1].strip("= ")


def _table(records: list[dict[str, Any]]) -> Iterator[str]:
    machine = records[0]
    yield "---"
    yield f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}"
    width = max(len(record["part"]) for record in records)
    for record in records:
        yield f"{record['part']:<{width}}  {record['seconds']:>4} s  {_shown(record)}"


def _shown(record: dict[str, Any]) -> str:
    """Return what a part found, on one line."""
    found = record["result"]
    if record["status"] != "passed":
        return f"{record['status']}: {record['reason']}"
    if not isinstance(found, dict):
        return str(found or "passed")
    if "floor_ratio" in found:
        line = f"{1000 * found['step_seconds']:.2f} ms, {found['floor_ratio']:.2f} x floor, "
        line += f"{found['flops_per_second'] / 1e12:.0f} TFLOP/s, peak {found['peak_bytes'] / 1e9:.1f} GB"
        if found["baseline_ratio"] is not None:
            line += f", plain head {found['baseline_ratio']:.1f} x slower"
        elif "--reference" in record["command"]:
            line += ", plain head: out of memory"
        return line
    if "mfu" in found:
        mfu = "?" if found["mfu"] is None else format(found["mfu"], ".1%")
        return (
            f"{found['images_per_second']:,.0f} img/s, MFU {mfu}, "
            f"{found['baseline_ratio']:.2f} x eager fp16 NCHW, {found['eager_ratio']:.2f} x eager bf16"
        )
    return ", ".join(f"{name}: {value:,.0f}" for name, value in found.items())


def _machine(python: str) -> dict[str, Any]:
    """Return the facts that the interpreter `python` finds; a package that is missing is the reason to skip all."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [python, "-m", "recognition.benchmarks.gpu_check"]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError):
        found = {"lacking": f"{python} does not run"}
    return dict.fromkeys((*_KEPT, "lacking"), "unknown") | _NOTHING | found | {"commit": _commit()}


def facts() -> dict[str, Any]:
    """Return what this interpreter has: device, memory, packages, and what every part lacks."""
    found: dict[str, Any] = {"device": "none", "torch": "none", "triton": "none", "cuda": "none", "lacking": ""}
    found |= _NOTHING | {"python_version": platform.python_version()}
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda or "none", "gpus": torch.cuda.device_count()}
        if torch.cuda.is_available():
            memory = torch.cuda.get_device_properties(0).total_memory
            found |= {"device": torch.cuda.get_device_name(0), "memory_gb": int(memory / 1e9)}
            import click  # noqa: F401

            import recognition.benchmarks.training  # noqa: F401
        else:
            found["lacking"] = "there is no CUDA device"
    except ImportError as error:
        found["lacking"] = str(error)
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    with contextlib.suppress(ModuleNotFoundError):
        found["dali"] = importlib.util.find_spec("nvidia.dali") is not None
    found["pytest"] = importlib.util.find_spec("pytest") is not None
    return found


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(facts()) + "\n")
