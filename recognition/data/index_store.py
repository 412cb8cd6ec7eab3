"""The file format of an index: a folder of .npy files and name lists, memory-mapped when loaded, and a JSON file.

The folder is written under a temporary name and renamed, so that a reader sees all of it or nothing. If two processes
write the same index at once, the last one wins.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recognition.data.data_files import PackedNames

FORMAT = 1
_REPLACED_WITHIN_SECONDS = 1.0
METADATA_FILE = "recognition-index.json"
INDEX_FOLDER = ".recognition-index"
"""Name of the folder beside the data that holds indexes."""
RANGE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("length", "<u4")])
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, EOFError)
"""Exceptions that `load` raises."""

_ARRAYS = {"starts": np.dtype("<i8"), "ranges": RANGE, "labels": np.dtype("<i8"), "sizes": np.dtype("<i8")}
_NAMES = ("files", "identities")


@dataclass(frozen=True)
class IndexContent:
    """Content of an index: N samples of C identities in R >= N byte ranges of F files.

    starts: int64 [N+1], first range of each sample. ranges: RANGE [R]. labels: int64 [N] in 0..C-1. sizes: int64 [F],
    bytes. files: F names below the roots. identities: C names. stamp: text that changes when the data files do. roots:
    (folder, number of its first file), absolute; empty if the index belongs to the one folder that it was made from.
    notes: sentences for the user about the data.
    """

    starts: np.ndarray
    ranges: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    files: PackedNames
    identities: PackedNames
    stamp: str
    roots: tuple[tuple[Path, int], ...] = ()
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def compute_fingerprint(self) -> str:
        """Compute the SHA-256 over file names and sizes, ranges and labels."""
        return digest(self.files.text, self.files.ends, self.sizes, self.ranges, self.starts, self.labels)


def digest(*parts: bytes | np.ndarray) -> str:
    """Compute the SHA-256 over the parts, each with its length in front."""
    sha = hashlib.sha256()
    for part in parts:
        data = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else np.ascontiguousarray(part)
        sha.update(data.nbytes.to_bytes(8, "little"))
        sha.update(data.view(np.uint8).data)
    return sha.hexdigest()


def save(folder: Path, content: IndexContent) -> None:
    """Write `content` to `folder`, replacing any index there. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    # Temporary names do not contain the folder's own, which may be as long as the file system allows.
    new, old = (folder.with_name(f".{token}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        for name in _ARRAYS:
            _write(new / f"{name}.npy", getattr(content, name))
        for name in _NAMES:
            names: PackedNames = getattr(content, name)
            _write(new / f"{name}.npy", names.ends)
            _write(new / f"{name}.txt", bytes(names.text))
        metadata = {
            "format": FORMAT,
            "images": len(content.labels),
            "identities": len(content.identities),
            "fingerprint": content.compute_fingerprint(),
            "stamp": content.stamp,
            "roots": [[str(root), first] for root, first in content.roots],
            "notes": content.notes,
        }
        _write(new / METADATA_FILE, (json.dumps(metadata, indent=1) + "\n").encode())
        _swap(new, folder, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(path: Path, value: bytes | np.ndarray) -> None:
    with path.open("wb") as file:
        if isinstance(value, bytes):
            file.write(value)
        else:
            np.save(file, value, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _swap(new: Path, folder: Path, old: Path) -> None:
    while True:
        try:
            new.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it in the meantime
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> IndexContent:
    """Load the index at `folder`, memory-mapped. Raises one of LOAD_ERRORS if it is missing or damaged."""
    deadline = time.monotonic() + _REPLACED_WITHIN_SECONDS
    while True:
        try:
            metadata = _metadata(folder)
            content = _read(folder, metadata)
            if metadata == _metadata(folder):
                return content
        except FileNotFoundError:
            if time.monotonic() > deadline:  # until then, another process may be replacing the folder
                raise
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "keeps changing", str(folder))
        time.sleep(0.02)


def _metadata(folder: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']}, not {FORMAT}")
    return metadata


def _read(folder: Path, metadata: dict[str, Any]) -> IndexContent:
    arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    files, identities = (
        PackedNames(
            np.asarray(np.memmap(folder / f"{name}.txt", np.uint8, "r")), _map(folder / f"{name}.npy", np.dtype("<i8"))
        )
        for name in _NAMES
    )
    starts, ranges, labels, sizes = (arrays[name] for name in _ARRAYS)
    lengths = {
        "starts": (len(starts), metadata["images"] + 1),
        "labels": (len(labels), metadata["images"]),
        "ranges": (len(ranges), int(starts[-1])),
        "identities": (len(identities), metadata["identities"]),
        "sizes": (len(sizes), len(files)),
        "files.txt": (len(files.text), int(files.ends[-1])),
        "identities.txt": (len(identities.text), int(identities.ends[-1])),
    }
    for name, (found, expected) in lengths.items():
        if found != expected:
            raise ValueError(f"{name} has length {found}, not {expected}")
    roots = tuple((Path(root), int(first)) for root, first in metadata["roots"])
    notes = tuple(map(str, metadata.get("notes", ())))  # absent in files of earlier versions
    return IndexContent(
        starts, ranges, labels, sizes, files, identities, metadata["stamp"], roots, metadata["fingerprint"], notes
    )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy parses headers with Python's parser, whose errors pass through
        raise ValueError(f"{path.name}: {error}") from None
    if array.dtype != dtype or array.ndim != 1 or not len(array):
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}")
    return np.asarray(array)
