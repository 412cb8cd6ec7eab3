"""Training data as the user gives it, .rec files or a folder per identity, and where its index may lie."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recognition.data import folder as image_folder
from recognition.data import recordio
from recognition.data.files import Names
from recognition.data.index_store import INDEX_FOLDER, RANGE, Content, digest
from recognition.errors import UserError
from recognition.files.paths import shown

_RULES = "2"
"""Of what is taken and what is said of a .rec file: an index made under others is made anew."""
_CHUNK = re.compile(r"(.+)_(\d+)((?:_train)?)\.rec", re.DOTALL)
"""im2rec's names for the parts of one listing."""


@dataclass
class Source:
    """Data that can be scanned, and the places where its index may lie, the preferred one first.

    recs: its .rec files, none for a folder per identity. said: what the user should know of the choice of files.
    """

    root: Path
    recs: tuple[Path, ...]
    places: tuple[Path, Path]
    said: tuple[str, ...]
    listing: image_folder.Listing | None = None

    @classmethod
    def at(cls, path: Path, cache: Path | None) -> "Source":
        """What `path` is. Raises UserError where it is no training data."""
        if not path.exists():
            raise UserError(f"{shown(path)}: no such file or folder")
        if path.is_dir():
            recs, said = _choose(path)
        elif path.suffix.lower() == ".rec":
            recs, said = (path,), ()
        else:
            beside = path.with_suffix(".rec")
            way_out = f": give {shown(beside.name)}, which lies beside it" if beside.is_file() else ""
            raise UserError(
                f"{shown(path)}: neither a .rec file nor a folder with train.rec or with a folder per identity{way_out}"
            )
        lists = [rec.with_suffix(".lst").name for rec in recs if rec.with_suffix(".lst").is_file()]
        if lists:
            said += (f"not read: {', '.join(map(shown, lists))}; labels are taken from the .rec file",)
        root = recs[0].parent if recs else path
        name = recs[0].name if recs else "images"
        key = (recs[0] if recs else root).resolve()
        if len(recs) > 1:
            name = f"{len(recs)} chunks"
            key = root.resolve() / name
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recognition"
        cached = cache / hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
        return cls(root, recs, (root / INDEX_FOLDER / name, cached), said)

    def writable_places(self) -> tuple[Path, ...]:
        """The places where an index may be saved."""
        beside, cached = self.places
        folders = [folder for folder in (self.root, beside.parent) if folder.exists()]
        # The superuser may write anywhere; data whose mode says read-only is left alone all the same.
        if all(folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK) for folder in folders):
            return beside, cached
        return (cached,)

    def stamp(self) -> str:
        """Changes when the data does: over names, sizes and modification times."""
        if not self.recs:
            listing = self._list()
            return digest(listing.names.text, listing.names.ends, listing.sizes, listing.mtimes)
        beside = (rec.with_suffix(".idx") for rec in self.recs)
        return stamp_of([*self.recs, *(idx for idx in beside if idx.exists())], _RULES)

    def scan(self) -> Content:
        """What the index of the data is to hold. Raises UserError for data that cannot be used."""
        return self._scan_records() if self.recs else self._scan_folder()

    def notes(self, content: Content) -> tuple[str, ...]:
        """What the user should know of the data, whose index is `content`."""
        return self.said + (self.listing.notes if self.listing else ()) + content.notes

    def present(self) -> Iterator[tuple[str, int]]:
        """Names and sizes of the image files that are there now, of a folder per identity."""
        listing = self._list()
        return zip(listing.names, listing.sizes.tolist(), strict=True)

    def _scan_folder(self) -> Content:
        listing = self._list()
        if listing.sizes.max() >= 1 << 32:
            largest = self.root / listing.names[int(listing.sizes.argmax())]
            raise UserError(f"{shown(largest)}: too large for an image")
        ranges = np.zeros(len(listing.names), RANGE)
        ranges["file"], ranges["length"] = np.arange(len(ranges)), listing.sizes
        starts = np.arange(len(ranges) + 1)
        names, people = listing.names, listing.identities
        return Content(starts, ranges, listing.labels, listing.sizes, names, people, self.stamp())

    def _scan_records(self) -> Content:
        stamp = self.stamp()
        parts = [recordio.scan(rec) for rec in self.recs]
        originals, labels = np.unique(np.concatenate([raw for _, raw in parts]), return_inverse=True)
        found = [records for records, _ in parts]
        pieces = [len(records.offsets) for records in found]
        ranges = np.zeros(sum(pieces), RANGE)
        ranges["file"] = np.repeat(np.arange(len(parts)), pieces)
        ranges["offset"] = np.concatenate([records.offsets for records in found])
        ranges["length"] = np.concatenate([records.lengths for records in found])
        return Content(
            starts=starts_of(np.concatenate([np.diff(records.starts) for records in found])),
            ranges=ranges,
            labels=labels,
            sizes=np.array([rec.stat().st_size for rec in self.recs]),
            files=Names.of([rec.name for rec in self.recs]),
            identities=Names.of([str(label) for label in originals.tolist()]),
            stamp=stamp,
            notes=tuple(note for records in found for note in records.notes),
        )

    def _list(self) -> image_folder.Listing:
        if self.listing is None:
            self.listing = image_folder.scan(self.root)
        return self.listing


