"""Image files in one folder per identity, found without decoding them; files that are left out are counted.

The suffix decides whether a file is an image, and the first bytes if there is no suffix.
"""

import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from recognition.data.data_files import PackedNames
from recognition.data.index_store import INDEX_FOLDER
from recognition.errors import UserError
from recognition.files.paths import shown
from recognition.images import SUFFIXES
from recognition.tracking.progress import task

_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|BM....\0\0\0\0|RIFF....WEBP|II\*\0|MM\0\*|P[1-6]\s"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    re.DOTALL,
)
_MOST_SEARCHED = 1000
_KINDS_NAMED = 8
_SUFFIX_SHOWN = 16
_FILES_PER_UPDATE = 1000

_HIDDEN = "hidden file or folder", "hidden files or folders"
_LEADS_NOWHERE = "link that leads nowhere", "links that lead nowhere"
_NO_FILE = "thing that is neither file nor folder", "things that are neither files nor folders"
_NO_IMAGE = "file without a suffix that is no image", "files without a suffix that are no images"
_LOOSE = "image outside the folders", "images outside the folders"
_EMPTY = "folder without an image", "folders without an image"
_GONE = "file that went away", "files that went away"


@dataclass(frozen=True)
class Listing:
    """List of F image files.

    names: paths below the folder. sizes: int64 [F], bytes. mtimes: int64 [F], ns. labels: int64 [F]. identities: names
    of the identity folders; label `i` means the i-th. notes: sentences for the user on files that are left out and on
    possible mistakes.
    """

    names: PackedNames
    sizes: np.ndarray
    mtimes: np.ndarray
    labels: np.ndarray
    identities: PackedNames
    notes: tuple[str, ...]


def scan(folder: Path) -> Listing:
    """List the images one level below `folder`, ordered by name, without names that begin with a dot.

    Folders without images are no identities. Raises UserError if there are no identity folders, or no images in them.
    """
    skipped = _Skipped()
    people: list[os.DirEntry[str]] = []
    loose = 0
    for entry in _entries(folder, skipped):
        if _kind(entry) == "folder":
            people.append(entry)
        elif _is_image(entry, skipped):
            loose += 1
            skipped.add(_LOOSE, entry.name)
    if not people:
        raise UserError(_no_folders(folder, loose))
    text = bytearray()
    ends, sizes, mtimes, labels = array("q"), array("q"), array("q"), array("q")
    identities: list[str] = []
    nested = _NestedFolders(folder)
    with task("indexing", total=len(people), unit="folders") as advance:
        for done, person in enumerate(people):
            before = len(ends)
            for entry in _entries(Path(person.path), skipped, below := f"{person.name}/"):
                name = below + entry.name
                if _kind(entry) == "folder":
                    nested.count(name)
                elif _is_image(entry, skipped, below):
                    try:
                        status = entry.stat()
                    except OSError:
                        skipped.add(_GONE, name)
                        continue
                    text += os.fsencode(name + "\n")
                    ends.append(len(text))
                    sizes.append(status.st_size)
                    mtimes.append(status.st_mtime_ns)
                    labels.append(len(identities))
                    if len(ends) % _FILES_PER_UPDATE == 0:
                        advance(done)
            if len(ends) > before:
                identities.append(person.name)
            else:
                skipped.add(_EMPTY, person.name)
            advance(done + 1)
    if not identities:
        raise UserError(_no_images(folder, len(people), skipped))
    notes = skipped.notes() + nested.notes() + _note_shared_folders(folder, people) + _note_similar_names(identities)
    columns = (np.frombuffer(column, np.int64) for column in (ends, sizes, mtimes, labels))
    end_column, size_column, mtime_column, label_column = columns
    names = PackedNames(bytes(text), end_column)
    return Listing(names, size_column, mtime_column, label_column, PackedNames.of(identities), notes)


class _Skipped:
    """Counter of the files and folders that are left out, by kind, with the first name of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._first: dict[tuple[str, str], str] = {}

    def add(self, kind: tuple[str, str], name: str) -> None:
        self._counts[kind] += 1
        self._first.setdefault(kind, name)

    def __str__(self) -> str:
        kinds = self._counts.most_common(_KINDS_NAMED)
        texts = [f"{n:,} {kind[n != 1]} ({shown(self._first[kind])}{', ...' * (n > 1)})" for kind, n in kinds]
        others = self._counts.total() - sum(n for _, n in kinds)
        return ", ".join(texts) + (f", {others:,} others" if others else "")

    def notes(self) -> tuple[str, ...]:
        return (f"not taken: {self}",) if self._counts else ()


class _NestedFolders:
    """Counter of folders inside the identity folders, whose images are left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = self._with_images = self._images = 0
        self._first = ""

    def count(self, name: str) -> None:
        self._folders += 1
        if self._folders > _MOST_SEARCHED:
            return
        try:
            images = sum(_is_image(entry) for entry in _entries(self._folder / name))
        except UserError:
            return
        if images:
            self._images += images
            self._with_images += 1
            self._first = self._first or name

    def notes(self) -> tuple[str, ...]:
        if not self._with_images:
            return ()
        least = "at least " if self._folders > _MOST_SEARCHED else ""
        return (
            f"not taken: {least}{self._images:,} images that lie a level deeper, in {self._with_images:,} folders "
            f"inside the identity folders ({shown(self._first)}): move them up into the identity's own folder",
        )


