"""Logging: to standard error and, once a run's folder is there, to its `log.txt`.

A record is one line, whatever its text holds. A warning that comes again and again is shown a few times, then counted.
"""

import errno
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recognition.tracking import terminal

SHOWN = 3
"""Number of times that a warning is shown before it is only counted."""

_HARMLESS = {
    # torch.compile asks for CUDA's folder on machines without a GPU too, where nothing is missed.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Beginnings of libraries' records that users need not see, by logger."""

_PACKAGE = "recognition"
_log = logging.getLogger(__name__)
_active: list["Log"] = []


class Appender:
    """A file to which whole records are appended.

    A record that cannot be written, as on a full disk, is dropped, with one warning; later records are tried again.
    Raises OSError only where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size
        self._warned = False

    def write(self, record: bytes) -> None:
        """Append a record in one write, or leave the file as it was."""
        try:
            if not os.fstat(self._file).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "it was removed")
            if os.write(self._file, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            if not self._warned:
                self._warned = True
                _log.warning("%s cannot be written (%s): training goes on without it", self.path, error.strerror)
        else:
            self._size += len(record)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            with suppress(OSError):
                os.close(file)


class Line(logging.Formatter):
    """A formatter that makes a record's text one line, without control characters; a traceback follows as it is."""

    def __init__(self, form: str, date: str = "%Y-%m-%d %H:%M:%S") -> None:
        super().__init__(form, date)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Fill in the form."""
        text = record.message
        if record.name == "py.warnings":
            text = text.partition("\n")[0]  # the second line is the source code's
        record.message = terminal.escape(text) + getattr(record, "count", "")
        return super().formatMessage(record)


class Log(logging.Handler):
    """The root logger's handler during a run, which writes each record to standard error and to `log.txt`.

    Ranks but the first write no file, and only warnings, marked with their rank.
    """

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING if rank else logging.INFO)
        self.rank = rank
        self._terminal = terminal.Handler()
        self._terminal.setFormatter(_formatter(rank))
        self._early: list[logging.LogRecord] = []
        self._file: Appender | None = None
        self._lines = Line("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._times: Counter[tuple[str, str]] = Counter()
        self._last: dict[tuple[str, str], str] = {}

    def write_to(self, path: Path) -> None:
        """Write to a file from now on, and first the records from before. Raises OSError."""
        self._file = Appender(path)
        for record in self._early:
            self._write(record)
        self._early.clear()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless it is a warning that came too often."""
        if record.levelno >= logging.WARNING and not self._is_shown(record):
            return
        if not self.rank:
            if self._file is None:
                self._early.append(record)
            else:
                self._write(record)
        self._terminal.handle(record)

    def close(self) -> None:
        """Log how often each warning came that was not always shown, and close the file."""
        for key, times in self._times.items():
            if times > SHOWN:
                text = "%s times in all, the last: %s"
                logging.getLogger(key[0]).warning(text, f"{times:,}", self._last[key], extra={"count": ""})
        if self._file is not None:
            self._file.close()
        super().close()

    def _is_shown(self, record: logging.LogRecord) -> bool:
        """Count a warning by its text without its arguments; the first three and each power of ten are shown."""
        if hasattr(record, "count"):
            return True
        # A text of its own that is passed as an argument is what tells such warnings apart.
        message = record.getMessage()
        key = record.name, message if record.msg == "%s" else str(record.msg)
        self._times[key] += 1
        self._last[key] = message
        times = self._times[key]
        if times > SHOWN:
            record.count = f" ({times:,} times so far)"
        return times <= SHOWN or (set(str(times)[1:]) == {"0"} and str(times)[0] == "1")

    def _write(self, record: logging.LogRecord) -> None:
        assert self._file is not None
        self._file.write((self._lines.format(record) + "\n").encode("utf-8", "backslashreplace"))


class _DropPrefix(logging.Filter):
    """A filter that drops records by their beginning."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


@contextmanager
def setup_logging(rank: int = 0) -> Iterator[Log]:
    """Log this package's records and Python's warnings in here; a nested call returns the outer one's handler."""
    if _active:
        yield _active[-1]
        return
    log, root, package = Log(rank), logging.getLogger(), logging.getLogger(_PACKAGE)
    level, shown = package.level, warnings.showwarning
    root.addHandler(log)
    if not rank:
        package.setLevel(logging.INFO)
    logging.captureWarnings(True)
    quiet = {logging.getLogger(name): _DropPrefix(text) for name, text in _HARMLESS.items()}
    for logger, drop in quiet.items():
        logger.addFilter(drop)
    _active.append(log)
    try:
        yield log
    finally:
        log.close()
        _active.remove(log)
        logging.captureWarnings(False)
        warnings.showwarning = shown
        package.setLevel(level)
        root.removeHandler(log)
        for logger, drop in quiet.items():
            logger.removeFilter(drop)


def _formatter(rank: int) -> Line:
    if rank:
        return Line(f"[rank {rank}] %(levelname)s %(name)s: %(message)s")
    # A terminal may be narrow, so the date is left out.
    return _TerminalLine() if terminal.is_terminal() else Line("%(asctime)s %(levelname)s %(message)s")


class _TerminalLine(Line):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")
        self._warning = Line("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "is_block", False):
            return terminal.escape(record.getMessage())
        return self._warning.format(record) if record.levelno >= logging.WARNING else super().format(record)
