"""Training data as the user names it, containers or a folder per identity, and the places for its index.

A container is a file that holds many images. `CONTAINERS` lists the kinds.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recognition.data import image_folder, insightface_rec
from recognition.data.data_files import PackedNames
from recognition.data.index_store import INDEX_FOLDER, RANGE, IndexContent, digest
from recognition.data.recordio import Records
from recognition.errors import UserError
from recognition.files.paths import shown

CONTAINERS: dict[str, Callable[[Path], tuple[Records, np.ndarray]]] = {
    ".rec": insightface_rec.scan,
}
"""Kinds of containers by suffix: functions that find the byte ranges of N images and their labels [N], int64 or str.

They raise UserError for a file that cannot be used. Labels of any values become 0..C-1 in their sorted order.
"""

_RULES = "2"
"""Version of the rules by which containers are scanned; an index made by another version is built anew."""
_CHUNK_NAME = re.compile(r"(.+)_(\d+)((?:_train)?)\.rec", re.DOTALL)
"""Name that im2rec gives to a part of one listing."""


@dataclass
class Source:
    """Training data, and the two places where its index may lie, the preferred one first.

    containers: files that hold many images, empty for a folder per identity. choice_notes: sentences for the user on
    the choice of files.
    """

    root: Path
    containers: tuple[Path, ...]
    places: tuple[Path, Path]
    choice_notes: tuple[str, ...]
    listing: image_folder.Listing | None = None

    @classmethod
    def find(cls, path: Path, cache: Path | None) -> "Source":
        """Find the training data at `path`. Raises UserError if there is none."""
        if not path.exists():
            raise UserError(f"{shown(path)}: no such file or folder")
        if path.is_dir():
            recs, notes = _choose_recs(path)
        elif path.suffix.lower() in CONTAINERS:
            recs, notes = (path,), ()
        else:
            beside = path.with_suffix(".rec")
            way_out = f": give {shown(beside.name)}, which lies beside it" if beside.is_file() else ""
            raise UserError(
                f"{shown(path)}: neither a {' or '.join(CONTAINERS)} file nor a folder with train.rec or with a folder "
                f"per identity{way_out}"
            )
        lists = [rec.with_suffix(".lst").name for rec in recs if rec.with_suffix(".lst").is_file()]
        if lists:
            notes += (f"not read: {', '.join(map(shown, lists))}; labels are taken from the .rec file",)
        root = recs[0].parent if recs else path
        name = recs[0].name if recs else "images"
        key = (recs[0] if recs else root).resolve()
        if len(recs) > 1:
            name = f"{len(recs)} chunks"
            key = root.resolve() / name
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recognition"
        cached = cache / hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
        return cls(root, recs, (root / INDEX_FOLDER / name, cached), notes)

    def writable_places(self) -> tuple[Path, ...]:
        """Return the places where an index may be saved, the preferred one first."""
        beside, cached = self.places
        folders = [folder for folder in (self.root, beside.parent) if folder.exists()]
        # The mode is checked as well, because the superuser may write anywhere.
        if all(folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK) for folder in folders):
            return beside, cached
        return (cached,)

    def stamp(self) -> str:
        """Compute a hash over names, sizes and modification times, which changes when the data does."""
        if not self.containers:
            listing = self._list()
            return digest(listing.names.text, listing.names.ends, listing.sizes, listing.mtimes)
        beside = (path.with_suffix(".idx") for path in self.containers)
        return file_stamp([*self.containers, *(idx for idx in beside if idx.exists())], _RULES)

    def scan(self) -> IndexContent:
        """Scan the data for the content of its index. Raises UserError for data that cannot be used."""
        return self._scan_containers() if self.containers else self._scan_folder()

    def notes(self, content: IndexContent) -> tuple[str, ...]:
        """Return the sentences for the user about the data, whose index is `content`."""
        return self.choice_notes + (self.listing.notes if self.listing else ()) + content.notes

    def present(self) -> Iterator[tuple[str, int]]:
        """Return names and sizes of the image files that are there now, for a folder per identity."""
        listing = self._list()
        return zip(listing.names, listing.sizes.tolist(), strict=True)

    def _scan_folder(self) -> IndexContent:
        listing = self._list()
        if listing.sizes.max() >= 1 << 32:
            largest = self.root / listing.names[int(listing.sizes.argmax())]
            raise UserError(f"{shown(largest)}: too large for an image")
        ranges = np.zeros(len(listing.names), RANGE)
        ranges["file"], ranges["length"] = np.arange(len(ranges)), listing.sizes
        starts = np.arange(len(ranges) + 1)
        names, people = listing.names, listing.identities
        return IndexContent(starts, ranges, listing.labels, listing.sizes, names, people, self.stamp())

    def _scan_containers(self) -> IndexContent:
        stamp = self.stamp()
        parts = [CONTAINERS[path.suffix.lower()](path) for path in self.containers]
        originals, labels = np.unique(np.concatenate([raw for _, raw in parts]), return_inverse=True)
        found = [records for records, _ in parts]
        pieces = [len(records.offsets) for records in found]
        ranges = np.zeros(sum(pieces), RANGE)
        ranges["file"] = np.repeat(np.arange(len(parts)), pieces)
        ranges["offset"] = np.concatenate([records.offsets for records in found])
        ranges["length"] = np.concatenate([records.lengths for records in found])
        return IndexContent(
            starts=range_starts(np.concatenate([np.diff(records.starts) for records in found])),
            ranges=ranges,
            labels=labels,
            sizes=np.array([path.stat().st_size for path in self.containers]),
            files=PackedNames.of([path.name for path in self.containers]),
            identities=PackedNames.of([str(label) for label in originals.tolist()]),
            stamp=stamp,
            notes=tuple(note for records in found for note in records.notes),
        )

    def _list(self) -> image_folder.Listing:
        if self.listing is None:
            self.listing = image_folder.scan(self.root)
        return self.listing


def file_stamp(files: Iterable[Path], rules: str = "") -> str:
    """Compute a hash over names, sizes and modification times. Raises UserError if a file is missing."""
    sha = hashlib.sha256(rules.encode())
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"{shown(path)}: {error.strerror}") from None
        sha.update(os.fsencode(f"{path.name}\n{facts.st_size} {facts.st_mtime_ns}\n"))
    return sha.hexdigest()


def range_starts(counts: np.ndarray) -> np.ndarray:
    """Return where each part begins and the last one ends, int64 [N+1], from the parts' sizes [N]."""
    return np.concatenate(([0], np.cumsum(counts)))


