"""Unusable images: detecting, recording and replacing them."""

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

_ALWAYS_TOLERATED = 100
_TOLERATED_SHARE = 0.01
_MOST_LOGGED = 10
_MOST_NAMED = 3

_log = logging.getLogger(__name__)


class BadImage(ValueError):
    """An image that cannot be used; the text says why."""


class Quarantine:
    """The unusable samples of `index` that this process knows of; each is appended to the file at `path` when found.

    The file holds JSON lines {sample, label, where, error}, and `lost` if the image's file could not be read. All
    ranks append to it, so it may list a sample several times. `resumed`: start from the samples that the file lists,
    except the lost ones, which may be back. Safe to use from several threads.
    """

    def __init__(self, index: Index, path: Path | None, *, resumed: bool = False) -> None:
        self.index, self.path = index, path
        self.bad: set[int] = set()
        self.limit = max(_ALWAYS_TOLERATED, int(index.num_images * _TOLERATED_SHARE))
        self._first: list[str] = []
        self._lock = threading.Lock()
        if resumed and path is not None:
            self._load(path)

    def add(self, sample: int, error: str, *, lost: bool = False) -> None:
        """Record that `sample` is unusable, and why. Raises UserError once there are too many."""
        with self._lock:
            if sample not in self.bad:
                self.bad.add(sample)
                self._record(sample, error, lost=lost)
            self._check()

    def replace(self, samples: Integers) -> Integers:
        """Return `samples` [n], each unusable one replaced by the next sample of the index not known to be unusable.

        The last sample is followed by the first. A caller that tries the replacements, adds those that fail and asks
        again arrives at the next sample that decodes, whatever was known before: so the result does not depend on the
        rank. Raises UserError once too many are unusable.
        """
        with self._lock:
            self._check()
            replaced = [self._next(sample) if sample in self.bad else sample for sample in samples.tolist()]
        return np.array(replaced, np.int64)

    def _record(self, sample: int, error: str, *, lost: bool) -> None:
        where = self.index.describe(sample)
        level = logging.WARNING if len(self.bad) <= _MOST_LOGGED else logging.DEBUG
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
        """Read the samples that an earlier part of the run has recorded; skip lines that are cut or match no sample."""
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
        if len(self._first) < _MOST_NAMED:
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
    """Return height and width as `recognition.images.size` does, but raise BadImage."""
    try:
        return size(encoded)
    except Undecodable as error:
        raise BadImage(str(error)) from None
