"""The metadata of a run, which its checkpoints record, and the check that a run goes on as it began."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recognition.config import Config
from recognition.errors import UserError

FREE_TO_CHANGE = (
    "run.folder",
    "data.path",
    "data.index_folder",
    "data.loader",
    "data.threads",
    "data.prefetch",
    "faces",
    "backbone.weights",
    "backbone.precision",
    "backbone.compile",
    "backbone.channels_last",
    "head.precision",
    "head.chunk",
    "head.workspace_mib",
    "training.more_epochs",
    "training.threads",
    "training.initial_loss_scale",
    "training.loss_scale_growth_steps",
    "training.max_nonfinite_steps",
    "evaluation",
    "checkpoint",
    "tracking",
    "distributed",
    "export",
)
"""Settings and sections that a continuation may change: none changes what a step computes, up to rounding."""


@dataclass(frozen=True)
class RunMetadata:
    """Everything about a run that its checkpoints record besides tensors and step."""

    config: Config
    """The settings as the user gave them, with every `auto`."""
    resolved: dict[str, Any]
    """Values of the settings that are `auto`, and the device."""
    schedule_offset: int
    """Step at which the learning rate's schedule starts."""
    fingerprint: str
    """SHA-256 of the index."""
    images: int
    identities: int

    def to_json(self, step: int) -> dict[str, Any]:
        """Return the metadata of the checkpoint after `step` updates, as JSON values."""
        return {
            "step": step,
            "config": json.loads(self.config.model_dump_json()),
            "resolved": self.resolved,
            "schedule_offset": self.schedule_offset,
            "fingerprint": self.fingerprint,
            "images": self.images,
            "identities": self.identities,
        }

    def card(self, step: int) -> dict[str, Any]:
        """Return the run's entries for the card of an exported model, as JSON values."""
        found = {name: value for name, value in self.to_json(step).items() if name not in ("config", "schedule_offset")}
        return found | {"backbone": self.config.backbone.name, "loss": self.config.head.loss.name}


def recorded_precisions(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the precisions of a checkpoint; older ones have them only in their settings, unless these say `auto`."""
    if "resolved" in metadata or not metadata:
        return metadata.get("resolved", {})
    asked = {f"{name}.precision": metadata["config"][name].get("precision") for name in ("backbone", "head")}
    return {name: precision for name, precision in asked.items() if precision != "auto"}


def check_resumable(run: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Compare the metadata of a checkpoint in the folder `run` with that of the run that would continue it.

    Raises UserError naming every setting whose change would make another run of it, and the ways to go on.
    """
    mistakes = []
    ways = ["Set them back", f"start another run with run.folder=... and backbone.weights={run}"]
    if old["fingerprint"] != new["fingerprint"]:
        mistakes.append(
            f"data.path: the run began on {old['images']} images of {old['identities']} identities "
            f"({old['fingerprint'][:12]}), this index has {new['images']} of {new['identities']} "
            f"({new['fingerprint'][:12]})"
        )
    before, after = dict(_leaves(_with_defaults(old["config"]))), dict(_leaves(new["config"]))
    for name in sorted(before.keys() | after.keys()):
        free = any(name == field or name.startswith(field + ".") for field in FREE_TO_CHANGE)
        if free or before.get(name) == after.get(name):
            continue
        if name == "training.epochs" and after[name] > before[name]:
            if after["training.more_epochs"] != "refuse":
                continue
            ways.append("train on for more epochs with training.more_epochs=stretch or training.more_epochs=restart")
        mistakes.append(f"{name}: was {json.dumps(before.get(name))}, is {json.dumps(after.get(name))}")
    if mistakes:
        raise UserError(
            f"{run} holds a run that these settings would not continue:\n"
            + "\n".join(f"  {mistake}" for mistake in mistakes)
            + f"\n{'; or '.join(ways)}"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of settings that a checkpoint is older than; return it as it is where it is no longer valid."""
    try:
        tree = Config.model_validate_json(json.dumps(settings)).model_dump_json()
    except ValidationError:
        return settings
    whole: dict[str, Any] = json.loads(tree)
    return whole


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value
