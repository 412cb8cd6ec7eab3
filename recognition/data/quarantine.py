"""Images that cannot be used: telling them, listing them, and putting others in their place."""

import json
import logging
import os
import threading
from pathlib import Path

import numpy as np

from recognition.data.index import Index
from recognition.errors import UserError
from recognition.files.paths import shown
from recognition.images import Undecodable, size
from recognition.randomness import Integers

_BAD_ALWAYS_BORNE = 100
_BAD_SHARE_BORNE = 0.01
_LOGGED = 10
_NAMED = 3

_log = logging.getLogger(__name__)


class BadImage(ValueError):
    """Why an image cannot be used."""


class Quarantine:
    """The samples of `index` found bad so far by this process; each is written to the file at `path` as it is found.

    The file is JSON lines {sample, label, where, error}, and `lost` where the file could not be read. Ranks append to
    the same one, so a sample may be listed more than once. `going_on`: begin with what the file lists, but for what was
    lost, which may have come back. Safe to use from several threads.
    """

    def __init__(self, index: Index, path: Path | None, *, going_on: bool = False) -> None:
        self.index, self.path = index, path
        self.bad: set[int] = set()
        self.limit = max(_BAD_ALWAYS_BORNE, int(index.num_images * _BAD_SHARE_BORNE))
        self._first: list[str] = []
        self._lock = threading.Lock()
        if going_on and path is not None:
            self._load(path)

    def add(self, sample: int, error: str, *, lost: bool = False) -> None:
        """Note that `sample` is bad, and why. Raises UserError once too many are."""
        with self._lock:
            if sample not in self.bad:
                self.bad.add(sample)
                self._list(sample, error, lost=lost)
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

    def _list(self, sample: int, error: str, *, lost: bool) -> None:
        where = self.index.describe(sample)
        level = logging.WARNING if len(self.bad) <= _LOGGED else logging.DEBUG
        _log.log(level, "%s cannot be used and is replaced: %s", where, error)
        self._remember(where, error)
        if self.path is None:
            return
        facts = {"sample": sample, "label": int(self.index.labels[sample]), "where": where, "error": error}
        facts |= {"lost": True} if lost else {}
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

    def _load(self, path: Path) -> None:
        """Take over what an earlier part of the run has listed; lines that are cut or fit no sample are passed over."""
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                facts = json.loads(line)
                sample, label, where, error = (facts[name] for name in ("sample", "label", "where", "error"))
                fits = 0 <= sample < self.index.num_images and label == self.index.labels[sample]
            except (ValueError, KeyError, TypeError, IndexError):
                continue
            if fits and not facts.get("lost") and sample not in self.bad:
                self.bad.add(sample)
                self._remember(where, error)
        if self.bad:
            _log.info("%d images that could not be used before are left out (%s)", len(self.bad), shown(path))

    def _remember(self, where: str, error: str) -> None:
        if len(self._first) < _NAMED:
            self._first.append(f"{where}: {error}")

    def _check(self) -> None:
        total = self.index.num_images
        if len(self.bad) > self.limit or len(self.bad) == total:
            raise UserError(
                f"{len(self.bad)} of {total} images cannot be used, the first ones being {'; '.join(self._first)}. "
                + self._way_out()
            )

    def _way_out(self) -> str:
        if self.path is None:
            return "Repair the data, or leave these images out"
        listed = shown(self.path)
        return (
            f"{listed} lists them. Bring lost files back and start again; or begin another run, on repaired files or "
            f"without these images: `recognition index filter DATA OUT --exclude-samples {listed}`, data.path=OUT"
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
