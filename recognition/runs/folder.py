"""A run's output folder: what lies where, whether it may be resumed, and the backbone that it holds."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from recognition import config as configuration
from recognition.runs.checkpoint import read_manifest
from recognition.config import Config
from recognition.errors import UserError
from recognition.models.backbone import Backbone, build_backbone
from recognition.runs.starting_point import newest
from recognition.files.atomic import replacing, write_text

log = logging.getLogger(__name__)

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
"""What may differ between a run and its continuation: none of it changes what a step computes, up to rounding."""
_OF_AN_ATTEMPT = (
    "best.*",
    "model.*",
    "results.json",
    "failure.json",
    "quarantine.jsonl",
    "metrics.jsonl",
    "log.txt",
    "events.out.tfevents.*",
    "config.toml",
    "checkpoints/latest",
    "checkpoints/step-*[0-9]",
)
"""The files that a run writes into its folder."""


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

    @property
    def results(self) -> Path:
        """The final verification: `step`, and the numbers of each set."""
        return self.path / "results.json"

    @property
    def failure(self) -> Path:
        """Where the last attempt began, and where and why it ended, if it failed."""
        return self.path / "failure.json"

    def create(self) -> None:
        """Make the folder. Raises UserError where that cannot be done."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder: cannot write to {self.path}: {error.strerror}") from None

    def set_aside(self) -> Path | None:
        """Move what an earlier attempt left into a folder `earlier-N`, which is returned; None if it left nothing.

        For a run that begins anew: the checkpoints that are left can only be damaged ones.
        """
        left = [path for pattern in _OF_AN_ATTEMPT for path in sorted(self.path.glob(pattern))]
        if not [path for path in left if path != self.config]:
            return None
        number = 1
        while (aside := self.path / f"earlier-{number}").exists():
            number += 1
        for path in left:
            place = aside / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        return aside

    def refuse_folders(self) -> None:
        """Raise UserError where a folder has the name of a file that the run is going to write."""
        for path in (self.best, self.model, self.results, self.quarantine, self.path / "metrics.jsonl"):
            if path.is_dir():
                raise UserError(f"{path} is a folder, but the run writes a file of that name: move it elsewhere")

    def warn_of_room(self, checkpoint: int, keep: int) -> None:
        """Warn where the disk has no room for `keep` checkpoints of so many bytes and the one that is being written."""
        there = len(list(self.checkpoints.glob("step-*")))
        needed = checkpoint * max(1, keep + 1 - there)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            log.warning(
                "%s: %.1f GB are free, but checkpoints of %.1f GB each need %.1f GB more: make room, lower "
                "checkpoint.keep (%d), or set run.folder to a larger disk",
                self.path,
                free / 1e9,
                checkpoint / 1e9,
                needed / 1e9,
                keep,
            )

    def final_verification(self, step: int) -> dict[str, dict[str, Any]]:
        """The numbers of each set after the last step, `step`, as far as they are known."""
        found = _read_json(self.results)
        verification = found.get("verification")
        return verification if found.get("step") == step and isinstance(verification, dict) else {}

    def keep_final_verification(self, step: int, numbers: dict[str, dict[str, Any]]) -> None:
        """Write what `final_verification` reads."""
        write_text(self.results, json.dumps({"step": step, "verification": numbers}, indent=2) + "\n")

    def has_model_of(self, step: int) -> bool:
        """Whether the deployable is there, and is that of `step`."""
        return self.model.exists() and _read_json(self.model.with_suffix(".json")).get("step") == step

    def note_failure(self, begun: int, step: int, reason: str) -> str:
        """Note that an attempt from step `begun` on ended at `step`; returns what to add if the one before did so too.

        Two attempts that began at the same step have got nowhere in between, and a third will not either.
        """
        before = _read_json(self.failure)
        with contextlib.suppress(OSError):
            write_text(self.failure, json.dumps({"from": begun, "step": step, "reason": reason}) + "\n")
        if before.get("from") != begun:
            return ""
        first_line = str(before.get("reason")).partition("\n")[0]
        return (
            f"\nThe attempt before began at step {begun} too and failed at step {before.get('step')}, so the same "
            f"command will not get further unless something is changed. It said: {first_line}"
        )

    def save_config(self, config: Config) -> None:
        """Write the resolved configuration, once nothing speaks against this run in this folder."""
        write_text(self.config, config.to_toml())

    def check_resumable(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Compare the facts of a checkpoint with those of the run that would continue it.

        Raises UserError naming every field whose change would make another run of it, and the ways to go on.
        """
        mistakes, ways = (
            [],
            ["Set them back", f"start another run with run.folder=... and backbone.weights={self.path}"],
        )
        if old["fingerprint"] != new["fingerprint"]:
            mistakes.append(
                f"data.path: the run began on {old['images']} images of {old['identities']} identities "
                f"({old['fingerprint'][:12]}), this index has {new['images']} of {new['identities']} "
                f"({new['fingerprint'][:12]})"
            )
        before, after = dict(_leaves(_whole(old["config"]))), dict(_leaves(new["config"]))
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
                f"{self.path} holds a run that these settings would not continue:\n"
                + "\n".join(f"  {mistake}" for mistake in mistakes)
                + f"\n{'; or '.join(ways)}"
            )


class Best:
    """The backbone with the best verification so far, in a run's folder: `best.pt`, and `best.json` beside it.

    One that the disk does not take is kept in memory and tried again, as a run is worth more than its file.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path, self.record = folder.best, folder.best.with_suffix(".json")
        self._waiting: tuple[dict[str, Tensor], dict[str, float]] | None = None

    def accuracy(self) -> float:
        """Accuracy of the best backbone so far; 0 where there is none."""
        if self._waiting is not None:
            return self._waiting[1]["accuracy"]
        return float(_read_json(self.record).get("accuracy", 0.0)) if self.path.exists() else 0.0

    def offer(self, backbone: nn.Module, step: int, accuracy: float) -> None:
        """Keep the backbone's state dict if `accuracy`, the mean over the sets, beats the best so far."""
        if accuracy > self.accuracy():
            state = {name: tensor.detach().cpu().clone() for name, tensor in backbone.state_dict().items()}
            self._waiting = state, {"step": step, "accuracy": accuracy}
        self.write()

    def write(self) -> None:
        """Write what waits to be written. A failure is warned of."""
        if self._waiting is None:
            return
        state, record = self._waiting
        try:
            with replacing(self.path) as temporary:
                torch.save(state, temporary)
            write_text(self.record, json.dumps(record) + "\n")
        # torch has RuntimeErrors of its own for a disk that is full.
        except (OSError, RuntimeError) as error:
            log.warning("%s cannot be written (%s): it is tried again at the next checkpoint", self.path, error)
        else:
            self._waiting = None


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


def _whole(settings: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, with the defaults of those that came later; as they are if they are no longer valid."""
    try:
        tree = Config.model_validate_json(json.dumps(settings)).model_dump_json()
    except ValidationError:
        return settings
    whole: dict[str, Any] = json.loads(tree)
    return whole


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value
