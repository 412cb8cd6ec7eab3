"""Measure the tiles of the head's Triton kernels on this GPU: prints its section of head/backends/tiles.toml.

With `--write`, the section takes its place in the file. Entries of work that was not measured stay as they are.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import torch

    from recognition.cli.argument_types import positive
    from recognition.errors import UserError
    from recognition.files.atomic import write_text
    from recognition.files.outputs import check_output
    from recognition.head.backends import tiles
    from recognition.head.backends.chunk_loop import backward
    from recognition.head.backends.problem import ActiveClasses, LogitOptions, LogitProblem, LossGradient, NegativeTerm
    from recognition.head.backends.tiles import Kernel, Problem, Section, Tile, Work
    from recognition.head.class_weights.shard import RowFormat, WeightShard
    from recognition.head.losses.negatives import AffineNegatives, CurricularNegatives, FilteredNegatives

SIDES = [(256, 128, 64), (128, 256, 64), (128, 256, 32), (128, 128, 64), (128, 128, 32), (64, 256, 64), (64, 256, 32)]
SIDES += [(64, 128, 64), (64, 128, 32), (64, 128, 16), (128, 64, 64), (64, 64, 64), (64, 64, 32)]
CANDIDATES = [
    Tile(*sides, warps, stages)
    for sides in SIDES
    for warps in (4, 8)
    for stages in (3, 4)
    # More sums to a thread than these leave no registers, and fewer do not keep the units busy.
    if 16 <= sides[0] * sides[1] // (32 * warps) <= 128
]
CHUNKS = (2048, 4096, 8192, 16384, 32768)
TYPES: dict[tuple[int, int], tuple[RowFormat, torch.dtype]] = {
    (2, 2): ("bfloat16", torch.bfloat16),
    (4, 2): ("float32", torch.bfloat16),
    (4, 4): ("float32", torch.float32),
}
CENTERS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, nargs="+", default=[1024], help="gathered images (default: 1024)")
    parser.add_argument("--classes", type=positive, default=262_144, help="classes of this GPU (%(default)s)")
    parser.add_argument("--embedding-size", type=positive, default=512, help="default: %(default)s")
    parser.add_argument("--work", choices=get_args(Work), nargs="+", default=list(get_args(Work)), help="default: all")
    parser.add_argument("--workspace", type=positive, default=256, metavar="MIB", help="of a chunk (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the section into the table")
    return parser


def _main(options: argparse.Namespace) -> int:
    if options.write:
        check_output(tiles.TABLE, kind="file")
    device = _device()
    name, section = _tuned(device, options)
    print(section.to_toml(name), end="")
    if options.write:
        write_text(tiles.TABLE, tiles.put(tiles.TABLE.read_text(encoding="utf-8"), name, section))
        print(f"written to {tiles.TABLE}", file=sys.stderr)
    return 0


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: run this on the GPU whose tiles are to be found")
    device = torch.device("cuda", torch.cuda.current_device())
    from recognition.head.backends import select

    select.select_backend("triton", device)
    return device


def _tuned(device: torch.device, options: argparse.Namespace) -> tuple[str, Section]:
    """The device's section, and what it is called."""
    import triton

    called = torch.cuda.get_device_name(device)
    old, name = tiles.section(called), tiles.name_of(called)
    names = old.names
    if name == tiles.FALLBACK:
        name, names = called, (called,)
    measured: dict[Kernel, dict[Problem, Tile]] = {kernel: {} for kernel in get_args(Kernel)}
    for work in options.work:
        for types in TYPES:
            for batch in options.batch:
                bench = _Bench(device, work, types, batch, options.classes, options.embedding_size)
                for kernel, run in bench.kernels.items():
                    classes = options.classes if kernel == "negative_sums" else bench.options.chunk
                    problem = Problem(work, types, (batch, classes, options.embedding_size))
                    measured[kernel][problem] = _fastest(f"{kernel}, {problem}", run)
    found = {
        kernel: {
            problem: tile
            for problem, tile in old.tiles[kernel].items()
            if (problem.work, problem.bytes) not in {(new.work, new.bytes) for new in entries}
        }
        | entries
        for kernel, entries in measured.items()
    }
    source = f"timed on {called}, torch {torch.__version__}, Triton {triton.__version__}"
    section = replace(old, names=names, source=source, tiles=found)
    bench = _Bench(device, "plain", next(iter(TYPES)), options.batch[0], options.classes, options.embedding_size)
    return name, replace(section, chunk=bench.best_chunk(options.workspace << 20, found["logit_gradient"]))


