"""The errors that are meant for the user, and messages for others that the user can do something about.

Needs the standard library alone, so it can say which package is missing.
"""

import errno
import importlib.util
import os
import platform
import shlex
import sys
from pathlib import Path

# Names of packages that are not those of their modules.
_PACKAGES = {"PIL": "pillow", "nvidia": "nvidia-dali-cuda130"}
_EXTRAS = {
    "evaluate": ("onnx", "onnxruntime"),
    "export": ("onnxscript",),
    "train": ("torch", "torchvision", "timm", "tensorboard", "safetensors"),
}
"""The extra of pyproject.toml that most of those need who lack one of these packages."""
_POSIX = {"resource", "fcntl", "termios", "pwd", "grp"}
# What the machine lacks, and the program cannot mend.
_LACKING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}


class UserError(ValueError):
    """A mistake in what the user gave. Programs print it without a traceback and exit with status 2."""


class FailedElsewhere(UserError):
    """Another rank failed first and reports the reason; this one cannot go on without it."""

    is_far = False
    """Whether that rank is on another machine, whose messages this machine's user may not see."""
    status = 2
    """Its exit status."""


def user_message(error: BaseException) -> str | None:
    """Return the message on an error that the user can do something about; None for a defect of the program."""
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, UserError):
        return str(error)
    # torch has an OutOfMemoryError of its own, and a RuntimeError of its allocator on a CPU.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "alloc_cpu.cpp" in str(error):
        what = str(error).strip().splitlines() or ["none is left"]
        return f"the memory has run out: {what[0]}\nTake a smaller batch, smaller images, or a smaller model"
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in _LACKING):
        named = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return f"{named}{os.strerror(error.errno)}"
    return None


def _missing(error: ImportError) -> str | None:
    """Return the message on a package that cannot be imported; None for a module of this program."""
    module = (error.name or "").partition(".")[0]
    if module == "recognition":
        return None
    if not isinstance(error, ModuleNotFoundError):
        package = _PACKAGES.get(module, module) or "a package"
        return f"{package} is installed here, but cannot be loaded: {error}\nInstall it anew, with the others it needs"
    if module in _POSIX:
        return f"Python on {platform.system()} has no module {module}: use Linux, macOS, or WSL on Windows"
    if error.name != module and module not in _PACKAGES and importlib.util.find_spec(module) is not None:
        return f"the {module} that is installed here has no {error.name}: install a release of it that is complete"
    package = _PACKAGES.get(module, module)
    return f"the package {package} is not installed here; {_how_to_install(package)}"


def _how_to_install(package: str) -> str:
    extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
    command = f"{sys.executable} -m pip install {package}"
    if extra is None:
        return f"install it: {command}"
    # Of a clone, its folder; else the distribution that is installed, which an index may not have.
    clone = Path(__file__).resolve().parents[1]
    project = (
        f"-e {shlex.quote(f'{clone}[{extra}]')}" if (clone / "pyproject.toml").is_file() else f"'recognition[{extra}]'"
    )
    return f"the extra {extra} has it: {sys.executable} -m pip install {project}\nOr alone: {command}"
