"""A saved index: a folder of .npy files and name lists, memory-mapped when opened, and a JSON file of facts.

It is written under a name of its own and renamed, so that a reader sees all of it or nothing, and of two processes
that build it at once the last one's stays.
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
"""Where indexes lie beside the data."""
RANGE = np.dtype([("file", "<u4"), ("offset", "<u8"), ("length", "<u4")])
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, EOFError)
"""What `load` raises."""

_ARRAYS = {"starts": np.dtype("<i8"), "ranges": RANGE, "labels": np.dtype("<i8"), "sizes": np.dtype("<i8")}
_NAMES = ("files", "identities")


@dataclass(frozen=True)
class IndexContent:
    """What an index holds: N samples of C identities in R >= N byte ranges of F files.

    starts: int64 [N+1], first range of each sample. ranges: RANGE [R]. labels: int64 [N] in 0..C-1. sizes: int64 [F],
    bytes. files: F names below the roots. identities: C names. stamp: changes when the data files do. roots:
    (folder, number of its first file), absolute; none where the index belongs to the one folder it was made from.
    notes: what the user should know of the data, a sentence each.
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
        """SHA-256 over file names and sizes, ranges and labels."""
        return digest(self.files.text, self.files.ends, self.sizes, self.ranges, self.starts, self.labels)


def digest(*parts: bytes | np.ndarray) -> str:
    """SHA-256 over the parts, each with its length."""
    sha = hashlib.sha256()
    for part in parts:
        data = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else np.ascontiguousarray(part)
        sha.update(data.nbytes.to_bytes(8, "little"))
        sha.update(data.view(np.uint8).data)
    return sha.hexdigest()


def save(folder: Path, content: IndexContent) -> None:
    """Put `content` in the place of what is at `folder`. Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    # Without the folder's own name, which may be as long as names can be.
    new, old = (folder.with_name(f".{token}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        for name in _ARRAYS:
            _write(new / f"{name}.npy", getattr(content, name))
        for name in _NAMES:
            names: PackedNames = getattr(content, name)
            _write(new / f"{name}.npy", names.ends)
            _write(new / f"{name}.txt", bytes(names.text))
        facts = {
            "format": FORMAT,
            "images": len(content.labels),
            "identities": len(content.identities),
            "fingerprint": content.compute_fingerprint(),
            "stamp": content.stamp,
            "roots": [[str(root), first] for root, first in content.roots],
            "notes": content.notes,
        }
        _write(new / METADATA_FILE, (json.dumps(facts, indent=1) + "\n").encode())
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
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it away just now
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> IndexContent:
    """Open what `save` wrote, memory-mapped. Raises one of DAMAGE where it is not whole."""
    deadline = time.monotonic() + _REPLACED_WITHIN_SECONDS
    while True:
        try:
            facts = _facts(folder)
            content = _read(folder, facts)
            if facts == _facts(folder):
                return content
        except FileNotFoundError:
            if time.monotonic() > deadline:  # before it, another process may just be replacing the folder
                raise
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "keeps changing", str(folder))
        time.sleep(0.02)


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / METADATA_FILE).read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, not {FORMAT}")
    return facts


def _read(folder: Path, facts: dict[str, Any]) -> IndexContent:
    arrays = {name: _map(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
    files, identities = (
        PackedNames(
            np.asarray(np.memmap(folder / f"{name}.txt", np.uint8, "r")), _map(folder / f"{name}.npy", np.dtype("<i8"))
        )
        for name in _NAMES
    )
    starts, ranges, labels, sizes = (arrays[name] for name in _ARRAYS)
    lengths = {
        "starts": (len(starts), facts["images"] + 1),
        "labels": (len(labels), facts["images"]),
        "ranges": (len(ranges), int(starts[-1])),
        "identities": (len(identities), facts["identities"]),
        "sizes": (len(sizes), len(files)),
        "files.txt": (len(files.text), int(files.ends[-1])),
        "identities.txt": (len(identities.text), int(identities.ends[-1])),
    }
    for name, (found, expected) in lengths.items():
        if found != expected:
            raise ValueError(f"{name} has length {found}, not {expected}")
    roots = tuple((Path(root), int(first)) for root, first in facts["roots"])
    notes = tuple(map(str, facts.get("notes", ())))  # which earlier versions did not write
    return IndexContent(
        starts, ranges, labels, sizes, files, identities, facts["stamp"], roots, facts["fingerprint"], notes
    )


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy lets the errors of Python's own parser through, which reads its headers
        raise ValueError(f"{path.name}: {error}") from None
    if array.dtype != dtype or array.ndim != 1 or not len(array):
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}")
    return np.asarray(array)
