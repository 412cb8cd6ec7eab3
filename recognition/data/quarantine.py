"""Images that cannot be decoded: telling them, listing them, and putting others in their place."""

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np

from recognition.config import UserError
from recognition.data.index import Index
from recognition.data.order import Integers
from recognition.images import Undecodable, size

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
    """`recognition.images.size`, which raises BadImage here."""
    try:
        return size(encoded)
    except Undecodable as error:
        raise BadImage(str(error)) from None
