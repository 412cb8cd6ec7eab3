"""Standard error: log lines and, on a terminal, the one live display of a process below them."""

import logging
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

_WRAP: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}

Row = Callable[[int], RenderableType]
"""A line of the live display as a function of the terminal's columns."""


def is_terminal() -> bool:
    """Return whether standard error is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def is_local_main() -> bool:
    """Return whether this process is the first rank of its machine, which alone shows progress."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def row(line: Row) -> Iterator[None]:
    """Show a line of the live display; nothing happens where standard error is no terminal."""
    if not is_terminal():
        yield
        return
    _display.add(line)
    try:
        yield
    finally:
        _display.remove(line)


def width() -> int:
    """Return the number of columns of the terminal."""
    return Console(file=sys.stderr).width


def write(text: str) -> None:
    """Write a line, above the live display while there is one."""
    _display.write(text)


def fit(parts: Sequence[tuple[int, str]], width: int) -> str:
    """Join the texts of `parts`, (rank, text) each, and drop those of the highest ranks until they fit `width`."""
    parts = [(rank, text) for rank, text in parts if text]
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        parts.remove(max(parts, key=lambda part: part[0]))
    return "  ".join(text for _, text in parts)


def escape(text: str) -> str:
    """Make a text one line that any encoding of Unicode takes: control characters and undecodable bytes as escapes."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class Handler(logging.Handler):
    """A handler that writes records to standard error, without the progress that the live display shows itself.

    On a terminal a line is broken between words, unless it is part of a block, whose commands are copied whole.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not (getattr(record, "is_progress", False) and is_terminal()):
            try:
                line = self.format(record)
                if is_terminal() and not getattr(record, "is_block", False) and not record.exc_info:
                    line = textwrap.fill(line, max(width(), 20), **_WRAP)
                write(line)
            except Exception:
                self.handleError(record)


class _Display:
    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._live: Live | None = None
        self._lock = threading.RLock()

    def add(self, line: Row) -> None:
        with self._lock:
            self._rows.append(line)
            if self._live is None:
                console = Console(file=sys.stderr, force_terminal=True)
                self._live = Live(self, console=console, refresh_per_second=4, transient=True)
                self._live.start()

    def remove(self, line: Row) -> None:
        with self._lock:
            self._rows.remove(line)
            if not self._rows and self._live is not None:
                live, self._live = self._live, None
                live.stop()

    def write(self, text: str) -> None:
        with self._lock:
            if self._live is None:
                if not is_local_main() and is_terminal():
                    # The live display there is another process's, which will draw it anew, by going up a line at most.
                    text = f"\r\x1b[K{text}\n"
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
            else:
                # As Text, nothing in it is taken for markup or an emoji's name.
                self._live.console.print(Text(text), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in list(self._rows):
            yield line(options.max_width)


_display = _Display()
