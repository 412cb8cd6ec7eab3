"""A run's output folder: the places of its files, and the backbone that it holds."""

import contextlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from torch import Tensor

from recognition import config as configuration
from recognition.config import Config, toml
from recognition.config.renamed import to_current
from recognition.errors import UserError
from recognition.files.atomic import write_text
from recognition.models.backbone import Backbone, build_backbone
from recognition.runs.best import BEST, find_best, read_best
from recognition.runs.checkpoint import read_manifest
from recognition.runs.starting_point import newest_checkpoint

log = logging.getLogger(__name__)

_FILES_OF_A_RUN = (
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
        """Every setting of the run, also those that were not given; `auto` stays `auto`."""
        return self.path / "config.toml"

    @property
    def checkpoints(self) -> Path:
        """The folder with a folder for each checkpoint."""
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
        """The backbone with the best verification so far."""
        return self.path / BEST

    @property
    def results(self) -> Path:
        """The final verification: `step`, and the results of each set."""
        return self.path / "results.json"

    @property
    def failure(self) -> Path:
        """The steps at which the last attempt began and ended, and the reason, if it failed."""
        return self.path / "failure.json"

    def create(self) -> None:
        """Make the folder. Raises UserError where that cannot be done."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.folder: cannot write to {self.path}: {error.strerror}") from None

    def move_earlier_files(self) -> Path | None:
        """Move the files of an earlier attempt into a folder `earlier-N` and return it; None if there are none.

        For a run that begins anew: the checkpoints that are left can only be damaged ones.
        """
        left = [path for pattern in _FILES_OF_A_RUN for path in sorted(self.path.glob(pattern))]
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
        """Read the results of each set after the last step, `step`; empty where there are none of that step."""
        found = _read_json(self.results)
        verification = found.get("verification")
        return verification if found.get("step") == step and isinstance(verification, dict) else {}

    def save_final_verification(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        """Write the results of each set, for `final_verification`."""
        write_text(self.results, json.dumps({"step": step, "verification": results}, indent=2) + "\n")

    def has_model_of(self, step: int) -> bool:
        """Tell whether the deployable is there, and is that of `step`."""
        return self.model.exists() and _read_json(self.model.with_suffix(".json")).get("step") == step

    def note_failure(self, begun: int, step: int, reason: str) -> str:
        """Record that an attempt from step `begun` failed at `step`; return a hint if the one before began there too.

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
        """Write the settings. Call it only after all checks of the run and its folder have passed."""
        write_text(self.config, config.to_toml())

    def read_config(self) -> Config:
        """Read the settings, which may have been written under earlier names. Raises ConfigError."""
        try:
            written = toml.read(self.config)
        except ValueError as error:
            raise configuration.ConfigError(str(error)) from None
        current = to_current(written)
        if current == written:
            return configuration.load(self.config, check_paths=False)
        try:
            return Config.model_validate_json(json.dumps(current, default=str), context={"check_paths": False})
        except ValidationError as error:
            mistakes = [line for item in error.errors() for line in toml.explain(item, Config).splitlines()]
            raise configuration.ConfigError("\n  ".join([f"{self.config}, by today's names:", *mistakes])) from None


def load_backbone(run: Path, which: Literal["last", "best"] = "last") -> tuple[Backbone, dict[str, Any]]:
    """Load the trained backbone of the run in folder `run`, on the CPU in eval mode, with the run's metadata.

    `last` is the newest checkpoint that is not damaged, `best` the one with the best verification during training.
    Needs neither the data nor a process group. Raises UserError where there is none, with the way out.
    """
    folder = RunFolder(Path(run))
    if not folder.config.exists():
        inside = next((f"; give {above}" for above in folder.path.parents if (above / "config.toml").exists()), "")
        raise UserError(f"{run} is not a run folder: it has no config.toml{inside}")
    settings = folder.read_config()
    backbone = build_backbone(settings.backbone.model_copy(update={"weights": None}), settings.run.seed)
    origin, state, metadata = read_best(folder.path) if which == "best" else _read_last(folder)
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{origin} is not of the backbone that {folder.config} describes ({settings.backbone.name}), but left from "
            f"an earlier attempt: remove it, or take the other of --which last and --which best\n{error}"
        ) from None
    return backbone.eval(), metadata | {"backbone": settings.backbone.name, "loss": settings.head.loss.name}


def _read_last(folder: RunFolder) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read the newest checkpoint that is not damaged: its folder, its backbone's state dict and its metadata."""
    found = newest_checkpoint(folder.checkpoints)
    if found is None:
        best = find_best(folder.path)
        hint = f"; --which best takes its {best.name}" if best else ": the run has saved none yet"
        raise UserError(f"{folder.checkpoints} holds no complete checkpoint{hint}")
    checkpoint, state = found
    metadata = read_manifest(checkpoint).metadata
    return checkpoint, state, {name: value for name, value in metadata.items() if name not in ("config", "loss_scale")}


def _read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
