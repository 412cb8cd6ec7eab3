"""How train.py and the tools start and end: what is said of an error, and the exit status.

Knows nothing but the standard library until it is asked, so that it can also say which package is missing.
"""

import contextlib
import errno
import importlib.metadata
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator

MISTAKE, DEFECT, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141
_OLDEST = (3, 11)
# Names of packages that are not those of their modules.
_PACKAGES = {"PIL": "pillow", "nvidia": "nvidia-dali-cuda130"}
_POSIX = {"resource", "fcntl", "termios", "pwd", "grp"}
# What the machine lacks, and the program cannot mend.
_ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}


def run(main: Callable[[], int]) -> int:
    """Call `main` and return its exit status, or that of its error, which is told on standard error.

    2: a mistake of the user's, one message; 130: interrupted; 141: standard output was closed, as by `| head`;
    1: a defect of the program's, a traceback and how to report it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Names of files may be bytes that are no text.
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _close_standard_output()
        return CLOSED_PIPE
    except Exception as error:
        return _tell(error)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Have a package that is missing, while a program imports what it needs, end it with one sentence."""
    try:
        if sys.version_info < _OLDEST:
            raise ImportError(f"Python {'.'.join(map(str, _OLDEST))} or newer is needed; this is {_python()}")
        yield
    except ImportError as error:
        sys.exit(_tell(error))


def _tell(error: Exception) -> int:
    """Write what is to be said of an error; returns the exit status."""
    sentence = explained(error)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if sentence is None:
        text = "".join(traceback.format_exception(error)) + "\n" + _how_to_report()
        _write(text)
        return DEFECT
    _write(f"error: {sentence}\n")
    if isinstance(error, OSError):
        _close_standard_output()
    return MISTAKE


def explained(error: BaseException) -> str | None:
    """What the user can do about an error, in one message; None for a defect of the program."""
    from recognition.config.base import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ImportError):
        return _missing(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return f"out of memory: {str(error).splitlines()[0] if str(error) else 'none is left'}; take a smaller batch"
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in _ENVIRONMENT):
        named = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{named}{os.strerror(error.errno)}"
    return None


def _missing(error: ImportError) -> str | None:
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        if not error.name and "newer is needed" in str(error):
            return str(error)
        if module == "recognition":
            return None
        return f"a package is installed, but cannot be loaded: {error}; install it anew, all packages together"
    if module == "recognition":
        return None
    if module in _POSIX:
        return f"Python on {platform.system()} has no module {module}: Linux and macOS have it, and WSL on Windows"
    package = _PACKAGES.get(module, module)
    return f"the package {package} is missing here: {sys.executable} -m pip install {package}"


def _how_to_report() -> str:
    versions = [f"Python {_python()}", platform.platform()]
    for package in ("recognition", "torch", "timm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.insert(0, f"{package} {importlib.metadata.version(package)}")
    return (
        "This is a defect of the program. Please report it in the project's issue tracker, with the lines above and:\n"
        f"  {', '.join(versions)}\n  command: {shlex.join([sys.executable, *sys.argv])}\n"
    )


def _python() -> str:
    return platform.python_version()


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _close_standard_output() -> None:
    """Let the interpreter's own flush at its end find nothing to complain of."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
