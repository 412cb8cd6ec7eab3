"""Image files in one folder per identity, found without opening them."""

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recognition.config import UserError
from recognition.data.files import Names

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Of image files, in any case."""


@dataclass(frozen=True)
class Listing:
    """F image files: their paths from the folder, sizes in bytes, modification times in ns and labels, int64 [F] each.

    identities: names of the identity folders; label `i` means the i-th.
    """

    names: Names
    sizes: np.ndarray
    mtimes: np.ndarray
    labels: np.ndarray
    identities: Names


def scan(folder: Path, progress: Callable[[int, int], None] | None = None) -> Listing:
    """The images one level below `folder`, ordered by name; what begins with a dot is skipped.

    Folders without images are no identities. `progress` is called with identity folders done and in all. Raises
    UserError where there are no identity folders, or no images in them.
    """
    people = [entry.name for entry in _entries(folder) if entry.is_dir()]
    if not people:
        loose = any(_is_image(entry) for entry in _entries(folder))
        raise UserError(
            f"{folder}: holds images but no folder per identity: move each person's images into a folder of their own"
            if loose
            else f"{folder}: holds neither train.rec nor a folder per identity"
        )
    text = bytearray()
    ends, sizes, mtimes, labels = array("q"), array("q"), array("q"), array("q")
    identities: list[str] = []
    for done, person in enumerate(people, 1):
        before = len(ends)
        for entry in _entries(folder / person):
            if _is_image(entry):
                facts = entry.stat()
                text += os.fsencode(f"{person}/{entry.name}\n")
                ends.append(len(text))
                sizes.append(facts.st_size)
                mtimes.append(facts.st_mtime_ns)
                labels.append(len(identities))
        if len(ends) > before:
            identities.append(person)
        if progress:
            progress(done, len(people))
    if not identities:
        raise UserError(f"{folder}: no images ({', '.join(SUFFIXES)}) in its {len(people)} folders")
    columns = (np.frombuffer(column, np.int64) for column in (ends, sizes, mtimes, labels))
    end_column, size_column, mtime_column, label_column = columns
    return Listing(Names(bytes(text), end_column), size_column, mtime_column, label_column, Names.of(identities))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    yield from sorted(visible, key=lambda entry: entry.name)


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()
