"""What Triton's compiler makes of a kernel for a GPU that is not there: registers, spills, shared memory.

A launch is compiled as it is, with the tile, the flags and the alignments that the launcher gives it, and not run.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]


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


class Child:
    """A process where Triton compiles anew; what `function` of the file `path` yields for `argument`, as JSON.

    It starts at once and does not wait for who iterates over this. `folder` is for Triton's files and the output.
    """

    def __init__(self, path: Path, function: str, argument: Any, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        places = [str(REPOSITORY), os.getenv("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
        code = (
            "import json, runpy, sys; path, function, argument = sys.argv[1:];"
            "[print(json.dumps(each), flush=True) for each in runpy.run_path(path)[function](json.loads(argument))]"
        )
        command = [sys.executable, "-c", code, str(path), function, json.dumps(argument)]
        self.output, self.errors = folder / "output", folder / "errors"
        with self.output.open("w") as out, self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)

    def __iter__(self) -> Iterator[Any]:
        """Raises AssertionError with the process's errors if it fails."""
        line = ""
        with self.output.open() as lines:
            while True:
                ended = self.process.poll() is not None
                line += lines.readline()
                if line.endswith("\n"):
                    yield json.loads(line)
                    line = ""
                elif ended:
                    break
                else:
                    time.sleep(0.02)
        assert self.process.returncode == 0, self.errors.read_text()[-4000:]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


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
