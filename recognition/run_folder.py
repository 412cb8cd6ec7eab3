"""A run's output folder: what lies where, whether it may be resumed, and the backbone that it holds."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from recognition import config as configuration
from recognition.checkpoint import Checkpoints, read_tensors
from recognition.config import Config, UserError
from recognition.kinds import what_is
from recognition.models.backbone import Backbone, build_backbone
from recognition.storage import replacing, write_text

FREE_TO_CHANGE = (
    "run.folder",
    "data.path",
    "data.cache",
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
    "training.threads",
    "training.loss_scale",
    "training.loss_scale_growth_steps",
    "training.max_nonfinite_steps",
    "evaluation",
    "checkpoint",
    "tracking",
    "distributed",
    "export",
)
"""What may differ between a run and its continuation: none of it changes what a step computes, up to rounding."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """The samples that could not be decoded, one JSON object a line."""
        return self.path / "quarantine.jsonl"

    @property
    def model(self) -> Path:
        """The deployable; its card lies beside it as `model.json`."""
        return self.path / "model.onnx"

    @property
    def best(self) -> Path:
        """State dict of the backbone with the best verification so far; `best.json` says where it is from."""
        return self.path / "best.pt"

    def create(self) -> None:
        """Make the folder. Raises UserError where that cannot be done."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder: cannot write to {self.path}: {error.strerror}") from None

    def keep_config(self, config: Config) -> None:
        """Write the resolved configuration, once nothing speaks against this run in this folder."""
        write_text(self.config, config.to_toml())

    def refuse_if_changed(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Compare the facts of a checkpoint with those of the run that would continue it.

        Raises UserError naming every field whose change would make another run of it.
        """
        mistakes = []
        if old["fingerprint"] != new["fingerprint"]:
            mistakes.append(
                f"data.path: the run began on {old['images']} images of {old['identities']} identities "
                f"({old['fingerprint'][:12]}), this index has {new['images']} of {new['identities']} "
                f"({new['fingerprint'][:12]})"
            )
        before, after = dict(_leaves(old["config"])), dict(_leaves(new["config"]))
        for name in sorted(before.keys() | after.keys()):
            free = any(name == field or name.startswith(field + ".") for field in FREE_TO_CHANGE)
            if not free and before.get(name) != after.get(name):
                mistakes.append(f"{name}: was {json.dumps(before.get(name))}, is {json.dumps(after.get(name))}")
        if mistakes:
            raise UserError(
                f"{self.path} holds a run that these settings would not continue:\n"
                + "\n".join(f"  {mistake}" for mistake in mistakes)
                + "\nSet them back, or start another run with run.folder=... (backbone.weights takes its best.pt)"
            )

    def best_accuracy(self) -> float:
        """Accuracy of the best backbone so far; 0 where there is none."""
        record = self.best.with_suffix(".json")
        return float(json.loads(record.read_text())["accuracy"]) if record.exists() and self.best.exists() else 0.0

    def keep_best(self, backbone: nn.Module, step: int, accuracy: float) -> None:
        """Keep the backbone's state dict if `accuracy`, the mean over the sets, beats the best so far."""
        if accuracy <= self.best_accuracy():
            return
        with replacing(self.best) as temporary:
            torch.save(backbone.state_dict(), temporary)
        write_text(self.best.with_suffix(".json"), json.dumps({"step": step, "accuracy": accuracy}) + "\n")


def load_backbone(run: Path, which: Literal["last", "best"] = "last") -> tuple[Backbone, dict[str, Any]]:
    """The trained backbone of the run in folder `run`, on the CPU in eval mode, with facts about it.

    `last` is the newest checkpoint that verifies, `best` the one with the best verification during training.
    Needs neither the data nor a process group. Raises UserError where there is none.
    """
    folder = RunFolder(Path(run))
    if not folder.config.exists():
        raise UserError(f"{run} is not a run folder: it has no config.toml")
    settings = configuration.load(folder.config, check_paths=False)
    backbone = build_backbone(settings.backbone.model_copy(update={"weights": None}), settings.run.seed)
    if which == "best":
        if not folder.best.exists():
            raise UserError(f"{run} has no best.pt: it is kept by the verifications of a run (evaluation.pairs)")
        try:
            state = torch.load(folder.best, map_location="cpu", weights_only=True)
            facts: dict[str, Any] = json.loads(folder.best.with_suffix(".json").read_bytes())
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            kinds = f"best.pt is {what_is(folder.best)}, best.json {what_is(folder.best.with_suffix('.json'))}"
            raise UserError(f"{folder.best} cannot be read ({kinds}): take the newest checkpoint instead") from error
    else:
        checkpoints = Checkpoints(folder.checkpoints, settings.checkpoint.keep)
        found = checkpoints.find()
        if found is None:
            raise UserError(f"{folder.checkpoints} holds no complete checkpoint")
        state = {name.removeprefix("backbone."): tensor for name, tensor in read_tensors(found, "backbone.").items()}
        facts = {
            name: value for name, value in checkpoints.facts(found).items() if name not in ("config", "loss_scale")
        }
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{run}: what it holds of its {which} backbone is not of the backbone that {folder.config} describes: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    return backbone.eval(), facts | {"backbone": settings.backbone.name, "loss": settings.head.loss.name}


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value
