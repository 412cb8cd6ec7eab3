"""Measures a head: seconds, memory and floating-point operations of training steps on random embeddings.

The plain head can be measured in turns with the fused one, each in processes of its own.
"""

import contextlib
import functools
import statistics
from dataclasses import asdict, dataclass

import torch

from recognition import config, distributed
from recognition.benchmarks.head_rank import Bench, Rates, Step, available_memory
from recognition.distributed.local_ranks import OutOfMemory, Processes, processes
from recognition.planning.head import HeadPlan

REFERENCE_STEPS = 3
_WARM_UP = 2
_REFERENCE_WARM_UP = 1
_USABLE = 0.9


@dataclass(frozen=True)
class Result:
    """Medians over the steps, each as the slowest rank took it; memory of the rank that has most."""

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    """With the update of the rows."""
    images_per_second: float
    """Over all ranks."""
    peak_bytes: int
    """What the process took while the head was built and trained, above what it had after its imports and the start
    of the process group; on a GPU, what was allocated there."""
    state_bytes: int
    """Rows, norms and moments."""
    flops_per_second: float
    """Of one rank: the four matrix products, as `HeadPlan.flops` counts them, over the step's seconds. Of a head that
    keeps exponentials, and takes only three of the four, this may be more than the machine does."""
    floor_seconds: float
    """The time of the four products or of the bytes that have to move (`HeadPlan.traffic`) at the rates that the ranks
    reached in this run, whichever is longer, as if the two overlapped perfectly. No head that computes the logits twice
    can beat it; one that keeps their exponentials takes three of the four products, so three quarters of the products'
    time are what it cannot beat. The ratio stays that to all four, so that heads can be compared."""
    floor_ratio: float
    """Step over floor."""
    reference_step_seconds: float | None = None
    reference_peak_bytes: int | None = None
    reference_ratio: float | None = None
    """Step of the plain head over that of the fused one."""

    def to_json(self) -> dict[str, float | int | None]:
        """The numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Details:
    """What a reader may want to know besides."""

    rates: Rates
    """Of the slowest rank."""
    products_seconds: float
    """The floor's matrix products."""
    traffic_seconds: float
    """The floor's bytes between memory and processor."""
    state: dict[str, int]
    """Bytes of the rows with their norms, and of their moments."""
    alternating: bool
    """Whether the plain head was measured in turns with the fused one."""
    plain_bytes: int | None
    """About what the plain head needs, where it was asked for and a GPU's memory did not suffice: it has no times."""


def measure(
    plan: HeadPlan, steps: int, *, threads: int = 1, reference: bool = False, alternate: bool | None = None
) -> tuple[Result, Details]:
    """Measure `steps` training steps after a warm-up, and `REFERENCE_STEPS` of the plain head, if that is wanted.

    `threads`: of each process on a CPU. `alternate`: whether the two take turns; None: where both find room in memory.
    Else the plain head follows, in processes of its own, unless it needs more than a GPU has. Raises UserError where
    there are not enough GPUs or there is not enough memory, or where the loss is not finite.
    """
    _check(plan)
    beyond = plain_bytes(plan) if reference and plain_bytes(plan) > _gpu_memory(plan) else None
    reference = reference and beyond is None
    taking_turns = reference and (_both_fit(plan) if alternate is None else alternate)
    times: list[Step] = []
    reference_times: list[Step] = []
    reference_peak = None
    with contextlib.ExitStack() as stack:
        fused = stack.enter_context(_processes(plan, threads, plain=False))
        fused.call("take", _WARM_UP)
        if taking_turns:
            plain = stack.enter_context(_processes(plan, threads, plain=True))
            plain.call("take", _REFERENCE_WARM_UP)
            for block in distributed.split(steps, REFERENCE_STEPS):
                times += _slowest(fused.call("take", block))
                reference_times += _slowest(plain.call("take", 1))
            reference_peak = max(plain.call("peak_bytes"))
        else:
            times = _slowest(fused.call("take", steps))
        peak, states = max(fused.call("peak_bytes")), fused.call("state_bytes")
        rates = fused.call("rates")
    if reference and not taking_turns:
        try:
            with _processes(plan, threads, plain=True) as plain:
                plain.call("take", _REFERENCE_WARM_UP)
                reference_times = _slowest(plain.call("take", REFERENCE_STEPS))
                reference_peak = max(plain.call("peak_bytes"))
        except OutOfMemory:
            beyond = plain_bytes(plan)

    step = statistics.median(each.seconds for each in times)
    reference_step = statistics.median(each.seconds for each in reference_times) if reference_times else None
    slowest = Rates(min(rate.flops for rate in rates), min(rate.bytes for rate in rates))
    options, traffic = plan.flops / slowest.flops, plan.traffic / slowest.bytes
    state = max(states, key=lambda each: sum(each.values()))
    result = Result(
        step_seconds=step,
        forward_seconds=statistics.median(each.forward for each in times),
        backward_seconds=statistics.median(each.backward for each in times),
        images_per_second=plan.gathered / step,
        peak_bytes=peak,
        state_bytes=sum(state.values()),
        flops_per_second=plan.flops / step,
        floor_seconds=max(options, traffic),
        floor_ratio=step / max(options, traffic),
        reference_step_seconds=reference_step,
        reference_peak_bytes=reference_peak,
        reference_ratio=None if reference_step is None else reference_step / step,
    )
    return result, Details(slowest, options, traffic, state, taking_turns, beyond)


def plain_bytes(plan: HeadPlan) -> int:
    """About what the plain head needs on a rank, going by what was measured of it.

    Rows, momentum, gradient and the optimizer's copy of it; three copies of the rows that take part, four of logits.
    """
    taken = plan.settings.sample_rate * plan.shard
    return int(4 * plan.embedding_size * (4 * plan.shard + 3 * taken) + 4 * 4 * plan.gathered * taken)


def _processes(plan: HeadPlan, threads: int, *, plain: bool) -> contextlib.AbstractContextManager[Processes]:
    """One process per rank, each with a `Bench`."""
    return processes(
        plan.ranks,
        functools.partial(Bench, plan, plain=plain),
        device=plan.device,
        threads=threads,
        less="fewer classes",
        preload="recognition.benchmarks.head_rank",
    )


def _slowest(times: list[list[Step]]) -> list[Step]:
    """Of each step, how long it took the rank that took longest."""
    return [max(step, key=lambda each: each.seconds) for step in zip(*times, strict=True)]


def _check(plan: HeadPlan) -> None:
    """Raise UserError where the machine is too small."""
    if plan.device == "cuda":
        if torch.cuda.device_count() < plan.ranks:
            raise config.UserError(f"each rank needs a GPU: {plan.ranks} ranks, {torch.cuda.device_count()} GPUs")
        return
    needed, available = plan.ranks * sum(plan.memory.values()), available_memory()
    if needed > available:
        raise config.UserError(
            f"{plan.classes:,} classes on {plan.ranks} ranks need {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are available: take fewer classes, or rows in bfloat16"
        )


def _gpu_memory(plan: HeadPlan) -> float:
    """Bytes that each GPU has; of CPUs, whose memory is not a rank's own, infinitely many."""
    if plan.device != "cuda":
        return float("inf")
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(plan.ranks))


def _both_fit(plan: HeadPlan) -> bool:
    if plan.device == "cuda":
        return False
    return plan.ranks * (sum(plan.memory.values()) + plain_bytes(plan)) < _USABLE * available_memory()
