"""The byte-range index of a training set: the bytes of each sample, in one file or another, and its identity.

An index is saved (see `index_store`) in the folder `.recognition-index` beside the data, or in a cache folder where the
data is read-only. Images are never copied. Indexes made from others are in `derived_index`.

A run may lose files of a folder of images while it trains. When it resumes, its samples must keep their numbers, so an
index that differs from the data by lost files alone is used as it is, and is put aside when another run indexes anew.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recognition.data import index_store
from recognition.data.data_files import DataFiles, PackedNames
from recognition.data.index_store import IndexContent
from recognition.data.source import Source, file_stamp
from recognition.errors import UserError
from recognition.files.paths import shown

_BAD_RANGE = (IndexError, OverflowError, StopIteration, ValueError)
"""Exceptions that reading raises for a range outside all files; opening an index does not check every range."""
_MACHINE_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_log = logging.getLogger(__name__)


class LostFile(UserError):
    """A sample that cannot be read: its file is gone, unreadable or shorter than it was; `reason` says which."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Index:
    """Index of N samples of C identities in R >= N byte ranges of F files.

    path: the data, as given. folder: the folder of the index. starts: int64 [N+1], first range of each sample. ranges:
    RANGE [R]. labels: int64 [N] in 0..C-1. identities: C folder names, or labels of the .rec file. sizes: int64 [F],
    bytes of each file when indexed. fingerprint: SHA-256 over file names (below the data's root) and sizes, ranges and
    labels, which does not depend on the place of the data. notes: sentences for the user about the data, such as files
    that are left out.
    """

    path: Path
    folder: Path
    files: DataFiles
    starts: np.ndarray
    ranges: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    identities: PackedNames
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def num_images(self) -> int:
        """Number of samples, N."""
        return len(self.labels)

    @property
    def num_identities(self) -> int:
        """Number of identities, C."""
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, sample: int) -> bytes:
        """Read the encoded image of `sample`. Raises LostFile, naming the sample, if its file is gone or was cut."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        try:
            return self._read(sample)
        except UserError:
            raise
        except _BAD_RANGE as error:
            raise UserError(
                f"{shown(self.folder)}: the index is damaged at sample {sample} ({error}): delete it, and make it anew"
            ) from None

    def _read(self, sample: int) -> bytes:
        pieces = []
        for row in range(self.starts[sample], self.starts[sample + 1]):
            number, offset, length = self.ranges[row].item()
            try:
                piece = self.files.read(number, offset, length)
            except OSError as error:
                reason = error.strerror or str(error)
                if error.errno in _MACHINE_LIMITS:
                    raise UserError(f"{self.describe(sample)}: {reason}") from None
                raise LostFile(self.describe(sample), reason) from None
            if len(piece) != length:
                raise LostFile(self.describe(sample), "the file has become shorter since it was indexed")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def describe(self, sample: int) -> str:
        """Name a sample in a message: its number, file, byte offset and identity."""
        number, offset, _ = self.ranges[self.starts[sample]].item()
        identity = shown(self.identities[int(self.labels[sample])])
        return f"sample {sample} ({shown(self.files[number])} at byte {offset}, identity {identity})"


def build_index(path: Path, cache: Path | None = None) -> Index:
    """Index the data at `path` anew: .rec files, or a folder of identity folders.

    The index goes beside the data, or under `cache` (by default the user's cache folder) where that is read-only.
    Raises UserError for data that cannot be used.
    """
    return _build(path, Source.find(path, cache))


def open_index(path: Path, cache: Path | None = None, *, resumed_fingerprint: str = "") -> Index:
    """Open the index of the data at `path`; build it first if there is none, it is damaged or the data has changed.

    `path` may also be a folder that `filter_index` or `merge_indexes` wrote. `resumed_fingerprint` is the fingerprint
    of the index that a resumed run began with: an index that has it is used as it is if all that has changed is that
    files were lost or cut; `read` raises LostFile for their samples. Raises UserError as `build_index` does.
    """
    if (path / index_store.METADATA_FILE).is_file():
        return _open_derived(path, resumed_fingerprint)
    source = Source.find(path, cache)
    saved = [(place, content) for place in source.places if (content := _load(place))]
    for place, content in saved + _set_aside(source, resumed_fingerprint):
        if content.fingerprint == resumed_fingerprint and content.stamp != source.stamp():
            losses = _count_losses_of(source, content)
            if losses is not None:
                return make_index(path, place, content, (*source.notes(content), *_note_losses(losses, content)))
    for place, content in saved:
        if content.stamp == source.stamp():
            return make_index(path, place, content, source.notes(content))
    return _build(path, source)


def check_trainable(index: Index) -> None:
    """Raise UserError unless `index` has two identities or more."""
    if index.num_identities < 2:
        raise UserError(
            f"data.path: {shown(index.path)} has {index.num_images:,} images of 1 identity "
            f"({shown(index.identities[0])}): nothing to tell apart. Training takes 2 identities at least: a folder or "
            "a label of its own for each person"
        )


def _build(path: Path, source: Source) -> Index:
    content = source.scan()
    content = replace(content, notes=content.notes + note_single_images(content))
    failed: OSError | None = None
    for place in source.writable_places():
        try:
            _keep_if_only_losses(source, place)
            index_store.save(place, content)
            index = make_index(path, place, index_store.load(place), source.notes(content))
        except OSError as error:
            failed = error
        else:
            _log.info("%s: indexed %d images of %d identities", shown(path), index.num_images, index.num_identities)
            return index
    assert failed is not None
    raise UserError(
        f"{shown(failed.filename or source.root)}: cannot write the index: {failed.strerror}: choose another folder "
        "for it, data.index_folder=... (--cache of recognition index)"
    )


def _load(place: Path, log: Callable[..., None] = _log.warning) -> IndexContent | None:
    """Load the index saved at `place`; return None if there is none, or it is damaged, which is logged."""
    if not place.is_dir():
        return None
    try:
        return index_store.load(place)
    except index_store.LOAD_ERRORS as error:
        log("%s: the index is damaged (%s) and made anew", shown(place), error)
        return None


def _set_aside(source: Source, resumed_fingerprint: str) -> list[tuple[Path, IndexContent]]:
    """Load the indexes that `_keep_if_only_losses` has put aside, if a run is resumed."""
    places = map(_before_losses, source.places) if resumed_fingerprint else ()
    return [(place, content) for place in places if (content := _load(place))]


def _before_losses(place: Path) -> Path:
    return place.with_name("before losses") / place.name


def _keep_if_only_losses(source: Source, place: Path) -> None:
    """Put an index aside, instead of replacing it, if the data differs from it by lost files alone.

    A run that began with it may then still resume. The first such index stays, even if more files are lost later.
    """
    aside = _before_losses(place)
    for folder in (aside, place):
        content = _load(folder, _log.debug)
        if content is not None and _count_losses_of(source, content):
            if folder == place:
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                place.rename(aside)
            return


def _count_losses_of(source: Source, content: IndexContent) -> int | None:
    return None if source.containers else _count_losses(content.files, content.sizes, source.present())


def make_index(path: Path, folder: Path, content: IndexContent, notes: tuple[str, ...]) -> Index:
    """Make an index of `content`, loaded from `folder`, over the data at `path`."""
    return Index(
        path=path,
        folder=folder,
        files=DataFiles(content.roots or ((path if path.is_dir() else path.parent, 0),), content.files),
        starts=content.starts,
        ranges=content.ranges,
        labels=content.labels,
        sizes=content.sizes,
        identities=content.identities,
        fingerprint=content.fingerprint,
        notes=notes,
    )


def _open_derived(path: Path, resumed_fingerprint: str) -> Index:
    try:
        content = index_store.load(path)
    except index_store.LOAD_ERRORS as error:
        raise UserError(f"{shown(path)}: the index is damaged ({error}): filter or merge again") from None
    index = make_index(path, path, content, content.notes)
    losses = None
    if content.fingerprint == resumed_fingerprint:
        losses = _count_losses(content.files, content.sizes, _present(index.files))
    if losses:
        return replace(index, notes=(*content.notes, *_note_losses(losses, content)))
    if content.stamp != file_stamp(index.files):
        raise UserError(f"{shown(path)}: the data that it was made from has changed: filter or merge again")
    return index


def note_single_images(content: IndexContent) -> tuple[str, ...]:
    """Return a note on the identities that have one image only, if there are any."""
    singles = int((np.bincount(content.labels) == 1).sum())
    return (f"{singles:,} of {len(content.identities):,} identities have one image only",) if singles else ()


def _count_losses(names: Iterable[str], sizes: np.ndarray, present: Iterator[tuple[str, int]]) -> int | None:
    """Count the files `names` that are not `present` any more or are shorter; None if anything else has changed."""
    losses = 0
    name_now, size_now = next(present, ("", 0))
    for name, size in zip(names, sizes.tolist(), strict=True):
        if name != name_now:
            losses += 1
            continue
        if size_now > size:
            return None
        losses += size_now < size
        name_now, size_now = next(present, ("", 0))
    return None if name_now else losses


def _present(files: DataFiles) -> Iterator[tuple[str, int]]:
    for number, name in enumerate(files.names):
        try:
            yield name, files[number].stat().st_size
        except OSError:
            continue


def _note_losses(losses: int, content: IndexContent) -> tuple[str, ...]:
    """Return the note on lost or cut files; none if only modification times have changed."""
    if not losses:
        return ()
    return (
        f"{losses:,} of {len(content.files):,} files are gone or have become shorter since this run began: their "
        "images are replaced by others, as broken ones are",
    )
