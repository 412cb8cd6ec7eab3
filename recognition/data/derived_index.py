"""Indexes made from other indexes: a part of one, or several joined; the images stay where they are."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from recognition.data import index_store
from recognition.data.data_files import DataFiles, PackedNames
from recognition.data.index import Index, make_index, note_single_images
from recognition.data.index_store import IndexContent
from recognition.data.source import file_stamp, range_starts
from recognition.errors import UserError
from recognition.files.paths import shown


def filter_index(index: Index, keep: np.ndarray, output: Path) -> Index:
    """Save at `output` an index of the samples where `keep`, bool [N], is true, with labels made contiguous again.

    Raises UserError if `keep` has another shape or type, keeps nothing, or `output` holds something else.
    """
    keep = np.asarray(keep)
    if keep.shape != index.labels.shape or keep.dtype != np.bool_:
        raise UserError(f"keep must be {len(index)} booleans, not {keep.dtype} {keep.shape}")
    if not keep.any():
        raise UserError(f"{shown(index.path)}: no samples are kept")
    counts = np.diff(index.starts)
    kept, labels = np.unique(index.labels[keep], return_inverse=True)
    content = IndexContent(
        starts=range_starts(counts[keep]),
        ranges=index.ranges[np.repeat(keep, counts)],
        labels=labels,
        sizes=index.sizes,
        files=index.files.names,
        identities=PackedNames.of([index.identities[label] for label in kept]),
        stamp=file_stamp(index.files),
        roots=_absolute(index.files.roots),
    )
    return _save_derived(output, content)


def merge_indexes(indexes: Sequence[Index], output: Path, *, same_identities: bool = False) -> Index:
    """Save at `output` an index of all samples of `indexes`, one index after another.

    Identities of different indexes are different people, and identity `name` of index `i` is called `i/name`. With
    `same_identities`, equal names mean the same person. Raises UserError if `output` holds something else.
    """
    if not indexes:
        raise UserError("nothing to merge")
    first_file = np.cumsum([0] + [len(index.files) for index in indexes])
    ranges = np.concatenate([index.ranges for index in indexes])
    ranges["file"] += np.repeat(first_file[:-1], [len(index.ranges) for index in indexes]).astype(np.uint32)
    names = [index.files.names for index in indexes]
    files = PackedNames(
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
        names_here = index.identities if same_identities else (f"{number}/{name}" for name in index.identities)
        labels.append(np.array([new_labels.setdefault(name, len(new_labels)) for name in names_here])[index.labels])
    content = IndexContent(
        starts=range_starts(np.concatenate([np.diff(index.starts) for index in indexes])),
        ranges=ranges,
        labels=np.concatenate(labels),
        sizes=np.concatenate([index.sizes for index in indexes]),
        files=files,
        identities=PackedNames.of(list(new_labels)),
        stamp=file_stamp(DataFiles(roots, files)),
        roots=roots,
    )
    return _save_derived(output, content)


def _save_derived(output: Path, content: IndexContent) -> Index:
    """Save `content` at `output`, which must not hold anything else, as saving replaces the whole folder."""
    if (
        output.exists()
        and not (output / index_store.METADATA_FILE).is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        raise UserError(f"{shown(output)}: exists and is no index: choose another place")
    content = replace(content, notes=note_single_images(content))
    try:
        index_store.save(output, content)
    except OSError as error:
        raise UserError(f"{shown(error.filename or output)}: cannot write the index: {error.strerror}") from None
    return make_index(output, output, index_store.load(output), content.notes)


def _absolute(roots: Iterable[tuple[Path, int]]) -> tuple[tuple[Path, int], ...]:
    return tuple((root.resolve(), first) for root, first in roots)
