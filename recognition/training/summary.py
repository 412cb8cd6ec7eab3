"""What a run says of itself before its first step and after its last one."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from recognition.config import Config
from recognition.data.index import Index
from recognition.hardware import Resolved
from recognition.runs.folder import RunFolder
from recognition.tracking.tracker import Tracker


def opening(
    config: Config, resolved: Resolved, index: Index, tracker: Tracker, world: int, backbone: Sequence[str]
) -> list[str]:
    """Lines about the run that is going to begin: its data, its machine, its `backbone`, its length."""
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
    """Lines about the run in `folder` that has just taken its last step: what came out of it, and how to go on.

    `accuracies`: final ones, by set. `nonfinite`: steps that were called off.
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
    best = folder.best.with_suffix(".json")
    if accuracies and best.is_file():
        record = json.loads(best.read_text())
        mean = "mean " if len(accuracies) > 1 else ""
        found += [f"best {mean}accuracy: {record['accuracy']:.2%} at step {record['step']:,}", f"  {folder.best}"]
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
        f"  recognition evaluate --model {run} --pairs {sets}",
        "go on: the same command, and",
        f"  training.epochs={2 * config.training.epochs:g} training.extend=stretch",
        "curves:",
        f"  tensorboard --logdir {run}",
    ]


def _quarantined(path: Path) -> int:
    """Samples that a quarantine lists; ranks and continued runs may list one more than once."""
    if not path.is_file():
        return 0
    samples = set()
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            samples.add(json.loads(line)["sample"])
        except (ValueError, KeyError, TypeError):
            continue
    return len(samples)
