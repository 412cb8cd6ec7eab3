"""Image files in one folder per identity, found without decoding them; what is not taken is counted.

A file is an image by its suffix; one without a suffix is by its first bytes.
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

from recognition.data.files import Names
from recognition.data.index_store import INDEX_FOLDER
from recognition.errors import UserError
from recognition.files.paths import shown
from recognition.images import SUFFIXES
from recognition.tracking.progress import working

_FIRST_BYTES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|BM....\0\0\0\0|RIFF....WEBP|II\*\0|MM\0\*|P[1-6]\s"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    re.DOTALL,
)
_LOOKED_INTO = 1000
_KINDS_NAMED = 8
_SUFFIX_SHOWN = 16
_FILES_BETWEEN_SIGNS = 1000

_HIDDEN = "hidden file or folder", "hidden files or folders"
_LEADS_NOWHERE = "link that leads nowhere", "links that lead nowhere"
_NO_FILE = "thing that is neither file nor folder", "things that are neither files nor folders"
_NO_IMAGE = "file without a suffix that is no image", "files without a suffix that are no images"
_LOOSE = "image outside the folders", "images outside the folders"
_EMPTY = "folder without an image", "folders without an image"
_GONE = "file that went away", "files that went away"


@dataclass(frozen=True)
class Listing:
    """F image files: their paths from the folder, sizes in bytes, modification times in ns and labels, int64 [F] each.

    identities: names of the identity folders; label `i` means the i-th. notes: what the user should know of what was
    not taken or may be a mistake, a sentence each.
    """

    names: Names
    sizes: np.ndarray
    mtimes: np.ndarray
    labels: np.ndarray
    identities: Names
    notes: tuple[str, ...]


def scan(folder: Path) -> Listing:
    """The images one level below `folder`, ordered by name; what begins with a dot is not taken.

    Folders without images are no identities. Raises UserError where there are no identity folders, or no images in
    them.
    """
    passed = _Passed()
    people: list[os.DirEntry[str]] = []
    loose = 0
    for entry in _entries(folder, passed):
        if _kind(entry) == "folder":
            people.append(entry)
        elif _is_image(entry, passed):
            loose += 1
            passed.add(_LOOSE, entry.name)
    if not people:
        raise UserError(_no_folders(folder, loose))
    text = bytearray()
    ends, sizes, mtimes, labels = array("q"), array("q"), array("q"), array("q")
    identities: list[str] = []
    deeper = _Deeper(folder)
    with working("indexing", total=len(people), unit="folders") as advance:
        for done, person in enumerate(people):
            before = len(ends)
            for entry in _entries(Path(person.path), passed, below := f"{person.name}/"):
                where = below + entry.name
                if _kind(entry) == "folder":
                    deeper.look_into(where)
                elif _is_image(entry, passed, below):
                    try:
                        facts = entry.stat()
                    except OSError:
                        passed.add(_GONE, where)
                        continue
                    text += os.fsencode(where + "\n")
                    ends.append(len(text))
                    sizes.append(facts.st_size)
                    mtimes.append(facts.st_mtime_ns)
                    labels.append(len(identities))
                    if len(ends) % _FILES_BETWEEN_SIGNS == 0:
                        advance(done)
            if len(ends) > before:
                identities.append(person.name)
            else:
                passed.add(_EMPTY, person.name)
            advance(done + 1)
    if not identities:
        raise UserError(_no_images(folder, len(people), passed))
    notes = passed.notes() + deeper.notes() + _doubled(folder, people) + _alike(identities)
    columns = (np.frombuffer(column, np.int64) for column in (ends, sizes, mtimes, labels))
    end_column, size_column, mtime_column, label_column = columns
    names = Names(bytes(text), end_column)
    return Listing(names, size_column, mtime_column, label_column, Names.of(identities), notes)


class _Passed:
    """What is not taken: how many of each kind, and the first of each."""

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


class _Deeper:
    """Folders inside the identity folders, whose images are not taken."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folders = self._with_images = self._images = 0
        self._first = ""

    def look_into(self, where: str) -> None:
        self._folders += 1
        if self._folders > _LOOKED_INTO:
            return
        try:
            images = sum(_is_image(entry) for entry in _entries(self._folder / where))
        except UserError:
            return
        if images:
            self._images += images
            self._with_images += 1
            self._first = self._first or where

    def notes(self) -> tuple[str, ...]:
        if not self._with_images:
            return ()
        least = "at least " if self._folders > _LOOKED_INTO else ""
        return (
            f"not taken: {least}{self._images:,} images that lie a level deeper, in {self._with_images:,} folders "
            f"inside the identity folders ({shown(self._first)}): move them up into the identity's own folder",
        )


