"""Start and end of the programs: exit status, the message of an error, and the rank that writes it."""

import contextlib
import json
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from recognition.errors import user_message

DEFECT, MISTAKE, REQUEUE, INTERRUPTED, CLOSED_PIPE = 1, 2, 75, 130, 141
STATUSES = {
    0: "complete",
    DEFECT: "a defect of the program, or a check that failed",
    MISTAKE: "a mistake in what was given, or something that the machine lacks",
    REQUEUE: "reserved: to be started again (EX_TEMPFAIL); nothing ends so yet",
    INTERRUPTED: "interrupted; a run has left a checkpoint",
    CLOSED_PIPE: "standard output was closed, as by `| head`",
}
"""Meaning of each exit status."""
OLDEST = (3, 11)
"""The oldest Python that will do."""


def run(main: Callable[[], int]) -> int:
    """Call `main` and return its exit status, or that of its error, which is printed on standard error.

    `STATUSES` lists the exit statuses. A mistake is printed as one message, a defect as a traceback with advice on how
    to report it. Each rank prints only its own errors, not those that follow from another rank's.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # File names may contain bytes that are not valid text.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _close_standard_output()
        return CLOSED_PIPE
    except Exception as error:
        return _tell(error)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Have an import of a package that is missing, or that cannot be loaded, end the program with one sentence."""
    if sys.version_info < OLDEST:
        sys.exit(f"error: Python {'.'.join(map(str, OLDEST))} or newer is needed; this is {platform.python_version()}")
    try:
        yield
    except ImportError as error:
        sys.exit(_tell(error))


def _tell(error: Exception) -> int:
    """Write what is to be said of an error; returns the exit status."""
    if isinstance(error, OSError):
        _close_standard_output()
    from recognition.errors import FailedElsewhere

    if isinstance(error, FailedElsewhere):
        _keep_for_launcher("stopped, because another rank had failed", time.time() + 1)
        if error.is_far and _local_rank() == "0":
            _write(f"error: {error}\n")
        return error.status
    sentence = user_message(error)
    notes = getattr(error, "__notes__", [])
    if sentence is None:
        text = "".join(traceback.format_exception(error)) + _how_to_report()
        status = DEFECT
    else:
        text = "\n".join([f"error: {sentence}", *notes]) + "\n"
        status = MISTAKE
    _keep_for_launcher(text, time.time())
    # Where ranks have not met yet, all of a machine meet the same mistakes: its first one tells them, and what another
    # meets alone stands in the launcher's report.
    if notes or _local_rank() == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        _write(text)
    return status


def _keep_for_launcher(text: str, at: float) -> None:
    """Give a reason to torchrun, whose report of failed processes ends with that of the first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": text.strip(), "extraInfo": {"timestamp": str(int(at))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _local_rank() -> str:
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"):
        if name in os.environ:
            return os.environ[name]
    return "0"


def _how_to_report() -> str:
    import importlib.metadata

    versions = [f"Python {platform.python_version()}", platform.platform()]
    for package in ("timm", "torch", "recognition"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.insert(0, f"{package} {importlib.metadata.version(package)}")
    return (
        "\nThis is a defect of the program. Please report it in the project's issue tracker, with the lines above and\n"
        f"  {', '.join(versions)}\n  {shlex.join([sys.executable, *sys.argv])}\n"
    )


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _close_standard_output() -> None:
    """Let the interpreter's own flush at its end find nothing to complain of."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
