"""Images that cannot be decoded: telling them, listing them, and putting others in their place."""

import io
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from recognition.config import UserError
from recognition.data.index import Index
from recognition.data.order import Integers

MAX_PIXELS = 2**26
"""An image with more pixels is refused unread: decoders have no limit of their own."""

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode, so that the lines of several ranks do not mix.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(file, (json.dumps(facts, ensure_ascii=False) + "\n").encode())
            finally:
                os.close(file)
        except OSError as problem:
            _log.warning("%s cannot be written (%s): training goes on without it", self.path, problem.strerror)

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
    """Height and width of an encoded image, in pixels, found without decoding it (about 2 us for a JPEG).

    Raises BadImage for what is no image, is larger than MAX_PIXELS, or has no end, as a truncated file.
    """
    if encoded.startswith(b"\xff\xd8"):
        height, width = _jpeg_size(encoded)
        complete = encoded.rfind(b"\xff\xd9") > 0
    elif encoded.startswith(b"\x89PNG\r\n\x1a\n") and encoded[12:16] == b"IHDR":
        width, height = int.from_bytes(encoded[16:20]), int.from_bytes(encoded[20:24])
        complete = encoded.rfind(b"IEND") > 0
    else:
        height, width = _other_size(encoded)
        complete = True
    if not 0 < height * width <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; at most {MAX_PIXELS} are allowed")
    if not complete:
        raise BadImage("truncated: it has no end marker")
    return height, width


def _jpeg_size(encoded: bytes) -> tuple[int, int]:
    """From the frame header: walks the marker segments (ITU-T T.81, annex B) up to the first SOF."""
    place = 2
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(encoded[place + 5 : place + 7]), int.from_bytes(encoded[place + 7 : place + 9])
        elif marker in (0xD9, 0xDA):
            break
        else:
            place += 2 + int.from_bytes(encoded[place + 2 : place + 4])
    raise BadImage("a JPEG without a frame header")


def _other_size(encoded: bytes) -> tuple[int, int]:
    if not encoded:
        raise BadImage("no bytes")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError, Warning):
        raise BadImage("neither a JPEG nor a PNG, nor another image of a reasonable size") from None