def stamp_of(files: Iterable[Path], rules: str = "") -> str:
    """A hash over names, sizes and modification times. Raises UserError where a file is not there."""
    sha = hashlib.sha256(rules.encode())
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"{shown(path)}: {error.strerror}") from None
        sha.update(os.fsencode(f"{path.name}\n{facts.st_size} {facts.st_mtime_ns}\n"))
    return sha.hexdigest()


def starts_of(counts: np.ndarray) -> np.ndarray:
    """Where each of some parts begins and the last one ends, from their sizes [N]: int64 [N+1]."""
    return np.concatenate(([0], np.cumsum(counts)))


def _choose(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The .rec files of a folder that are the training set, and what is to be said of the choice."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            named = sorted(entry.name for entry in visible if entry.name.lower().endswith(".rec") and entry.is_file())
            folders = sum(entry.is_dir() for entry in visible)
    except OSError as error:
        raise UserError(f"{shown(folder)}: {error.strerror}") from None
    if "train.rec" in named:
        others = [name for name in named if name != "train.rec"]
        texts = ([f"{folders:,} folders"] if folders else []) + [shown(name) for name in others]
        said = (f"holds train.rec, which is taken; not taken: {', '.join(texts)}",) if texts else ()
        return (folder / "train.rec",), said
    if folders or not named:
        return (), ()
    if len(named) == 1:
        return (folder / named[0],), (f"holds {shown(named[0])}, which is taken",)
    return _chunks(folder, named)


def _chunks(folder: Path, named: list[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    matches = [_CHUNK.fullmatch(name) for name in named]
    numbers = {int(match[2]): name for match, name in zip(matches, named, strict=True) if match}
    if len(numbers) < len(named) or len({(match[1], match[3]) for match in matches if match}) > 1:
        raise UserError(
            f"{shown(folder)}: holds {len(named)} .rec files ({', '.join(map(shown, named[:4]))}"
            f"{', ...' * (len(named) > 4)}), none of them train.rec: give one of them, or join them by "
            "`recognition index merge OUT FILE FILE ...` and data.path=OUT (with --same-identities where equal "
            "labels mean the same person)"
        )
    ordered = [numbers[number] for number in sorted(numbers)]
    said = f"holds {len(named)} chunks, {shown(ordered[0])} to {shown(ordered[-1])}: equal labels are the same person"
    missing = sorted(set(range(max(numbers))) - set(numbers))
    if missing:
        said += f"; chunk {', '.join(map(str, missing[:4]))}{', ...' * (len(missing) > 4)} is not there"
    return tuple(folder / name for name in ordered), (said,)