def _entries(folder: Path, passed: _Passed | None = None, below: str = "") -> Iterator[os.DirEntry[str]]:
    """What is in a folder, ordered by name, but for hidden things."""
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{shown(folder)}: {error.strerror}: make it readable, or move it out of the set") from None
    for entry in listed:
        if not entry.name.startswith("."):
            yield entry
        elif passed is not None and entry.name != INDEX_FOLDER:
            passed.add(_HIDDEN, below + entry.name)


def _kind(entry: os.DirEntry[str]) -> str:
    """Of what an entry is or its link leads to: "folder", "file" or "other", or "nowhere" for a broken link."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # links that lead to one another, or into a folder that may not be entered
        pass
    return "nowhere" if entry.is_symlink() else "other"


def _is_image(entry: os.DirEntry[str], passed: _Passed | None = None, below: str = "") -> bool:
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
    if passed is not None and kind != "folder":
        passed.add(reason, below + entry.name)
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


def _no_images(folder: Path, people: int, passed: _Passed) -> str:
    found = _first_image(folder)
    if found is None:
        return f"{shown(folder)}: no images ({', '.join(SUFFIXES)}) in its {people} folders; not taken: {passed}"
    above = shown(found.parent.parent)
    return (
        f"{shown(folder)}: its {people} folders hold no images themselves; the first one lies deeper, {shown(found)}. "
        f"Give the folder that holds the identity folders, data.path={above}; several of them are joined by "
        "`recognition index merge OUT FOLDER FOLDER ...` and data.path=OUT"
    )


def _first_image(folder: Path) -> Path | None:
    """The first image at any depth, looked for in a limited number of folders."""
    for number, (place, folders, files) in enumerate(os.walk(folder, followlinks=True)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        if images:
            return Path(place, min(images))
        if number > _LOOKED_INTO:
            break
    return None


def _doubled(folder: Path, people: Sequence[os.DirEntry[str]]) -> tuple[str, ...]:
    """Links to a folder that is another identity's already: one person then counts as two."""
    links = {entry.name: entry.stat() for entry in people if entry.is_symlink()}
    if not links:
        return ()
    targets = Counter((facts.st_dev, facts.st_ino) for facts in links.values())
    here = folder.stat().st_dev
    targets.update((here, entry.inode()) for entry in people if (here, entry.inode()) in targets)
    twice = [name for name, facts in links.items() if targets[facts.st_dev, facts.st_ino] > 1]
    if not twice:
        return ()
    return (
        f"{len(twice):,} of the identity folders are links to a folder that is another identity's too "
        f"({_examples(twice)}): the same person then counts as two; remove the link",
    )


def _alike(identities: Sequence[str]) -> tuple[str, ...]:
    """Identities whose names differ by case or by Unicode's normal form alone, as copies between systems leave them."""
    keys = np.fromiter((hash(_plain(name)) for name in identities), np.int64, len(identities))
    order = np.argsort(keys, kind="stable")
    again = order[1:][keys[order[1:]] == keys[order[:-1]]]
    if not len(again):
        return ()
    return (
        f"{len(again):,} identities have the name of another but for upper and lower case or the Unicode form of "
        f"accents ({_examples([identities[row] for row in np.sort(again)])}): they are taken for other people; put the "
        "images of one person into one folder",
    )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _examples(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:3])) + ", ..." * (len(names) > 3)
