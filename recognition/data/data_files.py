"""Data files by number: compact storage of their names, and thread-safe reading of byte ranges."""

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

_KEPT_OPEN = 64


class PackedNames(Sequence[str]):
    """Sequence of names in one text with a line for each, which takes far less memory than Python strings.

    text: bytes or uint8 array. ends: int64 [N], the end of each line, past its final newline. A name may itself hold a
    newline.
    """

    def __init__(self, text: bytes | np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "PackedNames":
        """Pack strings."""
        lines = [os.fsencode(name) + b"\n" for name in names]
        return cls(b"".join(lines), np.cumsum([len(line) for line in lines], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        begin = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(bytes(self.text[begin : int(self.ends[number]) - 1]))


class DataFiles(Sequence[Path]):
    """Sequence of the paths of data files under one or more root folders, with reading of their bytes.

    roots: (folder, number of its first file) in order. Up to 64 files are kept open; where there are more, as in a
    folder of images, each is opened for one read. Reading is safe from several threads.
    """

    def __init__(self, roots: Sequence[tuple[Path, int]], names: PackedNames) -> None:
        self.roots, self.names = tuple(roots), names
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._open)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return next(root for root, first in reversed(self.roots) if first <= number) / self.names[number]

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Read `length` bytes of file `number` at `offset`, or fewer where it ends before. Raises OSError."""
        if len(self) > _KEPT_OPEN:
            with self[number].open("rb", buffering=0) as file:
                return os.pread(file.fileno(), length, offset)
        with self._lock:
            if number not in self._open:
                self._open[number] = os.open(self[number], os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._open[number], length, offset)


def _close(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
