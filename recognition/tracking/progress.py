"""Progress of work that takes a while: a bar on a terminal, elsewhere a log line now and then."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from recognition.tracking import terminal

AFTER = 1.0
"""Seconds before the first log line: shorter work is not worth one."""
EVERY = 15.0
"""Seconds between log lines."""
_BAR = 16

_log = logging.getLogger(__name__)
_listeners: list[Callable[[], None]] = []


class Advance(Protocol):
    """A function that reports progress."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Report that `done` units are done so far, of `total`, if that is found out on the way."""


def on_advance(callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` whenever work advances; returns a function that ends that."""
    _listeners.append(callback)
    return lambda: _listeners.remove(callback)


@contextmanager
def task(what: str, total: int | None = None, unit: str = "images", *, after: float = AFTER) -> Iterator[Advance]:
    """Show the progress of `what` inside the block: units done, as `advance(done)` reports them, of `total`.

    Only a machine's first rank shows anything. `after`: seconds before the first log line. May be nested.
    """
    work = _Work(terminal.escape(what), unit, total)

    def advance(done: int, total: int | None = None) -> None:
        work.done, work.total = done, work.total if total is None else total
        for callback in tuple(_listeners):
            callback()

    if not terminal.is_local_main():
        yield advance
        return
    with terminal.row(work.row), _log_regularly(work, after):
        yield advance


@dataclass
class _Work:
    what: str
    unit: str
    total: int | None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def counted(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self.unit}" if self.done else ""
        return f"{self.done:,}/{self.total:,} {self.unit}"

    def left(self) -> str:
        """Return the remaining time, or the time so far where the remaining one is unknown."""
        if self.total and self.done:
            return f"{_clock(self.seconds * (self.total / self.done - 1))} left"
        return _clock(self.seconds)

    def row(self, width: int) -> RenderableType:
        text = terminal.fit([(0, self.what), (1, self.counted()), (2, self.left())], width)
        grid = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [Text(text, no_wrap=True, overflow="ellipsis")]
        if self.total and width >= len(text) + 2 + _BAR:
            cells.append(ProgressBar(self.total, self.done, _BAR))
        grid.add_row(*cells)
        return grid


@contextmanager
def _log_regularly(work: _Work, after: float) -> Iterator[None]:
    """Log the work from a thread of its own, as the code at work may not return for minutes."""
    finished = threading.Event()
    said = False

    def log() -> None:
        nonlocal said
        pause = after
        while pause <= 0 or not finished.wait(pause):
            said, pause = True, EVERY
            counted, seconds = work.counted(), work.seconds
            _log_line(
                work.what + (f": {counted}" if counted else "") + (f" after {seconds:.0f} s" if seconds > 5 else "")
            )

    thread = threading.Thread(target=log, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
    if said and work.seconds > AFTER:
        _log_line(f"{work.what}: done in {work.seconds:.0f} s")


def _log_line(text: str) -> None:
    """Log a line; before logging is set up, write it to standard error unless a live display shows the progress."""
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info("%s", text, extra={"is_progress": True})
    elif not terminal.is_terminal():
        terminal.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} INFO {text}")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