class _Bench:
    """Rows, embeddings and the functions that are measured on them."""

    def __init__(
        self, device: torch.device, work: Work, types: tuple[int, int], batch: int, classes: int, size: int
    ) -> None:
        from recognition.head.backends.triton_backend import TritonBackend

        state, dtype = TYPES[types]
        centers = CENTERS if work == "centers" else 1
        rows = WeightShard.initial(range(classes * centers), size, bias=False, seed=0, device=device, row_format=state)
        x = torch.nn.functional.normalize(torch.randn(batch, size, device=device)).to(dtype)
        active = ActiveClasses(None, torch.randint(classes, (batch,), device=device))
        self.options = LogitOptions(unit_rows=True, dtype=dtype, chunk=min(classes, max(CHUNKS) // 4), centers=centers)
        curricular = CurricularNegatives(64.0, torch.tensor(0.1, device=device))
        negatives = FilteredNegatives(curricular, 0.9, zero=False) if work == "heavy" else AffineNegatives(64.0)
        vector = torch.full((batch,), 0.1, device=device)
        term = NegativeTerm(negatives, vector if work == "heavy" else None, False, 64.0)
        self.problem = LogitProblem(rows, active, x, self.options, term)
        self.loss = LossGradient(lse=vector, grad_lse=vector, target=vector, grad_target=vector)
        self.backend = TritonBackend()
        self.kernels: dict[Kernel, Callable[[], Any]] = {
            "negative_sums": self.negative_sums,
            "logit_gradient": self.backward,
        }

    def negative_sums(self) -> None:
        """Run the forward pass."""
        self.backend.negative_sums(self.problem, keep=False)

    def backward(self, chunk: int | None = None, *, rows_too: bool = False) -> None:
        """Run the backward pass, with the gradient by the rows if wanted."""
        problem = replace(self.problem, options=replace(self.options, chunk=chunk or self.options.chunk))
        on_rows = (lambda part, gradient: gradient.product()) if rows_too else None
        backward(self.backend, problem, self.loss, on_rows)

    def best_chunk(self, workspace: int, known: dict[Problem, Tile]) -> int:
        """Rows per chunk that are fastest, of those that have room, in the tile that is `known` to be best."""
        batch, size = self.problem.x.shape
        problem = Problem("plain", next(iter(TYPES)), (batch, self.options.chunk, size))
        best = known[min(known, key=problem.distance)]
        times = {}
        for chunk in CHUNKS:
            if chunk <= len(self.problem.weights) and 2 * chunk * (batch + 3 * size) <= workspace:
                with tiles.forced(best):
                    times[chunk] = _milliseconds(lambda chunk=chunk: self.backward(chunk, rows_too=True))
                print(f"chunk of {chunk}: {times[chunk]:.3f} ms", file=sys.stderr)
        return min(times, key=lambda chunk: times[chunk]) if times else min(CHUNKS)


def _fastest(what: str, run: Callable[[], Any]) -> Tile:
    """The candidate in which `run` takes least time. Raises UserError where none can be run."""
    from triton.runtime.errors import TritonError

    times: dict[Tile, float] = {}
    for candidate in CANDIDATES:
        with tiles.forced(candidate):
            try:
                times[candidate] = _milliseconds(run)
            except TritonError:
                # Its shared memory or its registers are more than there are.
                times[candidate] = math.inf
        print(f"{what}: {candidate}: {times[candidate]:.3f} ms", file=sys.stderr)
    best = min(times, key=lambda candidate: times[candidate])
    if times[best] == math.inf:
        raise UserError(f"{what}: no tile can be compiled for this GPU")
    return best


def _milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


if __name__ == "__main__":
    sys.exit(main())
