"""Files that are written whole or not at all.

A file is written under a temporary name in the same folder and gets its own by one rename, so a reader sees the old one
or the new one. The name is random, and not the process's number, which two machines may share.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, on_disk: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` on exit; after an error it is removed, and `path` stays as it was.

    `on_disk`: return only when the disk has both the content and the name. Raises OSError.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        if on_disk:
            sync(temporary)
        os.replace(temporary, path)
        if on_disk:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return an unused name in the folder of `path`, to write to before the file is renamed to `path`."""
    return path.with_name(f".{secrets.token_hex(8)}.tmp")


def write_text(path: Path, text: str, *, on_disk: bool = False) -> None:
    """Write a text in UTF-8, whole or not at all. Raises OSError."""
    with replacing(path, on_disk=on_disk) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or the names in a folder, which Windows has no way to wait for."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
