"""The lock of a folder, so that only one run writes to it: a file that names the process.

The file holds host, process and start. Where the file system has locks of its own (flock), they decide between the
processes of one machine, and a file whose process is gone is taken over. Processes of another
machine cannot be checked, so its file stays until somebody removes it.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recognition.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

NAME = ".lock"
_WRITTEN_WITHIN = 0.5
"""Seconds that another process may take from making the file to writing it."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process. Raises UserError where another one has, or where it cannot be written."""
    path = folder / NAME
    try:
        descriptor = _take(path)
    except OSError as error:
        raise UserError(f"run.folder: cannot write to {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        # By name first: whoever opened the file meanwhile sees that it is no longer the one of that name.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        try:
            descriptor, made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, made = os.open(path, os.O_RDWR), False
            except FileNotFoundError:
                continue
        try:
            if _claim(descriptor, path, made=made):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _claim(descriptor: int, path: Path, *, made: bool) -> bool:
    """Write this process into the file; False where the file has lost its name meanwhile. Raises UserError if taken."""
    if not _flock(descriptor):
        raise _refusal(path, _holder(descriptor, 4 * _WRITTEN_WITHIN))
    try:
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return False
    except FileNotFoundError:
        return False
    holder = None if made else _holder(descriptor, _WRITTEN_WITHIN)
    if holder is not None:
        if is_alive(holder):
            raise _refusal(path, holder)
        _log.warning("%s: its process %s is gone without leaving; this run goes on", path.parent, holder.get("pid"))
    own = this_process() | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(own) + "\n").encode(), 0)
    os.fsync(descriptor)
    return True


def _flock(descriptor: int) -> bool:
    """Take the file system's lock; returns False where another has it, True as well where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(descriptor: int, seconds: float) -> dict[str, Any] | None:
    """Read the process that the file names; None if it cannot be read after `seconds`, in which it may be written."""
    until = time.monotonic() + seconds
    while True:
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
            return found if isinstance(found, dict) else None
        except ValueError:
            if time.monotonic() > until:
                return None
            time.sleep(0.05)


def _refusal(path: Path, holder: dict[str, Any] | None) -> UserError:
    holder = holder or {"pid": "?", "host": "?", "since": "?"}
    elsewhere = holder.get("host") != socket.gethostname()
    gone = f" If that process is gone, remove {path}." if elsewhere else ""
    return UserError(
        f"run.folder: {path.parent} belongs to a run that is at work: process {holder.get('pid')} on "
        f"{holder.get('host')}, since {holder.get('since')}. Wait for it or stop it, or set another run.folder.{gone}"
    )


def this_process() -> dict[str, Any]:
    """Return the identity of this process: host, number and start."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_alive(process: dict[str, Any]) -> bool:
    """Return whether a process is alive, and its number not another's by now; one elsewhere is taken to be alive."""
    pid = process.get("pid")
    if process.get("host") != socket.gethostname():
        return True
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(pid) == process.get("started")


def _started(pid: int) -> str | None:
    """Return the start of a process in ticks since the machine's; None where it is unknown or the process is gone."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else numbers[18]
    except (OSError, IndexError, ValueError):
        return None
