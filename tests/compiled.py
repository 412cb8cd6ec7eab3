"""What Triton's compiler makes of a kernel for a GPU that is not there: registers, spills, shared memory.

A launch is compiled as it is, with the tile, the flags and the alignments that the launcher gives it, and not run.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel."""

    kernel: str
    registers: int
    """Per thread, of 255."""
    stack: int
    """Bytes per thread of memory: what does not fit into registers."""
    shared: int
    """Bytes per block."""
    matrix: str
    """The instruction of the matrix units that is used, "" for none."""


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Resources]]:
    """Launches of Triton kernels on the CPU's tensors become compilations for sm_`arch`, added to the list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[Resources] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_read(run(self, *arguments, grid=grid, warmup=True, **options)))

    driver.set_active(mock.Mock(get_current_device=lambda: 0, get_current_target=lambda: GPUTarget("cuda", arch, 32)))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield found


def in_child(path: Path, function: str, argument: Any, folder: Path) -> Any:
    """What `function` of the file `path` returns for `argument`, as JSON, from a process where Triton compiles anew.

    `folder` is for Triton's files. Raises AssertionError with the process's output if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.getenv("PYTHONPATH")]))
    code = (
        "import json, runpy, sys; path, function, argument = sys.argv[1:];"
        "print(json.dumps(runpy.run_path(path)[function](json.loads(argument))))"
    )
    command = [sys.executable, "-c", code, str(path), function, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def _read(compiled: Any) -> Resources:
    from triton import knobs

    (cubin,) = (path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    matrix = re.search(r"\b(wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+)", ptx)
    return Resources(
        compiled.name,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        compiled.metadata.shared,
        f"{matrix[1].partition('.')[0]} {matrix[2]}" if matrix else "",
    )
