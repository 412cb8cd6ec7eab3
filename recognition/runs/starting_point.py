"""The weights that a run starts from: those of another run, of one of its checkpoints, or of a file."""

import logging
from pathlib import Path

from torch import Tensor

from recognition import config
from recognition.errors import UserError
from recognition.models.backbone import Backbone
from recognition.models.weights import load_weights, read_weights
from recognition.runs.best import find_best
from recognition.runs.checkpoint import MANIFEST, CheckpointError, read_tensors, step_folders

_log = logging.getLogger(__name__)
_PREFIX = "backbone."


def start_from(backbone: Backbone, settings: config.Backbone, run: Path, *, goes_on: bool) -> list[str]:
    """Load the weights that `settings.weights` names into `backbone`; returns the messages about where it starts.

    `run` is the folder of the run that begins, which cannot be its own beginning; where it `goes_on` from a checkpoint
    of its own, nothing is loaded. Every rank calls it by itself. Raises UserError where the weights cannot be read or
    do not fit.
    """
    if goes_on:
        return (
            [] if settings.weights is None else [f"{settings.weights} is not read: the run goes on from a checkpoint"]
        )
    if settings.weights is None:
        _, _, tag = settings.name.partition(".")
        frozen = "frozen modules keep weights drawn at random: set backbone.weights" if settings.freeze else ""
        named = f"weights are drawn at random: {tag} says which of timm's files, and backbone.weights takes it"
        return [text for text in (frozen, named if tag else "") if text]
    path = settings.weights
    if path.resolve().is_relative_to(run.resolve()):
        raise UserError(
            f"backbone.weights: {path} is in the folder of the run that begins ({run}), which writes there; "
            "set another run.folder, or leave backbone.weights away"
        )
    if not path.is_dir():
        return load_weights(backbone, read_weights(path), path)
    found, state = _read_folder(path)
    return load_weights(backbone, state, found)


def newest_checkpoint(checkpoints: Path) -> tuple[Path, dict[str, Tensor]] | None:
    """Read the backbone of the newest checkpoint in a folder of checkpoints; returns both, None where there is none.

    Those that are damaged are passed over with a warning.
    """
    for checkpoint in step_folders(checkpoints):
        try:
            return checkpoint, _read(checkpoint)
        except (CheckpointError, OSError) as error:
            _log.warning("passed over: %s", error)
    return None


def _read_folder(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read the backbone in a run's folder, its folder of checkpoints or one of them; returns the checkpoint too."""
    if folder.name.endswith(".partial"):
        raise UserError(
            f"backbone.weights: {folder} is a checkpoint that is being written, or whose run has died; "
            f"give the run's folder, {folder.parent.parent}, whose newest complete one is taken"
        )
    if (folder / MANIFEST).exists() or list(folder.glob("*.distcp")):
        try:
            return folder, _read(folder)
        except (CheckpointError, OSError) as error:
            others = f"; give the run's folder, {folder.parent.parent}, whose newest complete one is taken"
            raise UserError(
                f"backbone.weights: {error}{others if len(step_folders(folder.parent)) > 1 else ''}"
            ) from None
    run = folder.parent if folder.name == "checkpoints" else folder
    if found := newest_checkpoint(run / "checkpoints"):
        return found
    if best := find_best(run):
        raise UserError(f"backbone.weights: {run} holds no complete checkpoint; give {best}")
    if (run / "checkpoints").is_dir():
        raise UserError(f"backbone.weights: {run} holds no complete checkpoint: its run has saved none yet")
    inside = sorted(path.name for path in folder.iterdir())
    raise UserError(
        f"backbone.weights: {folder} is neither a run's folder nor a checkpoint: it holds "
        f"{', '.join(inside[:5]) or 'nothing'}{' and more' if len(inside) > 5 else ''}"
    )


def _read(checkpoint: Path) -> dict[str, Tensor]:
    """Read the backbone of one checkpoint, under its own names."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(checkpoint, _PREFIX).items()}
