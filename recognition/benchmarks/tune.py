"""Measure the tiles of the head's Triton kernels on a GPU: the fastest candidate for each kernel, work and type."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from recognition.errors import UserError
from recognition.head.backends import tiles
from recognition.head.backends.chunk_loop import backward
from recognition.head.backends.problem import ActiveClasses, LogitOptions, LogitProblem, LossGradient, NegativeTerm
from recognition.head.backends.tiles import Kernel, Problem, Section, Tile, Work
from recognition.head.class_weights.gradient import RowGradient
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
ALL_WORK: tuple[Work, ...] = get_args(Work)


def tune(
    device: torch.device,
    *,
    batches: Sequence[int],
    classes: int,
    embedding_size: int,
    work: Sequence[Work],
    workspace: int,
    report: Callable[[str], None],
    advance: Callable[[int, int], None],
) -> tuple[str, Section]:
    """Return the name of the device's section of the table, and the section with the fastest tiles.

    Entries of work that is not measured stay as they are. `workspace`: bytes of a chunk; `report` gets a line for each
    measurement, `advance` how many tiles of how many are measured.
    """
    import triton

    called = torch.cuda.get_device_name(device)
    old, name = tiles.section(called), tiles.name_of(called)
    names = old.names
    if name == tiles.FALLBACK:
        name, names = called, (called,)
    measured: dict[Kernel, dict[Problem, Tile]] = {kernel: {} for kernel in get_args(Kernel)}
    done, total = 0, len(work) * len(TYPES) * len(batches) * len(measured)
    for each, types, batch in itertools.product(work, TYPES, batches):
        bench = _Bench(device, each, types, batch, classes, embedding_size)
        for kernel, run in bench.kernels.items():
            count = classes if kernel == "negative_sums" else bench.options.chunk
            problem = Problem(each, types, (batch, count, embedding_size))
            measured[kernel][problem] = _fastest(f"{kernel}, {problem}", run, report)
            done += 1
            advance(done, total)
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
    bench = _Bench(device, "plain", next(iter(TYPES)), batches[0], classes, embedding_size)
    return name, replace(section, chunk=bench.best_chunk(workspace, found["logit_gradient"], report))


class _Bench:
    """Class weights, embeddings and the kernels that are measured on them."""

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
        on_rows = _multiply if rows_too else None
        backward(self.backend, problem, self.loss, on_rows)

    def best_chunk(self, workspace: int, known: dict[Problem, Tile], report: Callable[[str], None]) -> int:
        """Return the fastest number of rows per chunk of those that have room, in the tile `known` to be best."""
        batch, size = self.problem.x.shape
        problem = Problem("plain", next(iter(TYPES)), (batch, self.options.chunk, size))
        best = known[min(known, key=problem.distance)]
        times = {}
        for chunk in CHUNKS:
            if chunk <= len(self.problem.weights) and 2 * chunk * (batch + 3 * size) <= workspace:
                with tiles.forced(best):
                    times[chunk] = _milliseconds(functools.partial(self.backward, chunk, rows_too=True))
                report(f"chunk of {chunk}: {times[chunk]:.3f} ms")
        return min(times, key=lambda chunk: times[chunk]) if times else min(CHUNKS)


def _multiply(part: slice | Tensor, gradient: RowGradient) -> None:
    gradient.product()


def _fastest(what: str, run: Callable[[], Any], report: Callable[[str], None]) -> Tile:
    """Return the candidate in which `run` takes least time. Raises UserError where none can be run."""
    from triton.runtime.errors import TritonError

    times: dict[Tile, float] = {}
    for candidate in CANDIDATES:
        with tiles.forced(candidate):
            try:
                times[candidate] = _milliseconds(run)
            except TritonError:
                # Its shared memory or its registers are more than there are.
                times[candidate] = math.inf
        report(f"{what}: {candidate}: {times[candidate]:.3f} ms")
    best = min(times, key=lambda candidate: times[candidate])
    if times[best] == math.inf:
        raise UserError(f"{what}: no tile can be compiled for this GPU")
    return best


def _milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))
