"""The byte-range index of a training set: which bytes of which file are sample `i`, and whose face that is.

A saved index is a folder of .npy files and name lists, memory-mapped, with `recognition-index.json`, and lies in
`.recognition-index` beside the data, or in a cache folder where the data is read-only. The images stay where they
are: `filter` and `merge` write a new index over the same files.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recognition.data import index_store
from recognition.data.files import Files, Names
from recognition.data.index_store import Content
from recognition.data.source import Source, stamp_of, starts_of
from recognition.errors import UserError
from recognition.files.paths import shown

_NO_PLACE = (IndexError, OverflowError, StopIteration, ValueError)
"""What numbers that are no place in any file lead to: opening does not go through all of an index to find them."""
_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_log = logging.getLogger(__name__)


class Lost(UserError):
    """A sample that cannot be read, as its file is gone, unreadable or shorter than it was; `reason` says which."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Index:
    """N samples of C identities in R >= N byte ranges.

    path: the data, as given. folder: where the index lies. starts: int64 [N+1], first range of each sample.
    ranges: RANGE [R]. labels: int64 [N] in 0..C-1. identities: folder names, or the labels in the .rec file.
    sizes: int64 [F], bytes of each file when indexed. fingerprint: SHA-256 over file names (below the data's root)
    and sizes, ranges and labels, the same wherever the data lies. notes: what the user should know of the data, such
    as what of it is not taken, a sentence each. Pickled, it is the folder's path.
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
    notes: tuple[str, ...]

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
        """The encoded image. Raises Lost, naming the sample, where its file is gone or has become shorter."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        try:
            return self._read(sample)
        except UserError:
            raise
        except _NO_PLACE as error:
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
                if error.errno in _NOT_THE_FILES_FAULT:
                    raise UserError(f"{self.describe(sample)}: {reason}") from None
                raise Lost(self.describe(sample), reason) from None
            if len(piece) != length:
                raise Lost(self.describe(sample), "the file has become shorter since it was indexed")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def describe(self, sample: int) -> str:
        """Where a sample is and whose, for messages."""
        number, offset, _ = self.ranges[self.starts[sample]].item()
        identity = shown(self.identities[int(self.labels[sample])])
        return f"sample {sample} ({shown(self.files[number])} at byte {offset}, identity {identity})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.fingerprint)


def build(path: Path, cache: Path | None = None) -> Index:
    """Index the data at `path` anew: .rec files, or a folder of identity folders.

    The index goes beside the data, or under `cache` (by default the user's cache folder) where that is read-only.
    Raises UserError for data that cannot be used.
    """
    return _build(path, Source.at(path, cache))


def open_index(path: Path, cache: Path | None = None, *, going_on: str = "") -> Index:
    """Open the index of the data at `path`; build it first if there is none, it is damaged or the data has changed.

    `path` may also be a folder that `filter` or `merge` wrote. `going_on`: the fingerprint of the index that a run
    began with; an index that has it stays as it is where all that has changed is that files were lost or cut, whose
    samples `read` raises Lost for. Raises UserError as `build` does.
    """
    if (path / index_store.FACTS).is_file():
        return _open_derived(path, going_on)
    source = Source.at(path, cache)
    saved = [(place, content) for place in source.places if (content := _load(place))]
    for place, content in saved + _set_aside(source, going_on):
        if content.fingerprint == going_on and content.stamp != source.stamp():
            losses = _losses_of(source, content)
            if losses is not None:
                return _index(path, place, content, (*source.notes(content), *_lost(losses, content)))
    for place, content in saved:
        if content.stamp == source.stamp():
            return _index(path, place, content, source.notes(content))
    return _build(path, source)


def check_trainable(index: Index) -> None:
    """Raise UserError where there is nothing to learn from `index`."""
    if index.num_identities < 2:
        raise UserError(
            f"data.path: {shown(index.path)} has {index.num_images:,} images of 1 identity "
            f"({shown(index.identities[0])}): nothing to tell apart. Training takes 2 identities at least: a folder or "
            "a label of its own for each person"
        )


def filter(index: Index, keep: np.ndarray, output: Path) -> Index:
    """Save at `output` an index of the samples where `keep`, bool [N], is true; labels are made contiguous again."""
    keep = np.asarray(keep)
    if keep.shape != index.labels.shape or keep.dtype != np.bool_:
        raise UserError(f"keep must be {len(index)} booleans, not {keep.dtype} {keep.shape}")
    if not keep.any():
        raise UserError(f"{shown(index.path)}: no samples are kept")
    counts = np.diff(index.starts)
    kept, labels = np.unique(index.labels[keep], return_inverse=True)
    content = Content(
        starts=starts_of(counts[keep]),
        ranges=index.ranges[np.repeat(keep, counts)],
        labels=labels,
        sizes=index.sizes,
        files=index.files.names,
        identities=Names.of([index.identities[label] for label in kept]),
        stamp=stamp_of(index.files),
        roots=_absolute(index.files.roots),
    )
    return _save_derived(output, content)


