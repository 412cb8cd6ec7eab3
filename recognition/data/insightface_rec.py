"""Face images in RecordIO, as InsightFace and im2rec write them: byte ranges and labels of the images, and a writer.

The payload of an image is `uint32 flag, float32 label, uint64 id, uint64 id2`, then `flag` float32 labels where flag is
positive, then the encoded image. InsightFace adds records with two labels and no image: key 0 holds (end of the
image keys, end of the identity keys), and each identity key the range of its image keys. Files by im2rec have no such
records.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from recognition.data.recordio import Records, RecordWriter, bad_record, read_records
from recognition.errors import UserError
from recognition.files.atomic import write_text
from recognition.files.paths import shown

EXACT_LABELS = 1 << 24
"""Bound below which float32 holds every integer."""

_HEADER = struct.Struct("<IfQQ")
_WRONG_FILE = "Is this a file of face images?"


def scan(rec: Path) -> tuple[Records, np.ndarray]:
    """Find the encoded images of `rec` and their labels, int64 [N]; header and identity records are left out.

    The first of several labels is the identity. Raises UserError as `read_records` does, and for a record that holds no
    image or has a label that is not a whole number from 0.
    """
    found, heads = read_records(rec)
    first = found.starts[:-1]
    flags, labels = heads[:, 0].copy(), heads[:, 1].copy().view("<f4")
    several = flags > 0
    labels[several] = heads[several, 2].copy().view("<f4")
    # The header is not within the first piece of a tiny image, or where a magic number divides it.
    for row in np.flatnonzero(found.lengths[first] < _HEADER.size + 4).tolist():
        head = _beginning(rec, found, row, _HEADER.size + 4)
        if len(head) < _HEADER.size:
            raise bad_record(rec, found, row, "is too short for an image's header", _WRONG_FILE)
        flags[row], labels[row] = _HEADER.unpack_from(head)[:2]
        if flags[row] > 0 and len(head) == _HEADER.size + 4:
            labels[row] = struct.unpack_from("<f", head, _HEADER.size)[0]

    header = _HEADER.size + 4 * flags.astype(np.int64)
    total = np.add.reduceat(found.lengths.astype(np.int64), first)
    for row in np.flatnonzero(header > total).tolist():
        raise bad_record(rec, found, row, f"announces {flags[row]} labels but is too short", _WRONG_FILE)
    no_image = (flags == 2) & (header == total)
    _check_count(rec, found, no_image, labels)
    is_identity = (labels >= 0) & (labels < np.inf) & (labels == np.floor(labels))
    for row in np.flatnonzero(~no_image & ~is_identity).tolist():
        raise bad_record(rec, found, row, f"has label {labels[row]}", "Labels are whole numbers from 0: pack it again.")
    if no_image.all():
        raise UserError(f"{shown(rec)}: holds no images, only header records: pack it again")
    highest = labels[~no_image].max()
    if highest >= EXACT_LABELS:
        note = (
            f"{shown(rec.name)}: labels reach {int(highest)}, but float32, in which RecordIO stores them, is exact "
            f"only below {EXACT_LABELS}: identities may have been merged when the file was written"
        )
        found = replace(found, notes=(*found.notes, note))
    found.skip_bytes(header)
    return found.select(~no_image), labels[~no_image].astype(np.int64)


def pack_image(label: float | Sequence[float], id: int, image: bytes, id2: int = 0) -> bytes:
    """Pack an image record's payload: one label goes into the header, a sequence of labels behind it."""
    if isinstance(label, Sequence):
        return _HEADER.pack(len(label), 0.0, id, id2) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, id, id2) + image


class InsightFaceWriter:
    """Writer of a training set in InsightFace's layout, image by image: `train.rec`, `train.idx` and `property`.

    Key 0 is the header, the images follow from 1 in the order of writing, then one key per identity.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._property = folder / "property"
        self._writer = RecordWriter(folder / "train.rec")
        self._writer.write(0, pack_image((0.0, 0.0), 0, b""))
        self._first_keys = array("q")
        self._next_key = 1
        self._label = -1
        self._size = (0, 0)

    def add(self, label: int, image: bytes) -> None:
        """Append an encoded image. Labels ascend from 0; raises UserError if one is skipped or comes back."""
        if label not in (self._label, self._label + 1) or label < 0:
            raise UserError(f"identity {label} after identity {self._label}: labels must count up from 0, grouped")
        if label != self._label:
            self._first_keys.append(self._next_key)
            self._label = label
        if self._next_key == 1:
            self._size = _image_size(image)
        self._writer.write(self._next_key, pack_image(label, self._next_key, image))
        self._next_key += 1

    def close(self) -> None:
        """Write the identity records and the header, and give the files their names."""
        end = self._next_key
        for number, first in enumerate(self._first_keys):
            after = self._first_keys[number + 1] if number + 1 < len(self._first_keys) else end
            self._writer.write(end + number, pack_image((first, after), end + number, b""))
        self._writer.rewrite(0, pack_image((end, end + len(self._first_keys)), 0, b""))
        self._writer.close()
        width, height = self._size
        write_text(self._property, f"{len(self._first_keys)},{height},{width}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.abort()


def _image_size(image: bytes) -> tuple[int, int]:
    try:
        with Image.open(BytesIO(image)) as opened:
            return opened.size
    except (UnidentifiedImageError, OSError):
        return 0, 0


def _beginning(rec: Path, found: Records, row: int, count: int) -> bytes:
    """Read the first `count` bytes of a payload, or as many as there are."""
    beginning = b""
    with rec.open("rb") as file:
        for piece in range(found.starts[row], found.starts[row + 1]):
            file.seek(int(found.offsets[piece]))
            beginning += file.read(min(int(found.lengths[piece]), count - len(beginning)))
    return beginning


def _check_count(rec: Path, found: Records, no_image: np.ndarray, labels: np.ndarray) -> None:
    """Check InsightFace's header record against the .idx, whose last lines are easily lost. Raises UserError."""
    header = np.flatnonzero(no_image & (found.keys == 0))
    idx = rec.with_suffix(".idx")
    if not idx.is_file() or len(header) != 1 or labels[header[0]] >= EXACT_LABELS:
        return
    announced, listed = int(labels[header[0]]) - 1, int((~no_image).sum())
    if announced != listed:
        raise UserError(
            f"{shown(rec)}: its header record announces {announced} images, {shown(idx.name)} lists {listed}. "
            "Copy the .idx again, or remove it: the .rec file is then read from end to end."
        )
