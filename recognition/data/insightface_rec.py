"""Images in MXNet RecordIO without MXNet: find their byte ranges and labels, and write such files.

The payload of an image is `uint32 flag, float32 label, uint64 id, uint64 id2`, then `flag` float32 labels where flag is
positive, then the encoded image. InsightFace adds records without an image and with two labels: key 0 holds (end of
the image keys, end of the identity keys), and each identity key the range of the image keys that belong to it. Files
made by im2rec have none of these.
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
"""float32 holds every integer below this."""

_HEADER = struct.Struct("<IfQQ")
_WRONG_FILE = "Is this a file of face images?"


def scan(rec: Path) -> tuple[Records, np.ndarray]:
    """The encoded images of `rec` and their labels, int64 [N]; header and identity records are left out.

    Of a record with several labels, the first is the identity. Raises UserError as `read_records` does, and for a
    record that is no image's or whose label is not a whole number from 0.
    """
    found, heads = read_records(rec)
    first = found.starts[:-1]
    flags, labels = heads[:, 0].copy(), heads[:, 1].copy().view("<f4")
    several = flags > 0
    labels[several] = heads[several, 2].copy().view("<f4")
    # Pieces too short to hold all of the header: cut by a magic number, or a tiny image.
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
    found.skip(header)
    return found.select(~no_image), labels[~no_image].astype(np.int64)


def pack_image(label: float | Sequence[float], id: int, image: bytes, id2: int = 0) -> bytes:
    """An image record's payload: one label is stored in the header, a sequence of labels behind it."""
    if isinstance(label, Sequence):
        return _HEADER.pack(len(label), 0.0, id, id2) + struct.pack(f"<{len(label)}f", *label) + image
    return _HEADER.pack(0, label, id, id2) + image


class InsightFaceWriter:
    """Writes a training set in InsightFace's layout, streaming: `train.rec`, `train.idx` and `property`.

    Keys: 0 the header, then the images from 1 in the order in which they come, then one key per identity.
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
        """Append an encoded image. Labels ascend from 0; raises UserError where one is skipped or comes back."""
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
        """Write the identity records and the header, and move the files to their names."""
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
    """The first `count` bytes of a payload, or as many as there are."""
    beginning = b""
    with rec.open("rb") as file:
        for piece in range(found.starts[row], found.starts[row + 1]):
            file.seek(int(found.offsets[piece]))
            beginning += file.read(min(int(found.lengths[piece]), count - len(beginning)))
    return beginning


def _check_count(rec: Path, found: Records, no_image: np.ndarray, labels: np.ndarray) -> None:
    """Hold InsightFace's header record against the .idx, whose last lines are easily lost."""
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
