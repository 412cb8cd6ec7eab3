"""The byte-range index of a training set: which bytes of which file are sample `i`, and whose face that is.

A saved index is a folder of .npy files and name lists, memory-mapped, with `recognition-index.json`, and lies in
`.recognition-index` beside the data, or in a cache folder where the data is read-only. The images stay where they
are: `filter` and `merge` write a new index over the same files.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recognition.config import UserError
from recognition.data import folder as image_folder
from recognition.data import recordio, store
from recognition.data.files import Files, Names
from recognition.data.store import RANGE, Content, digest

_FOLDER = ".recognition-index"
_NO_PLACE = (IndexError, OverflowError, StopIteration, ValueError)
"""What numbers that are no place in any file lead to: opening does not go through all of an index to find them."""

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Index:
    """N samples of C identities in R >= N byte ranges.

    path: the data, as given. folder: where the index lies. starts: int64 [N+1], first range of each sample.
    ranges: RANGE [R]. labels: int64 [N] in 0..C-1. identities: folder names, or the labels in the .rec file.
    sizes: int64 [F], bytes of each file when indexed. fingerprint: SHA-256 over file names (below the data's root)
    and sizes, ranges and labels, the same wherever the data lies. Pickled, it is the folder's path.
    """

    path: Path
    folder: Path
    files: Files
    starts: np.ndarray
    ranges: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    identities: Names
    fingerprint: str

    @property
    def num_images(self) -> int:
        """N"""
        return len(self.labels)

    @property
    def num_identities(self) -> int:
        """C"""
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises UserError, naming the sample, where its file is gone or has become shorter."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        try:
            return self._read(sample)
        except UserError:
            raise
        except _NO_PLACE as error:
            message = f"{self.folder}: the index is damaged at sample {sample} ({error}): delete it, and make it anew"
            raise UserError(message) from None

    def _read(self, sample: int) -> bytes:
        pieces = []
        for row in range(self.starts[sample], self.starts[sample + 1]):
            number, offset, length = self.ranges[row].item()
            try:
                piece = self.files.read(number, offset, length)
            except OSError as error:
                raise UserError(f"{self.describe(sample)}: {error.strerror}") from None
            if len(piece) != length:
                raise UserError(f"{self.describe(sample)}: the file has become shorter since it was indexed")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def describe(self, sample: int) -> str:
        """Where a sample is and whose, for messages."""
        number, offset, _ = self.ranges[self.starts[sample]].item()
        identity = self.identities[int(self.labels[sample])]
        return f"sample {sample} ({self.files[number]} at byte {offset}, identity {identity})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.fingerprint)


def build(path: Path, cache: Path | None = None, progress: Progress | None = None) -> Index:
    """Index the data at `path` anew: a .rec file, a folder with train.rec, or a folder of identity folders.

    The index goes beside the data, or under `cache` (by default the user's cache folder) where that is read-only.
    `progress` is called with what is done and what there is to do. Raises UserError for data that cannot be used.
    """
    source = _Source.at(path, cache)
    content = source.scan(progress)
    folder = source.writable_place()
    try:
        store.save(folder, content)
        index = _index(path, folder, store.load(folder))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot write the index: {error.strerror}") from None
    _log.info("%s: indexed %d images of %d identities", path, index.num_images, index.num_identities)
    return index


def open_index(path: Path, cache: Path | None = None, progress: Progress | None = None) -> Index:
    """Open the index of the data at `path`; build it first if there is none, it is damaged or the data has changed.

    `path` may also be a folder that `filter` or `merge` wrote. Raises UserError as `build` does.
    """
    if (path / store.FACTS).is_file():
        return _open_derived(path)
    source = _Source.at(path, cache)
    for place in source.places:
        if not place.is_dir():
            continue
        try:
            content = store.load(place)
        except store.DAMAGE as error:
            _log.warning("%s: the index is damaged (%s)", place, error)
            continue
        if content.stamp == source.stamp():
            return _index(path, place, content)
        _log.info("%s: the data has changed since it was indexed", path)
    return build(path, cache, progress)


def filter(index: Index, keep: np.ndarray, output: Path) -> Index:
    """Save at `output` an index of the samples where `keep`, bool [N], is true; labels are made contiguous again."""
    keep = np.asarray(keep)
    if keep.shape != index.labels.shape or keep.dtype != np.bool_:
        raise UserError(f"keep must be {len(index)} booleans, not {keep.dtype} {keep.shape}")
    if not keep.any():
        raise UserError(f"{index.path}: no samples are kept")
    counts = np.diff(index.starts)
    kept, labels = np.unique(index.labels[keep], return_inverse=True)
    content = Content(
        starts=_starts(counts[keep]),
        ranges=index.ranges[np.repeat(keep, counts)],
        labels=labels,
        sizes=index.sizes,
        files=index.files.names,
        identities=Names.of([index.identities[label] for label in kept]),
        stamp=_stamp_of(index.files),
        roots=_absolute(index.files.roots),
    )
    return _save_derived(output, content)


def merge(indexes: Sequence[Index], output: Path) -> Index:
    """Save at `output` an index of all samples of `indexes`, in order; every index's identities are other people.

    Identity `name` of the i-th index is called `i/name`.
    """
    if not indexes:
        raise UserError("nothing to merge")
    first_file = np.cumsum([0] + [len(index.files) for index in indexes])
    first_label = np.cumsum([0] + [index.num_identities for index in indexes])
    ranges = np.concatenate([index.ranges for index in indexes])
    ranges["file"] += np.repeat(first_file[:-1], [len(index.ranges) for index in indexes]).astype(np.uint32)
    names = [index.files.names for index in indexes]
    files = Names(
        b"".join(bytes(each.text) for each in names),
        np.cumsum(np.concatenate([np.diff(each.ends, prepend=0) for each in names])),
    )
    roots = tuple(
        (root, int(shift) + first)
        for index, shift in zip(indexes, first_file, strict=False)
        for root, first in _absolute(index.files.roots)
    )
    content = Content(
        starts=_starts(np.concatenate([np.diff(index.starts) for index in indexes])),
        ranges=ranges,
        labels=np.concatenate([index.labels + shift for index, shift in zip(indexes, first_label, strict=False)]),
        sizes=np.concatenate([index.sizes for index in indexes]),
        files=files,
        identities=Names.of([f"{i}/{name}" for i, index in enumerate(indexes) for name in index.identities]),
        stamp=_stamp_of(Files(roots, files)),
        roots=roots,
    )
    return _save_derived(output, content)


def _index(path: Path, folder: Path, content: Content) -> Index:
    return Index(
        path=path,
        folder=folder,
        files=Files(content.roots or ((path if path.is_dir() else path.parent, 0),), content.files),
        starts=content.starts,
        ranges=content.ranges,
        labels=content.labels,
        sizes=content.sizes,
        identities=content.identities,
        fingerprint=content.fingerprint,
    )


def _open_derived(path: Path) -> Index:
    try:
        content = store.load(path)
    except store.DAMAGE as error:
        raise UserError(f"{path}: the index is damaged ({error}): filter or merge again") from None
    index = _index(path, path, content)
    if content.stamp != _stamp_of(index.files):
        raise UserError(f"{path}: the data that it was made from has changed: filter or merge again")
    return index


def _save_derived(output: Path, content: Content) -> Index:
    """Saving replaces the whole folder, so it must not be one that holds anything else."""
    if output.exists() and not (output / store.FACTS).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is no index: choose another place")
    try:
        store.save(output, content)
    except OSError as error:
        raise UserError(f"{error.filename or output}: cannot write the index: {error.strerror}") from None
    return _index(output, output, store.load(output))


def _reopen(path: Path, folder: Path, fingerprint: str) -> Index:
    index = _index(path, folder, store.load(folder))
    if index.fingerprint != fingerprint:
        raise UserError(f"{path}: the data was indexed anew while in use: start again")
    return index


@dataclass
class _Source:
    """Data that can be scanned, and the places where its index may lie, the preferred one first."""

    root: Path
    rec: Path | None
    places: tuple[Path, Path]
    listing: image_folder.Listing | None = None

    @classmethod
    def at(cls, path: Path, cache: Path | None) -> "_Source":
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_dir():
            rec = path / "train.rec" if (path / "train.rec").is_file() else None
        elif path.suffix == ".rec":
            rec = path
        else:
            raise UserError(f"{path}: neither a .rec file nor a folder with train.rec or with a folder per identity")
        root = rec.parent if rec else path
        name = rec.name if rec else "images"
        if cache is None:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recognition"
        key = hashlib.sha256(os.fsencode(rec.resolve() if rec else root.resolve())).hexdigest()[:16]
        return cls(root, rec, (root / _FOLDER / name, cache / key))

    def writable_place(self) -> Path:
        beside, cached = self.places
        folders = [folder for folder in (self.root, beside.parent) if folder.exists()]
        # The superuser may write anywhere; data whose mode says read-only is left alone all the same.
        if all(folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK) for folder in folders):
            return beside
        return cached

    def stamp(self) -> str:
        """Changes when the data does: over names, sizes and modification times."""
        if self.rec is None:
            listing = self._list(None)
            return digest(listing.names.text, listing.names.ends, listing.sizes, listing.mtimes)
        return _stamp_of([path for path in (self.rec, self.rec.with_suffix(".idx")) if path.exists()])

    def scan(self, progress: Progress | None) -> Content:
        if self.rec is None:
            listing = self._list(progress)
            if listing.sizes.max() >= 1 << 32:
                raise UserError(f"{self.root / listing.names[int(listing.sizes.argmax())]}: too large for an image")
            ranges = np.zeros(len(listing.names), RANGE)
            ranges["file"], ranges["length"] = np.arange(len(ranges)), listing.sizes
            starts = np.arange(len(ranges) + 1)
            names, people = listing.names, listing.identities
            return Content(starts, ranges, listing.labels, listing.sizes, names, people, self.stamp())
        stamp = self.stamp()
        found, raw = recordio.scan(self.rec, progress)
        originals, labels = np.unique(raw, return_inverse=True)
        ranges = np.zeros(len(found.offsets), RANGE)
        ranges["offset"], ranges["length"] = found.offsets, found.lengths
        people = Names.of([str(label) for label in originals.tolist()])
        sizes = np.array([self.rec.stat().st_size])
        return Content(found.starts, ranges, labels, sizes, Names.of([self.rec.name]), people, stamp)

    def _list(self, progress: Progress | None) -> image_folder.Listing:
        if self.listing is None:
            self.listing = image_folder.scan(self.root, progress)
        return self.listing


def _stamp_of(files: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for path in files:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        sha.update(os.fsencode(f"{path.name}\n{facts.st_size} {facts.st_mtime_ns}\n"))
    return sha.hexdigest()


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts)))


def _absolute(roots: Iterable[tuple[Path, int]]) -> tuple[tuple[Path, int], ...]:
    return tuple((root.resolve(), first) for root, first in roots)