def _choose_recs(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Choose the .rec files of a folder that are its training set; return them and notes on the choice."""
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
        notes = (f"holds train.rec, which is taken; not taken: {', '.join(texts)}",) if texts else ()
        return (folder / "train.rec",), notes
    if folders or not named:
        return (), ()
    if len(named) == 1:
        return (folder / named[0],), (f"holds {shown(named[0])}, which is taken",)
    return _choose_chunks(folder, named)


def _choose_chunks(folder: Path, named: list[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Choose the parts that im2rec has cut one listing into. Raises UserError if the .rec files are anything else."""
    matches = [_CHUNK_NAME.fullmatch(name) for name in named]
    numbers = {int(match[2]): name for match, name in zip(matches, named, strict=True) if match}
    if len(numbers) < len(named) or len({(match[1], match[3]) for match in matches if match}) > 1:
        raise UserError(
            f"{shown(folder)}: holds {len(named)} .rec files ({', '.join(map(shown, named[:4]))}"
            f"{', ...' * (len(named) > 4)}), none of them train.rec: give one of them, or join them by "
            "`recognition index merge OUT FILE FILE ...` and data.path=OUT (with --same-identities where equal "
            "labels mean the same person)"
        )
    ordered = [numbers[number] for number in sorted(numbers)]
    note = f"holds {len(named)} chunks, {shown(ordered[0])} to {shown(ordered[-1])}: equal labels are the same person"
    missing = sorted(set(range(max(numbers))) - set(numbers))
    if missing:
        note += f"; chunk {', '.join(map(str, missing[:4]))}{', ...' * (len(missing) > 4)} is not there"
    return tuple(folder / name for name in ordered), (note,)
