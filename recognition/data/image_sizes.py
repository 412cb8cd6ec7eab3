"""The sizes of the images that are read, counted where they are not the wanted one."""

import logging
import threading
from collections import Counter

_NAMED = 5
_FITTED = {
    "resize": 'scaled to it, which changes the proportions of those that are not square (data.fit = "resize")',
    "crop": 'cut to their middle square and scaled to it (data.fit = "crop")',
    "exact": 'refused (data.fit = "exact")',
}

_log = logging.getLogger(__name__)


class SizeCounter:
    """Counts heights and widths; warns of the first that is not `wanted` x `wanted`. Safe to use from any threads.

    fit: what is done with such images, as `data.fit` says it.
    """

    def __init__(self, wanted: int, fit: str) -> None:
        self._wanted, self._fit = wanted, fit
        self._counts: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()

    def note(self, height: int, width: int) -> None:
        """Count an image."""
        with self._lock:
            is_first = not self._has_others()
            self._counts[height, width] += 1
            if is_first and self._has_others():
                wanted, done = self._wanted, _FITTED[self._fit]
                what = "an image has %d x %d pixels: those that are not %d x %d are %s"
                _log.warning(what, width, height, wanted, wanted, done)

    def report(self) -> str:
        """How many images had another size than the wanted one, and which; empty if none had."""
        with self._lock:
            if not self._has_others():
                return ""
            total = self._counts.total()
            others = Counter(self._counts)
            del others[self._wanted, self._wanted]
        read = f"{others.total():,} of {total:,} images read were not {self._wanted} x {self._wanted} ({describe_sizes(others)})"
        return f"{read}: they are {_FITTED[self._fit]}"

    def _has_others(self) -> bool:
        return len(self._counts) > ((self._wanted, self._wanted) in self._counts)


def describe_sizes(counts: Counter[tuple[int, int]]) -> str:
    """The most frequent of some sizes, (height, width), as width x height."""
    named = counts.most_common(_NAMED)
    text = ", ".join(f"{width} x {height}: {number:,}" for (height, width), number in named)
    return text + (f" and {len(counts) - _NAMED:,} other sizes" if len(counts) > _NAMED else "")
