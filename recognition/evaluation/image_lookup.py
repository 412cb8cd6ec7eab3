"""Where the images of a list lie, under names that another file system may have spelled otherwise."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from recognition.images import SUFFIXES

PROBED = 20
"""Pairs whose images are looked for to tell which folder is meant."""


class ImageLookup:
    """A folder of images; what is found in it is remembered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[Path, dict[str, str]] = {}
        self._stems: dict[Path, dict[str, list[str]]] = {}

    def find(self, names: Sequence[str]) -> Path | None:
        """The file of the first of `names` that is there.

        A name is a path in the folder, or an absolute one. Where no file has that very name, one is taken whose name
        differs in the normal form of Unicode, in being Latin-1 instead of UTF-8, in Windows' separators, or in the
        image's suffix, which a name may also lack.
        """
        for name in names:
            for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
                found = self._find(spelling)
                if found is not None:
                    return found
        return None

    def _find(self, name: str) -> Path | None:
        exact = self.root / name
        if _is_file(exact):
            return exact
        folder = Path(Path(name).anchor) if Path(name).is_absolute() else self.root
        *parents, last = exact.relative_to(folder).parts or ("",)
        for part in parents:
            if not (folder / part).is_dir():
                part = self._listing(folder).get(spelled(part), part)
            folder = folder / part
        stem, suffix = split(last)
        found = self._listing(folder) and self._stems[folder].get(spelled(stem), [])
        # Of several, one with the suffix asked for, else the first in the order of SUFFIXES.
        best = sorted(found or [], key=lambda file: split(file)[1] != suffix)
        return folder / best[0] if best else None

    def _listing(self, folder: Path) -> dict[str, str]:
        """All names in a folder by their common spelling; `_stems` has the images' names without a suffix."""
        if folder not in self._names:
            try:
                names = sorted((item.name for item in folder.iterdir()), key=lambda name: (_rank(name), name))
            except OSError:
                names = []
            self._names[folder] = {spelled(name): name for name in reversed(names)}
            stems = self._stems[folder] = {}
            for name in names:
                stem, suffix = split(name)
                if suffix and _is_file(folder / name):
                    stems.setdefault(spelled(stem), []).append(name)
        return self._names[folder]


def find_folder(beside: Path, pairs: Iterable[Sequence[Sequence[str]]]) -> ImageLookup | None:
    """Of the folder `beside` and the folders in it, the first with the most images of the first pairs.

    None where no folder has one of them.
    """
    wanted = [names for pair, _ in zip(pairs, range(PROBED), strict=False) for names in pair]
    try:
        folders = [beside, *sorted(item for item in beside.iterdir() if item.is_dir())]
    except OSError:
        folders = [beside]
    best, most = None, 0
    for folder in folders:
        places = ImageLookup(folder)
        found = sum(places.find(names) is not None for names in wanted)
        if found > most:
            best, most = places, found
        if most == len(wanted):
            break
    return best


def is_respelled(file: Path, names: Sequence[str]) -> bool:
    """Whether `file`, found for `names`, has a name that none of them ends in, but for a suffix that they lack."""
    return not any(name in (file.name, split(file.name)[0]) for name in (Path(name).name for name in names))


def spelled(name: str) -> str:
    """The common spelling of a name: composed, and Latin-1 where its bytes are not UTF-8."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return unicodedata.normalize("NFC", text)


def split(name: str) -> tuple[str, str]:
    """A file's name without the suffix of an image, and that suffix in lower case; no other suffix is one."""
    stem, dot, suffix = name.rpartition(".")
    suffix = (dot + suffix).lower()
    return (stem, suffix) if stem and suffix in SUFFIXES else (name, "")


def _rank(name: str) -> int:
    suffix = split(name)[1]
    return SUFFIXES.index(suffix) if suffix else len(SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False