def _entries(folder: Path, skipped: _Skipped | None = None, below: str = "") -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder, ordered by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{shown(folder)}: {error.strerror}: make it readable, or move it out of the set") from None
    for entry in listed:
        if not entry.name.startswith("."):
            yield entry
        elif skipped is not None and entry.name != INDEX_FOLDER:
            skipped.add(_HIDDEN, below + entry.name)


def _kind(entry: os.DirEntry[str]) -> str:
    """Classify an entry, or the target of its link: "folder", "file", "other", or "nowhere" for a broken link."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a circle of links, or a target in a folder without permission
        pass
    return "nowhere" if entry.is_symlink() else "other"


def _is_image(entry: os.DirEntry[str], skipped: _Skipped | None = None, below: str = "") -> bool:
    """Tell whether an entry is an image, and count it in `skipped` if it is not."""
    kind = _kind(entry)
    if kind == "file" and entry.name.lower().endswith(SUFFIXES):
        return True
    suffix = PurePath(entry.name).suffix
    if kind == "file":
        if suffix in ("", ".") and _begins_as_image(Path(entry.path)):
            return True
        known = shown(suffix[:_SUFFIX_SHOWN])
        reason = _NO_IMAGE if suffix in ("", ".") else (f"{known} file", f"{known} files")
    else:
        reason = _LEADS_NOWHERE if kind == "nowhere" else _NO_FILE
    if skipped is not None and kind != "folder":
        skipped.add(reason, below + entry.name)
    return False


def _begins_as_image(path: Path) -> bool:
    try:
        with path.open("rb", buffering=0) as file:
            return _FIRST_BYTES.match(file.read(16)) is not None
    except OSError:
        return False


def _no_folders(folder: Path, loose: int) -> str:
    if loose:
        return (
            f"{shown(folder)}: holds images but no folder per identity: move each person's images into a folder of "
            f"their own; if this is one person's, give the folder above, data.path={shown(folder.absolute().parent)}"
        )
    return f"{shown(folder)}: holds neither train.rec nor a folder per identity"


def _no_images(folder: Path, people: int, skipped: _Skipped) -> str:
    found = _first_image(folder)
    if found is None:
        return f"{shown(folder)}: no images ({', '.join(SUFFIXES)}) in its {people} folders; not taken: {skipped}"
    above = shown(found.parent.parent)
    return (
        f"{shown(folder)}: its {people} folders hold no images themselves; the first one lies deeper, {shown(found)}. "
        f"Give the folder that holds the identity folders, data.path={above}; several of them are joined by "
        "`recognition index merge OUT FOLDER FOLDER ...` and data.path=OUT"
    )


def _first_image(folder: Path) -> Path | None:
    """Return the first image at any depth, within a limited number of folders, or None."""
    for number, (place, folders, files) in enumerate(os.walk(folder, followlinks=True)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if images:
            return Path(place, min(images))
        if number > _MOST_SEARCHED:
            break
    return None


def _note_shared_folders(folder: Path, people: Sequence[os.DirEntry[str]]) -> tuple[str, ...]:
    """Return a note on links to the folder of another identity, through which one person counts as two."""
    links = {entry.name: entry.stat() for entry in people if entry.is_symlink()}
    if not links:
        return ()
    targets = Counter((status.st_dev, status.st_ino) for status in links.values())
    here = folder.stat().st_dev
    targets.update((here, entry.inode()) for entry in people if (here, entry.inode()) in targets)
    twice = [name for name, status in links.items() if targets[status.st_dev, status.st_ino] > 1]
    if not twice:
        return ()
    return (
        f"{len(twice):,} of the identity folders are links to a folder that is another identity's too "
        f"({_examples(twice)}): the same person then counts as two; remove the link",
    )


def _note_similar_names(identities: Sequence[str]) -> tuple[str, ...]:
    """Return a note on identities whose names differ only in case or Unicode's normal form, a trace of copying."""
    keys = np.fromiter((hash(_normalise(name)) for name in identities), np.int64, len(identities))
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if not len(again):
        return ()
    return (
        f"{len(again):,} identities have the name of another but for upper and lower case or the Unicode form of "
        f"accents ({_examples([identities[row] for row in np.sort(again)])}): they are taken for other people; put the "
        "images of one person into one folder",
    )


def _normalise(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _examples(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:3])) + ", ..." * (len(names) > 3)
