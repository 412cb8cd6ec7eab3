"""Measure a head: seconds, memory and floating-point operations of training steps on random embeddings.

The baseline head can be measured in turns with it, each in processes of its own.
"""

import contextlib
import functools
import statistics
from dataclasses import asdict, dataclass

import torch

from recognition import config, distributed
from recognition.benchmarks.head_rank import RankBenchmark, Rates, Step
from recognition.benchmarks.memory import available_memory
from recognition.distributed.local_ranks import OutOfMemory, Processes, processes
from recognition.planning.head import HeadPlan

BASELINE_STEPS = 3
_WARM_UP = 2
_BASELINE_WARM_UP = 1
_USABLE = 0.9
"""Share of the available memory that both heads together may need."""


@dataclass(frozen=True)
class Result:
    """Medians over the steps, each as long as on the slowest rank; memory of the rank with the most."""

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    """Includes the update of the rows."""
    images_per_second: float
    """Images of all ranks."""
    peak_bytes: int
    """Peak of the process's memory while the head was built and trained, above that after its imports and the start of
    the process group; on a GPU, of the memory allocated there."""
    state_bytes: int
    """Bytes of rows, norms and moments."""
    flops_per_second: float
    """The four matrix products of a rank, as `HeadPlan.flops` counts them, over the step's seconds. It may exceed the
    machine's speed for a head that caches exponentials, which needs only three of the four."""
    floor_seconds: float
    """Lower bound of a step that computes the logits twice: the time of the four products, or of the bytes that have to
    move (`HeadPlan.traffic`), whichever is longer, at the rates that the ranks reached in this run. For a head that
    caches the logits' exponentials the bound is three quarters of the products' time; `floor_ratio` does not take
    that into account, so that heads can be compared."""
    floor_ratio: float
    """Seconds of a step over those of the floor."""
    baseline_step_seconds: float | None = None
    """Seconds of the baseline head's step, the median; None where it was not measured."""
    baseline_peak_bytes: int | None = None
    """Peak memory of the baseline head, measured as `peak_bytes`."""
    baseline_ratio: float | None = None
    """Seconds of the baseline head's step over those of this head's."""

    def to_json(self) -> dict[str, float | int | None]:
        """Return the numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Details:
    """Details of a measurement for its readers."""

    rates: Rates
    """Rates of the slowest rank."""
    products_seconds: float
    """Lower bound by the matrix products alone."""
    traffic_seconds: float
    """Lower bound by the memory traffic alone."""
    state: dict[str, int]
    """Bytes of `rows` with their norms, and of `moments`, of the rank with the most."""
    alternating: bool
    """Whether the baseline head was measured in turns with the head."""
    baseline_bytes: int | None
    """Estimated memory of the baseline head, where it could not be measured because a GPU's memory did not suffice."""


def measure(
    plan: HeadPlan, steps: int, *, threads: int = 1, baseline: bool = False, alternate: bool | None = None
) -> tuple[Result, Details]:
    """Measure `steps` training steps after a warm-up, and with `baseline` also `BASELINE_STEPS` of the baseline head.

    `threads`: CPU threads of each process. `alternate`: whether the two take turns; None: where both fit into memory.
    Otherwise the baseline head follows, unless it needs more memory than a GPU has. Raises UserError where there are
    too few GPUs or too little memory, or where the loss is not finite.
    """
    _check(plan)
    needed = baseline_bytes(plan)
    too_large = needed if baseline and needed > _gpu_memory(plan) else None
    baseline = baseline and too_large is None
    taking_turns = baseline and (_both_fit(plan) if alternate is None else alternate)
    times: list[Step] = []
    baseline_times: list[Step] = []
    baseline_peak = None
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(_processes(plan, threads, baseline=False))
        ranks.call("run_steps", _WARM_UP)
        if taking_turns:
            baseline_ranks = stack.enter_context(_processes(plan, threads, baseline=True))
            baseline_ranks.call("run_steps", _BASELINE_WARM_UP)
            for block in distributed.split(steps, BASELINE_STEPS):
                times += _slowest(ranks.call("run_steps", block))
                baseline_times += _slowest(baseline_ranks.call("run_steps", 1))
            baseline_peak = max(baseline_ranks.call("peak_bytes"))
        else:
            times = _slowest(ranks.call("run_steps", steps))
        peak, states = max(ranks.call("peak_bytes")), ranks.call("state_bytes")
        rates = ranks.call("rates")
    if baseline and not taking_turns:
        try:
            with _processes(plan, threads, baseline=True) as baseline_ranks:
                baseline_ranks.call("run_steps", _BASELINE_WARM_UP)
                baseline_times = _slowest(baseline_ranks.call("run_steps", BASELINE_STEPS))
                baseline_peak = max(baseline_ranks.call("peak_bytes"))
        except OutOfMemory:
            too_large = needed

    step = statistics.median(each.seconds for each in times)
    baseline_step = statistics.median(each.seconds for each in baseline_times) if baseline_times else None
    slowest = Rates(min(rate.flops for rate in rates), min(rate.bytes for rate in rates))
    products, traffic = plan.flops / slowest.flops, plan.traffic / slowest.bytes
    state = max(states, key=lambda each: sum(each.values()))
    result = Result(
        step_seconds=step,
        forward_seconds=statistics.median(each.forward for each in times),
        backward_seconds=statistics.median(each.backward for each in times),
        images_per_second=plan.global_batch / step,
        peak_bytes=peak,
        state_bytes=sum(state.values()),
        flops_per_second=plan.flops / step,
        floor_seconds=max(products, traffic),
        floor_ratio=step / max(products, traffic),
        baseline_step_seconds=baseline_step,
        baseline_peak_bytes=baseline_peak,
        baseline_ratio=None if baseline_step is None else baseline_step / step,
    )
    return result, Details(slowest, products, traffic, state, taking_turns, too_large)


def baseline_bytes(plan: HeadPlan) -> int:
    """Estimate the memory of the baseline head on a rank, from measurements of it.

    Rows, momentum, gradient and the optimizer's copy of it; three copies of the active rows, four of their logits.
    """
    active = plan.settings.sample_rate * plan.local_classes
    return int(4 * plan.embedding_size * (4 * plan.local_classes + 3 * active) + 4 * 4 * plan.global_batch * active)


def _processes(plan: HeadPlan, threads: int, *, baseline: bool) -> contextlib.AbstractContextManager[Processes]:
    """Start one process per rank, each with a `RankBenchmark`."""
    return processes(
        plan.ranks,
        functools.partial(RankBenchmark, plan, baseline=baseline),
        device=plan.device,
        threads=threads,
        less="fewer classes",
        preload="recognition.benchmarks.head_rank",
    )


def _slowest(times: list[list[Step]]) -> list[Step]:
    """Return each step's times on the rank that took longest."""
    return [max(step, key=lambda each: each.seconds) for step in zip(*times, strict=True)]


def _check(plan: HeadPlan) -> None:
    """Raise UserError where the machine has too few GPUs or too little memory."""
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
    """Return the bytes of the smallest GPU's memory; infinity for CPUs, whose memory all ranks share."""
    if plan.device != "cuda":
        return float("inf")
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(plan.ranks))


def _both_fit(plan: HeadPlan) -> bool:
    """Return whether the memory suffices for both heads at once; on GPUs they always follow each other."""
    if plan.device == "cuda":
        return False
    return plan.ranks * (sum(plan.memory.values()) + baseline_bytes(plan)) < _USABLE * available_memory()
