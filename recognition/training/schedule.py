"""The schedule of the learning rate and the margin, and that of a run that goes on with more epochs."""

import bisect
import math
from dataclasses import dataclass
from typing import Any, Literal

from recognition import config
from recognition.config import Config


@dataclass(frozen=True)
class Schedule:
    """Learning rate and margin as functions of the step, t = 0 ... total_steps - 1, without any state."""

    total_steps: int
    """Updates of the run."""
    warmup_steps: int
    """Updates before the peak; below `total_steps` - `offset`."""
    steps_per_epoch: float
    """Updates per pass over the data; not a whole number as a rule."""
    shape: Literal["polynomial", "cosine", "multistep"] = "polynomial"
    """Fall of the rate after t = warmup_steps: to zero at t = total_steps, or by `gamma` at each of `milestones`."""
    power: float = 1.0
    """Exponent of the polynomial."""
    milestones: tuple[int, ...] = ()
    """Steps of `multistep`, rising."""
    gamma: float = 0.1
    """Factor on the rate at each milestone."""
    offset: int = 0
    """Step at which the rate starts again, as in a run of the steps that are left."""

    @classmethod
    def of(cls, training: config.Training, steps_per_epoch: float, offset: int = 0) -> "Schedule":
        """Build the schedule of a configuration; epochs are rounded to the nearest step, and to one at least."""
        total_steps = max(1, round(training.epochs * steps_per_epoch))
        warmup_steps = max(0, min(round(training.warmup_epochs * steps_per_epoch), total_steps - offset - 1))
        return cls(
            total_steps,
            warmup_steps,
            steps_per_epoch,
            training.schedule,
            training.power,
            tuple(round(epochs * steps_per_epoch) for epochs in training.milestones),
            training.gamma,
            offset,
        )

    def factor(self, step: int) -> float:
        """Return the learning rate at `step` as a fraction of its peak, in [0, 1].

        With W = warmup_steps and T = total_steps: (t + 1) / (W + 1) before W, so that the first step already learns
        and step W is the first at the peak; then, with p = (t - W) / (T - W), (1 - p) ** power or (1 + cos(pi p)) / 2,
        which are 0 from T on; or gamma ** n, with n the milestones at t or before it. Every step of the run learns.
        t and T count from `offset`.
        """
        step, total_steps = step - self.offset, self.total_steps - self.offset
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "multistep":
            return self.gamma ** bisect.bisect_right(self.milestones, step)
        left = max(0.0, (total_steps - step) / (total_steps - self.warmup_steps))
        if self.shape == "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        return left**self.power

    def margin_scale(self, step: int, epochs: float) -> float:
        """Return the fraction of the full margin: linear from 0 at the first step to 1 after `epochs`; 0: always 1."""
        steps = epochs * self.steps_per_epoch
        return min(1.0, step / steps) if steps > 0 else 1.0


def plan_schedule(settings: Config, images: int, previous: dict[str, Any]) -> tuple[Schedule, list[str]]:
    """Return the schedule of a run over `images`, and messages on how it differs from that of its checkpoint.

    `previous`: the metadata of the checkpoint that the run goes on from, empty where it begins.
    """
    training, per_epoch = settings.training, images / settings.training.global_batch
    step, offset = previous.get("step", 0), previous.get("schedule_offset", 0)
    epochs = previous["config"]["training"]["epochs"] if previous else training.epochs
    if training.epochs <= epochs:
        return Schedule.of(training, per_epoch, offset), []
    restarts = training.more_epochs == "restart"
    planned = Schedule.of(training, per_epoch, step if restarts else offset)
    how = (
        f"starts again at step {step:,}, with {planned.warmup_steps:,} steps of warm-up, and falls until"
        if restarts
        else f"goes on from {planned.factor(step):.3g} of the peak, as if it had had them from the beginning, until"
    )
    return planned, [
        f"training.epochs was {epochs:g} and is {training.epochs:g}: the learning rate {how} step "
        f"{planned.total_steps:,} (training.more_epochs = {training.more_epochs})"
    ]
