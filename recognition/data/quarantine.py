"""Images that cannot be decoded: telling them, listing them, and putting others in their place."""

import json
import logging
import os
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recognition import images
from recognition.config import UserError
from recognition.data.index import Index
from recognition.data.order import Integers
from recognition.images import MAX_PIXELS

_BAD_ALWAYS_BORNE = 100
_BAD_SHARE_BORNE = 0.01
_LOGGED = 10

_log = logging.getLogger(__name__)


class BadImage(ValueError):
    """Why an image cannot be used."""


class Quarantine:
    """The samples of `index` found bad so far by this process; each is written to the file at `path` as it is found.

    The file is JSON lines {sample, label, where, error}. Ranks append to the same one, and none reads it, so a sample
    may be listed more than once. Safe to use from several threads.
    """

    def __init__(self, index: Index, path: Path | None) -> None:
        self.index, self.path = index, path
        self.bad: set[int] = set()
        self.limit = max(_BAD_ALWAYS_BORNE, int(index.num_images * _BAD_SHARE_BORNE))
        self._last = ""
        self._lock = threading.Lock()

    def add(self, sample: int, error: str) -> None:
        """Note that `sample` is bad, and why. Raises UserError once too many are."""
        with self._lock:
            if sample not in self.bad:
                self.bad.add(sample)
                self._list(sample, error)
            self._check()

    def replace(self, samples: Integers) -> Integers:
        """`samples` [n] with each bad one replaced by the next that is not known to be, in the index's cyclic order.

        When the replacements too are tried and added where bad, the outcome is the next sample that decodes, whatever
        else has been found on the way and by whom. Raises UserError once too many are bad.
        """
        with self._lock:
            self._check()
            replaced = [self._next(sample) if sample in self.bad else sample for sample in samples.tolist()]
        return np.array(replaced, np.int64)

    def _list(self, sample: int, error: str) -> None:
        where = self.index.describe(sample)
        level = logging.WARNING if len(self.bad) <= _LOGGED else logging.DEBUG
        _log.log(level, "%s cannot be used and is replaced: %s", where, error)
        self._last = f"{where}: {error}"
        if self.path is None:
            return
        facts = {"sample": sample, "label": int(self.index.labels[sample]), "where": where, "error": error}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode, so that the lines of several ranks do not mix.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, (json.dumps(facts, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)

    def _check(self) -> None:
        total = self.index.num_images
        if len(self.bad) > self.limit or len(self.bad) == total:
            listed = f" They are listed in {self.path}." if self.path else ""
            raise UserError(
                f"{len(self.bad)} of {total} images cannot be decoded, the last one being {self._last}.{listed} "
                "Repair the data or filter them out of the index"
            )

    def _next(self, sample: int) -> int:
        while sample in self.bad:
            sample = (sample + 1) % self.index.num_images
        return sample


def check_header(encoded: bytes) -> tuple[int, int]:
    """Height and width of an encoded image as they are stored, found without decoding it (about 2 us for a JPEG).

    Raises BadImage for what is no image, is larger than MAX_PIXELS, or has no end, as a truncated file.
    """
    if encoded.startswith(b"\xff\xd8"):
        frame = jpeg_frame(encoded)
        height, width = frame.height, frame.width
        complete = encoded.rfind(b"\xff\xd9") > 0
    elif encoded.startswith(b"\x89PNG\r\n\x1a\n") and encoded[12:16] == b"IHDR":
        width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
        complete = encoded.rfind(b"IEND") > 0
    else:
        try:
            height, width = images.size(encoded)
        except images.Undecodable as error:
            raise BadImage(str(error)) from None
        complete = True
    if not 0 < height * width <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are allowed")
    if not complete:
        raise BadImage("truncated: it has no end marker")
    return height, width


@dataclass(frozen=True)
class Frame:
    """What a JPEG's frame header says, and the Adobe marker before it."""

    marker: int
    """0xC0 and 0xC1 sequential, 0xC2 progressive; others are lossless, hierarchical, or of arithmetic coding."""
    bits: int
    height: int
    width: int
    components: int
    adobe: int | None
    """The colour transform that an Adobe marker tells: 0 is none, 1 is YCbCr, 2 is YCCK."""


def jpeg_frame(encoded: bytes) -> Frame:
    """Walk the marker segments (ITU-T T.81, annex B) up to the first frame header. Raises BadImage without one."""
    place, adobe = 2, None
    while place + 10 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", encoded, place + 4)
            return Frame(marker, bits, height, width, components, adobe)
        elif marker in (0xD9, 0xDA):
            break
        else:
            length = int.from_bytes(encoded[place + 2 : place + 4])
            if marker == 0xEE and encoded[place + 4 : place + 9] == b"Adobe" and length >= 14:
                adobe = encoded[place + 15]
            place += 2 + length
    raise BadImage("a JPEG without a frame header")
