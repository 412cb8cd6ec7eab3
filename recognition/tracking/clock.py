"""The speed of a run, and its remaining time with the verifications and checkpoints that are to come."""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

WINDOW = 20
"""Records over which the throughput is measured."""


@dataclass(frozen=True)
class Eta:
    """The remaining time of a run."""

    seconds: float
    """Time of the remaining steps, and of the remaining pauses of each kind that has been measured."""
    verifications: int = 0
    """Number of remaining verifications, where none has been measured yet."""

    def __str__(self) -> str:
        return f"ETA {timedelta(seconds=round(self.seconds))}{self._more('plus')}"

    def about(self) -> str:
        """Return the remaining time in words, rounded to what can be known."""
        return _about(self.seconds) + self._more("and")

    def _more(self, joined: str) -> str:
        some = f" {joined} {self.verifications:,} verification{'s' if self.verifications > 1 else ''}"
        return some if self.verifications else ""


class Clock:
    """Measures steps per second over the last records, without the pauses, and the wait for data.

    `every`: for a kind of pause (`verification`, `saving`), the numbers of steps at whose multiples there is one; one
    follows the last step too. 0 has no multiples.
    """

    def __init__(self, total_steps: int = 0, every: Mapping[str, Sequence[int]] | None = None) -> None:
        self.total_steps, self.every = total_steps, dict(every or {})
        self._started = time.monotonic()
        self._paused: dict[str, list[float]] = {}
        self._marks: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)
        self._first: tuple[int, float] | None = None
        self._data_seconds: float | None = None
        self._data_step: int | None = None

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time in here as a wait for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._data_seconds = (self._data_seconds or 0.0) + time.monotonic() - start

    def data_seconds(self, step: int, start_step: int) -> float | None:
        """Return the wait for data per step since the last call, or since `start_step`; None if none was measured."""
        seconds, since = self._data_seconds, start_step if self._data_step is None else self._data_step
        if seconds is None or step <= since:
            return None
        self._data_seconds, self._data_step = 0.0, step
        return seconds / (step - since)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Count the time in here as a pause of `kind`. Not to be nested."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused.setdefault(kind, []).append(time.monotonic() - start)

    def last_pause(self, kind: str) -> float:
        """Return the seconds of the last pause of `kind`."""
        return self._paused[kind][-1]

    def rate(self, step: int) -> float | None:
        """Return the steps per second up to `step`, which was just done.

        None for the first: it includes starting, compiling and filling queues, so the window begins after it.
        """
        self._marks.append((step, time.monotonic() - self._paused_seconds()))
        self._first = self._first or self._marks[0]
        return _rate(self._marks[0], self._marks[-1])

    def seconds(self) -> float:
        """Return the time since this clock was created, pauses included."""
        return time.monotonic() - self._started

    def mean_rate(self) -> float | None:
        """Return the steps per second up to the last record, without the first step."""
        return _rate(self._first, self._marks[-1]) if self._first else None

    def eta(self, step: int, rate: float) -> Eta:
        """Estimate the time after `step`, whose own pauses are still ahead, at `rate` steps per second."""
        seconds, unknown = (self.total_steps - step) / rate, 0
        for kind, every in self.every.items():
            times = self._paused.get(kind)
            to_come = 1 + _multiples(every, self.total_steps - 1) - _multiples(every, step - 1)
            if times:
                seconds += to_come * sum(times) / len(times)
            elif kind == "verification":
                unknown = to_come
        return Eta(seconds, unknown)

    def _paused_seconds(self) -> float:
        return sum(sum(times) for times in self._paused.values())


def pause_intervals(saving: int, verification: int | None) -> dict[str, tuple[int, ...]]:
    """Return a `Clock`'s `every` for a run that saves every `saving` steps and verifies every `verification` steps.

    A verification follows a checkpoint, so there are checkpoints at its steps too. None: there are no verifications.
    """
    if verification is None:
        return {"saving": (saving,)}
    return {"saving": (saving, verification), "verification": (verification,)}


def _multiples(numbers: Sequence[int], end: int) -> int:
    """Count the numbers from 1 to `end` that are multiples of any of `numbers`, by inclusion and exclusion."""
    numbers = [number for number in numbers if number]
    chosen = [some for size in range(1, len(numbers) + 1) for some in itertools.combinations(numbers, size)]
    return sum((-1) ** (len(some) + 1) * (end // math.lcm(*some)) for some in chosen)


def _rate(start: tuple[int, float], end: tuple[int, float]) -> float | None:
    (first, then), (last, now) = start, end
    return (last - first) / (now - then) if last > first and now > then else None


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"about {math.ceil(seconds / 10) * 10} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600)} hours" if seconds < 36 * 3600 else f"about {round(seconds / 86400)} days"
