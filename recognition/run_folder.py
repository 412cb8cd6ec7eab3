"""A run's output folder: what lies where, whether it may be resumed, and the backbone that it holds."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recognition import config as configuration
from recognition.checkpoint import read_manifest
from recognition.config import Config, UserError
from recognition.models.backbone import Backbone, build_backbone
from recognition.starting_point import newest
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
    Needs neither the data nor a process group. Raises UserError where there is none, with the way out.
    """
    folder = RunFolder(Path(run))
    if not folder.config.exists():
        inside = next((f"; give {above}" for above in folder.path.parents if (above / "config.toml").exists()), "")
        raise UserError(f"{run} is not a run folder: it has no config.toml{inside}")
    settings = configuration.load(folder.config, check_paths=False)
    backbone = build_backbone(settings.backbone.model_copy(update={"weights": None}), settings.run.seed)
    origin, state, facts = _best(folder) if which == "best" else _last(folder)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{origin} is not of the backbone that {folder.config} describes ({settings.backbone.name}), but left from "
            f"an earlier attempt: remove it, or take the other of --which last and --which best\n{error}"
        ) from None
    return backbone.eval(), facts | {"backbone": settings.backbone.name, "loss": settings.head.loss.name}


def _last(folder: RunFolder) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint that verifies, its backbone's state and its facts."""
    found = newest(folder.checkpoints)
    if found is None:
        hint = "; --which best takes its best.pt" if folder.best.exists() else ": the run has saved none yet"
        raise UserError(f"{folder.checkpoints} holds no complete checkpoint{hint}")
    checkpoint, state = found
    facts = read_manifest(checkpoint).facts
    return checkpoint, state, {name: value for name, value in facts.items() if name not in ("config", "loss_scale")}


def _best(folder: RunFolder) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The best verification's file, its state and its facts."""
    record = folder.best.with_suffix(".json")
    if not folder.best.exists() or not record.exists():
        lacks = folder.best.name if not folder.best.exists() else record.name
        raise UserError(
            f"{folder.path} has no {lacks}, which a run keeps that verifies (evaluation.pairs); "
            "--which last takes its newest checkpoint"
        )
    try:
        state = torch.load(folder.best, map_location="cpu", weights_only=True)
        return folder.best, state, dict(json.loads(record.read_text(encoding="utf-8")))
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise UserError(
            f"{folder.best} or {record.name} is damaged ({type(error).__name__}); "
            "--which last takes the newest checkpoint"
        ) from None


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value