def merge(indexes: Sequence[Index], output: Path, *, same_identities: bool = False) -> Index:
    """Save at `output` an index of all samples of `indexes`, in order.

    Every index's identities are other people, and identity `name` of the i-th index is called `i/name`; or, with
    `same_identities`, equal names mean the same person.
    """
    if not indexes:
        raise UserError("nothing to merge")
    first_file = np.cumsum([0] + [len(index.files) for index in indexes])
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
    new_labels: dict[str, int] = {}
    labels = []
    for number, index in enumerate(indexes):
        called = index.identities if same_identities else (f"{number}/{name}" for name in index.identities)
        labels.append(np.array([new_labels.setdefault(name, len(new_labels)) for name in called])[index.labels])
    content = Content(
        starts=starts_of(np.concatenate([np.diff(index.starts) for index in indexes])),
        ranges=ranges,
        labels=np.concatenate(labels),
        sizes=np.concatenate([index.sizes for index in indexes]),
        files=files,
        identities=Names.of(list(new_labels)),
        stamp=stamp_of(Files(roots, files)),
        roots=roots,
    )
    return _save_derived(output, content)


def _build(path: Path, source: Source) -> Index:
    content = source.scan()
    content = replace(content, notes=content.notes + _of_one_image(content))
    failed: OSError | None = None
    for place in source.writable_places():
        try:
            _keep_if_only_losses(source, place)
            index_store.save(place, content)
            index = _index(path, place, index_store.load(place), source.notes(content))
        except OSError as error:
            failed = error
        else:
            _log.info("%s: indexed %d images of %d identities", shown(path), index.num_images, index.num_identities)
            return index
    assert failed is not None
    raise UserError(
        f"{shown(failed.filename or source.root)}: cannot write the index: {failed.strerror}: choose another folder "
        "for it, data.cache=... (--cache of recognition index)"
    )


def _load(place: Path, log: Callable[..., None] = _log.warning) -> Content | None:
    """The index that is saved in a place; None where there is none, or a damaged one, which is logged."""
    if not place.is_dir():
        return None
    try:
        return index_store.load(place)
    except index_store.DAMAGE as error:
        log("%s: the index is damaged (%s) and made anew", shown(place), error)
        return None


def _set_aside(source: Source, going_on: str) -> list[tuple[Path, Content]]:
    """The indexes that `_keep_if_only_losses` put aside, if a run goes on."""
    places = map(_before_losses, source.places) if going_on else ()
    return [(place, content) for place in places if (content := _load(place))]


def _before_losses(place: Path) -> Path:
    return place.with_name("before losses") / place.name


def _keep_if_only_losses(source: Source, place: Path) -> None:
    """Put an index aside that a run may have begun with and go on with: all that has changed is that files were lost.

    The first such index stays, though more files are lost.
    """
    aside = _before_losses(place)
    for folder in (aside, place):
        content = _load(folder, _log.debug)
        if content is not None and _losses_of(source, content):
            if folder == place:
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                place.rename(aside)
            return


def _losses_of(source: Source, content: Content) -> int | None:
    return None if source.recs else _losses(content.files, content.sizes, source.present())


def _index(path: Path, folder: Path, content: Content, notes: tuple[str, ...]) -> Index:
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
        notes=notes,
    )


def _open_derived(path: Path, going_on: str) -> Index:
    try:
        content = index_store.load(path)
    except index_store.DAMAGE as error:
        raise UserError(f"{shown(path)}: the index is damaged ({error}): filter or merge again") from None
    index = _index(path, path, content, content.notes)
    losses = None
    if content.fingerprint == going_on:
        losses = _losses(content.files, content.sizes, _present(index.files))
    if losses:
        return replace(index, notes=(*content.notes, *_lost(losses, content)))
    if content.stamp != stamp_of(index.files):
        raise UserError(f"{shown(path)}: the data that it was made from has changed: filter or merge again")
    return index


def _save_derived(output: Path, content: Content) -> Index:
    """Saving replaces the whole folder, so it must not be one that holds anything else."""
    if (
        output.exists()
        and not (output / index_store.FACTS).is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        raise UserError(f"{shown(output)}: exists and is no index: choose another place")
    content = replace(content, notes=_of_one_image(content))
    try:
        index_store.save(output, content)
    except OSError as error:
        raise UserError(f"{shown(error.filename or output)}: cannot write the index: {error.strerror}") from None
    return _index(output, output, index_store.load(output), content.notes)


def _reopen(path: Path, folder: Path, fingerprint: str) -> Index:
    content = index_store.load(folder)
    if content.fingerprint != fingerprint:
        raise UserError(f"{shown(path)}: the data was indexed anew while in use: start again")
    return _index(path, folder, content, content.notes)


def _of_one_image(content: Content) -> tuple[str, ...]:
    singles = int((np.bincount(content.labels) == 1).sum())
    return (f"{singles:,} of {len(content.identities):,} identities have one image only",) if singles else ()


def _losses(names: Iterable[str], sizes: np.ndarray, present: Iterator[tuple[str, int]]) -> int | None:
    """How many of the files `names` are not `present` any more, or shorter; None if anything else has changed."""
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


def _present(files: Files) -> Iterator[tuple[str, int]]:
    for number, name in enumerate(files.names):
        try:
            yield name, files[number].stat().st_size
        except OSError:
            continue


def _lost(losses: int, content: Content) -> tuple[str, ...]:
    """The note on files that went away or were cut; none where only modification times have changed."""
    if not losses:
        return ()
    return (
        f"{losses:,} of {len(content.files):,} files are gone or have become shorter since this run began: their "
        "images are replaced by others, as broken ones are",
    )


def _absolute(roots: Iterable[tuple[Path, int]]) -> tuple[tuple[Path, int], ...]:
    return tuple((root.resolve(), first) for root, first in roots)
