"""Search for the image files that a list names, whose names another file system may have changed."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from recognition.images import SUFFIXES

PROBED = 20
"""Number of pairs whose images decide which folder holds the set."""


class ImageLookup:
    """Search in a folder of images, with a cache of the folders' listings."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[Path, dict[str, str]] = {}
        self._stems: dict[Path, dict[str, list[str]]] = {}

    def find(self, names: Sequence[str]) -> Path | None:
        """Find the file of the first of `names` that exists, or None.

        A name is a path in the folder, or an absolute one. If no file has exactly that name, the search accepts
        another Unicode normal form, Latin-1 instead of UTF-8, Windows' separators, and another image suffix, or one
        that the name lacks.
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
                part = self._listing(folder).get(common_spelling(part), part)
            folder = folder / part
        stem, suffix = split_suffix(last)
        found = self._listing(folder) and self._stems[folder].get(common_spelling(stem), [])
        # Of several, one with the suffix asked for, else the first in the order of SUFFIXES.
        best = sorted(found or [], key=lambda file: split_suffix(file)[1] != suffix)
        return folder / best[0] if best else None

    def _listing(self, folder: Path) -> dict[str, str]:
        """Return the names in a folder by their common spelling; fills `_stems` with the images' names by stem, too."""
        if folder not in self._names:
            try:
                names = sorted((item.name for item in folder.iterdir()), key=lambda name: (_rank(name), name))
            except OSError:
                names = []
            self._names[folder] = {common_spelling(name): name for name in reversed(names)}
            stems = self._stems[folder] = {}
            for name in names:
                stem, suffix = split_suffix(name)
                if suffix and _is_file(folder / name):
                    stems.setdefault(common_spelling(stem), []).append(name)
        return self._names[folder]


def find_folder(beside: Path, pairs: Iterable[Sequence[Sequence[str]]]) -> ImageLookup | None:
    """Find the folder with the most images of the first pairs: `beside` or a folder in it, the first one of equals.

    Returns None if no folder has any of them.
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
    """Tell whether `file`, found for `names`, is spelled differently from all of them; a lacking suffix is none."""
    return not any(name in (file.name, split_suffix(file.name)[0]) for name in (Path(name).name for name in names))


def common_spelling(name: str) -> str:
    """Return the common spelling of a name: composed (NFC), and read as Latin-1 if its bytes are not UTF-8."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return unicodedata.normalize("NFC", text)


def split_suffix(name: str) -> tuple[str, str]:
    """Split a name into stem and image suffix, in lower case; any other suffix stays in the stem."""
    stem, dot, suffix = name.rpartition(".")
    suffix = (dot + suffix).lower()
    return (stem, suffix) if stem and suffix in SUFFIXES else (name, "")


def _rank(name: str) -> int:
    suffix = split_suffix(name)[1]
    return SUFFIXES.index(suffix) if suffix else len(SUFFIXES)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds NUL
        return False
