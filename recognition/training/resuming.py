"""What a run takes over from its checkpoint, beside tensors: precision and schedule."""

from typing import Any

from recognition.config import Config
from recognition.training.optimizer import Schedule


def resolved(facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint with these facts was computed in; one that does not say so has it in its settings."""
    if "resolved" in facts or not facts:
        return facts.get("resolved", {})
    asked = {f"{name}.precision": facts["config"][name].get("precision") for name in ("backbone", "head")}
    return {name: precision for name, precision in asked.items() if precision != "auto"}


def schedule(config: Config, images: int, before: dict[str, Any]) -> tuple[Schedule, list[str]]:
    """The schedule of a run that goes on from a checkpoint with the facts `before`, and what is new about it."""
    training, per_epoch = config.training, images / config.training.global_batch
    step, offset = before.get("step", 0), before.get("schedule_offset", 0)
    epochs = before["config"]["training"]["epochs"] if before else training.epochs
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
