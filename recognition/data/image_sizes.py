"""A count of the image sizes that training reads, for a warning about those that are not the model's."""

import logging
import threading
from collections import Counter

_MOST_LISTED = 5
_TREATMENT = {
    "resize": 'scaled to it, which changes the proportions of those that are not square (data.fit = "resize")',
    "crop": 'cut to their middle square and scaled to it (data.fit = "crop")',
    "exact": 'refused (data.fit = "exact")',
}

_log = logging.getLogger(__name__)


class SizeCounter:
    """Counter of image sizes, which warns of the first one that is not `wanted` x `wanted`. Safe to use from threads.

    fit: the value of `data.fit`, which decides the treatment of such images.
    """

    def __init__(self, wanted: int, fit: str) -> None:
        self._wanted, self._fit = wanted, fit
        self._counts: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()

    def add(self, height: int, width: int) -> None:
        """Count an image of `height` x `width` pixels."""
        with self._lock:
            is_first = not self._has_others()
            self._counts[height, width] += 1
            if is_first and self._has_others():
                wanted, done = self._wanted, _TREATMENT[self._fit]
                what = "an image has %d x %d pixels: those that are not %d x %d are %s"
                _log.warning(what, width, height, wanted, wanted, done)

    def report(self) -> str:
        """Return a sentence on the images of other sizes, or an empty text if there were none."""
        with self._lock:
            if not self._has_others():
                return ""
            total = self._counts.total()
            others = Counter(self._counts)
            del others[self._wanted, self._wanted]
        read = f"{others.total():,} of {total:,} images read were not {self._wanted} x {self._wanted}"
        return f"{read} ({describe_sizes(others)}): they are {_TREATMENT[self._fit]}"

    def _has_others(self) -> bool:
        return len(self._counts) > ((self._wanted, self._wanted) in self._counts)


def describe_sizes(counts: Counter[tuple[int, int]]) -> str:
    """List the most frequent of some sizes, counted by (height, width), as `width x height: count`."""
    named = counts.most_common(_MOST_LISTED)
    text = ", ".join(f"{width} x {height}: {number:,}" for (height, width), number in named)
    return text + (f" and {len(counts) - _MOST_LISTED:,} other sizes" if len(counts) > _MOST_LISTED else "")
