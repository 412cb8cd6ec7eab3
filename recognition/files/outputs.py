"""Checks of the paths that a program writes to, before its work begins."""

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from recognition.errors import UserError
from recognition.files.paths import expanded

_OF_A_RUN = {
    "config.toml": "its settings",
    "best.safetensors": "its best backbone",
    "best.pt": "its best backbone",
    "best.json": "its best backbone's accuracy",
    "metrics.jsonl": "its metrics",
    "log.txt": "its log",
    "quarantine.jsonl": "its samples that cannot be decoded",
}


def check_output(
    path: Path, *, kind: Literal["file", "folder"], inputs: Sequence[Path] = (), overwrite: bool = True
) -> Path:
    """Return `path`, with `~` for the home folder, where a file or a folder can be written.

    Raises UserError where it is of the other kind, one of the `inputs`, a run's own file, no regular file, exists
    without `overwrite`, or cannot be written.
    """
    path = expanded(path)
    try:
        _refuse(path, kind, [expanded(each) for each in inputs], overwrite)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another output") from None
    return path


def _refuse(path: Path, kind: str, inputs: Sequence[Path], overwrite: bool) -> None:
    for each in inputs:
        if _same(path, each):
            raise UserError(f"{path}: is an input, which the output would overwrite; choose another output")
    if kind == "file" and path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write, such as {path / 'output'}")
    if kind == "folder" and path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give the name of a folder to write to")
    if kind == "file" and path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a regular file; give the name of a file to write")
    owner = _run_that_owns(path)
    if owner is not None:
        run, what = owner
        raise UserError(f"{path}: belongs to the run in {run} ({what}); choose another output")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; remove it or choose another output")
    _try_to_write(path, kind)


def _same(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.absolute() == other.absolute()


def _run_that_owns(path: Path) -> tuple[Path, str] | None:
    """Return the run that a path belongs to, and what the path is in it; None where there is no such run."""
    path = path.parent.resolve() / path.name
    for folder in path.parents:
        if (folder / "config.toml").is_file() and (folder / "checkpoints").is_dir():
            first = path.relative_to(folder).parts[0]
            if first == "checkpoints":
                return folder, "its checkpoints"
            if path.parent == folder and (first in _OF_A_RUN or first.startswith("events.out.tfevents")):
                return folder, _OF_A_RUN.get(first, "its TensorBoard records")
            return None
    return None


def _try_to_write(path: Path, kind: str) -> None:
    """Make a file beside the output, or in the nearest folder that exists, and remove it. Raises OSError."""
    folder = path if kind == "folder" else path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder")
    if path.is_file() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "it is read-only")
    with tempfile.TemporaryFile(dir=folder):
        pass
    if len(os.fsencode(path.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
