"""The messages of a run to its user: before the first step, after the last one, and where it has to stop."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from recognition.config import Config
from recognition.data.index import Index
from recognition.files.paths import runnable
from recognition.hardware import Resolved
from recognition.runs.best import find_best, read_record
from recognition.runs.folder import RunFolder
from recognition.tracking.tracker import Tracker


def opening(
    config: Config, resolved: Resolved, index: Index, tracker: Tracker, world: int, backbone: Sequence[str]
) -> list[str]:
    """Return lines about a run that is going to begin: data, machine, backbone (the lines `backbone`), length."""
    threads = config.training.threads
    return [
        f"{index.num_images:,} images of {index.num_identities:,} identities: {index.path}",
        f"{world} process{'es' if world > 1 else ''} on {resolved.hardware}, each with {threads} CPU "
        f"thread{'s' if threads > 1 else ''}",
        *backbone,
        str(resolved),
        f"{tracker.total_steps:,} steps of {config.training.global_batch} images"
        + (f", from step {tracker.start_step:,} on" if tracker.start_step else ""),
    ]


def closing(
    config: Config, folder: RunFolder, tracker: Tracker, accuracies: Mapping[str, float], *, nonfinite: int
) -> list[str]:
    """Return lines about the run in `folder`, which has done its last step: its results, and how to go on.

    `accuracies`: final ones, by set. `nonfinite`: number of skipped steps.
    """
    found = [
        f"complete: {tracker.total_steps:,} steps"
        + (f", {tracker.total_steps - tracker.start_step:,} of them now" if tracker.start_step else "")
        + f" in {timedelta(seconds=round(tracker.clock.seconds()))}"
    ]
    rate = tracker.clock.mean_rate()
    if rate is not None:
        found.append(f"mean speed: {rate * tracker.images_per_step:,.1f} img/s")
    found += [f"accuracy on {name}: {accuracy:.2%}" for name, accuracy in accuracies.items()]
    record = read_record(folder.path)
    if accuracies and record:
        mean = "mean " if len(accuracies) > 1 else ""
        found += [
            f"best {mean}accuracy: {record['accuracy']:.2%} at step {record['step']:,}",
            f"  {find_best(folder.path)}",
        ]
    quarantined = _quarantined(folder.quarantine)
    if quarantined:
        found += [f"images replaced as unusable: {quarantined:,}, listed in", f"  {folder.quarantine}"]
    if nonfinite:
        found.append(f"not finite, so called off: {nonfinite:,} steps")
    if folder.model.is_file():
        found += ["model:", f"  {folder.model}"]
    sets = " ".join(shlex.quote(str(path)) for path in config.evaluation.pairs) or "PAIRS"
    run = shlex.quote(str(folder.path))
    # Each command stands whole on a line of its own, to be copied.
    return [
        *found,
        "evaluate it:",
        f"  {runnable('recognition')} evaluate --model {run} --pairs {sets}",
        "go on: the same command, and",
        f"  training.epochs={2 * config.training.epochs:g} training.more_epochs=stretch",
        "curves:",
        f"  {runnable('tensorboard')} --logdir {run}",
    ]


def nothing_to_do(folder: RunFolder, step: int, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines about a run that was complete already; `results`: of the final verification, by set."""
    found = ", ".join(f"{name}: accuracy {result['accuracy']:.2%}" for name, result in results.items())
    return [
        f"complete: all {step:,} steps are done, nothing to do{f' ({found})' if found else ''}",
        "to go on: more training.epochs with training.more_epochs=stretch or training.more_epochs=restart, or another "
        f"run with run.folder=... and backbone.weights={folder.path}",
    ]


def training_is_saved(folder: RunFolder, step: int) -> str:
    """Return a sentence for an error that came after the checkpoint of `step`."""
    return (
        f"The training is not lost: {folder.checkpoints} holds a checkpoint of step {step}, from which the same "
        "command goes on; evaluation.* and export.* may be changed"
    )


def rank_hangs(config: Config, step: int, missing: Sequence[int]) -> str:
    """Return the message about a collective that timed out because the ranks `missing` did not take part."""
    ranks = ", ".join(str(rank) for rank in missing) or "?"
    return (
        f"step {step}: rank {ranks} has not taken part for {config.distributed.timeout_seconds} seconds "
        "(distributed.timeout_seconds). Look whether its disk or network hangs where it reads "
        f"{config.data.path}; the same command goes on from the last checkpoint"
    )


def not_finite(config: Config, folder: RunFolder, step: int, in_a_row: int) -> str:
    """Return the message about a run that stops at `step`, after `in_a_row` steps that were not finite."""
    saved = any(folder.checkpoints.glob("step-*"))
    weights = f" and backbone.weights={folder.path}" if saved else ""
    low = [name for name in ("backbone", "head") if getattr(config, name).precision != "float32"]
    higher = " and ".join(f"{name}.precision=float32" for name in low)
    return (
        f"step {step}: the loss has not been finite for {in_a_row} steps. The backbone's weights are those of step "
        f"{step - in_a_row}; {folder.path / 'metrics.jsonl'} tells where it began. Start another run with "
        f"run.folder=...{weights}, with a lower optimizer.lr or a longer training.warmup_epochs"
        f"{f'; or go on with {higher}' if higher else ''}"
    )


def _quarantined(path: Path) -> int:
    """Count the samples that a quarantine lists; ranks and continued runs may list one more than once."""
    if not path.is_file():
        return 0
    samples = set()
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            samples.add(json.loads(line)["sample"])
        except (ValueError, KeyError, TypeError):
            continue
    return len(samples)
