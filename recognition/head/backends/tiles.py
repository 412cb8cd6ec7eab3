"""Which tiles the Triton kernels work in, and how many rows make a chunk: a table, by device and by problem.

`tiles.toml` has a section for each device that was looked at and `fallback` for all others. Of a section's entries the
one whose problem is nearest to the one at hand counts. `recognition tune` measures a section anew. In the sizes, B is
the gathered batch, C the classes that a kernel goes over in one call, D the embedding size.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, Literal, get_args

from recognition.config import toml

Kernel = Literal["negative_sums", "logit_gradient"]
"""Kernels that work in tiles."""
Work = Literal["plain", "heavy", "centers"]
"""Register pressure of what a kernel makes of a product: plain (a line, or a few operations), heavy (a filter, a
logistic loss, a power or an angle), centers (the largest over sub-centres, which takes most)."""

TABLE = Path(__file__).with_name("tiles.toml")
FALLBACK = "fallback"
_LEAST = 16  # what matrix units take
_forced: ContextVar["Tile | None"] = ContextVar("forced", default=None)


@dataclass(frozen=True)
class Problem:
    """What a kernel has to do."""

    work: Work
    bytes: tuple[int, int]
    """Of a number, 2 or 4: the wider of the rows as they are kept and the products' operands, and these operands."""
    sizes: tuple[int, int, int]
    """B, C, D"""

    def distance(self, other: "Problem") -> tuple[bool, int, float]:
        """How unlike they are: by the work, by how many of the types, by how many doublings of the sizes."""
        types = sum(a != b for a, b in zip(self.bytes, other.bytes, strict=True))
        doublings = (abs(log2(max(a, 1) / max(b, 1))) for a, b in zip(self.sizes, other.sizes, strict=True))
        return self.work != other.work, types, sum(doublings)


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel works on at a time, and with what. Raises ValueError where there is no such tile."""

    batch: int
    """Samples."""
    classes: int
    """Classes."""
    depth: int
    """Numbers of an embedding that are multiplied at a time."""
    warps: int
    """Of 32 threads each."""
    stages: int
    """Slices of `depth` numbers on their way at a time."""

    def __post_init__(self) -> None:
        sides = (self.batch, self.classes, self.depth)
        if any(number < 1 or number & (number - 1) for number in (*sides, self.warps)) or self.stages < 1:
            raise ValueError(f"{self}: the sides and the warps of a tile are powers of two, and stages at least 1")
        if min(sides) < _LEAST:
            raise ValueError(f"{self}: no side of a tile is below {_LEAST}")

    def within(self, sizes: tuple[int, int, int]) -> "Tile":
        """No larger than what B, C and D need."""
        batch, classes, depth = (max(_LEAST, 1 << max(size - 1, 0).bit_length()) for size in sizes)
        return Tile(min(self.batch, batch), min(self.classes, classes), min(self.depth, depth), self.warps, self.stages)


@dataclass(frozen=True)
class Section:
    """What is known of a device."""

    names: tuple[str, ...]
    """Parts of the names that CUDA has for it."""
    source: str
    """Where the numbers are from."""
    chunk: int
    """Rows per chunk of the backward pass; more gain nothing."""
    tiles: dict[Kernel, dict[Problem, Tile]]

    @staticmethod
    def of(table: dict[str, Any]) -> "Section":
        """A section of the file. Raises KeyError, TypeError or ValueError where it is not one."""
        tiles: dict[Kernel, dict[Problem, Tile]] = {}
        for kernel in get_args(Kernel):
            entries = {}
            for entry in table[kernel]:
                if entry["work"] not in get_args(Work):
                    raise ValueError(f"{kernel}: no work is called {entry['work']}")
                (wider, options), (batch, classes, size) = entry["bytes"], entry["problem"]
                samples, wide, depth = entry["tile"]
                best = Tile(samples, wide, depth, entry["warps"], entry["stages"])
                entries[Problem(entry["work"], (wider, options), (batch, classes, size))] = best
            if not entries:
                raise ValueError(f"{kernel}: no entries")
            tiles[kernel] = entries
        return Section(tuple(table["names"]), table["source"], table["chunk"], tiles)

    def to_toml(self, name: str) -> str:
        """The section as the file has it, under `name`."""
        names, source = (json.dumps(value, ensure_ascii=False) for value in (self.names, self.source))
        lines = [f"[{json.dumps(name) if re.search('[^A-Za-z0-9_-]', name) else name}]", f"names = {names}"]
        lines += [f"source = {source}", f"chunk = {self.chunk}"]
        for kernel, entries in self.tiles.items():
            lines.append(f"{kernel} = [")
            for problem, best in entries.items():
                where = f'work = "{problem.work}", bytes = {list(problem.bytes)}, problem = {list(problem.sizes)}'
                sides = [best.batch, best.classes, best.depth]
                lines.append(f"    {{ {where}, tile = {sides}, warps = {best.warps}, stages = {best.stages} }},")
            lines.append("]")
        return "\n".join(lines) + "\n"


def tile(
    kernel: Kernel,
    device: str,
    *,
    batch: int,
    classes: int,
    embedding_size: int,
    itemsize: int,
    options: int | None = None,
    work: Work = "plain",
) -> Tile:
    """The tile of `kernel` on the device that CUDA calls `device`; an empty name is a device that nothing is known of.

    `itemsize`: bytes of a number of the rows or of the products' operands, whichever has more; `options`: of the
    latter, None for as many.
    """
    problem = Problem(work, (itemsize, itemsize if options is None else options), (batch, classes, embedding_size))
    return _forced.get() or _nearest(kernel, device, problem)


@contextmanager
def forced(best: Tile) -> Iterator[None]:
    """Every kernel works in this tile, whatever the table says: for measuring."""
    token = _forced.set(best)
    try:
        yield
    finally:
        _forced.reset(token)


@lru_cache(maxsize=1024)
def chunk(device: str, *, batch: int, embedding_size: int, workspace: int, itemsize: int = 2) -> int:
    """Rows per chunk of the backward pass, such that what a chunk needs for a time stays within `workspace` bytes.

    For n rows that is: their products' gradient [B, n] and a copy of them [n, D] in the type of the products, of
    `itemsize` bytes; their gradient [n, D] in float32; and a sum for each row and block of samples. A multiple of the
    tiles' classes where there is room for that, and at least 1.
    """
    known = section(device)
    entries = known.tiles["logit_gradient"].values()
    blocks = -(-batch // min(entry.batch for entry in entries))
    row = itemsize * (batch + embedding_size) + 4 * (embedding_size + blocks + 1)
    most, step = min(known.chunk, workspace // row), max(entry.classes for entry in entries)
    return most // step * step or max(most, 1)


def section(device: str) -> Section:
    """Of the device that CUDA calls `device`: of several that fit, the one that names more of it."""
    return sections()[name_of(device)]


def name_of(device: str) -> str:
    """What the table calls that device's section."""
    fitting = [
        (len(part), name)
        for name, each in sections().items()
        for part in each.names
        if re.search(re.escape(part) + r"(?!\d)", device)
    ]
    return max(fitting)[1] if fitting else FALLBACK


def put(text: str, name: str, new: Section) -> str:
    """The table `text` with `new` in the place of its section `name`, or at its end; what else there is stays."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if line.startswith("[")]
    header = new.to_toml(name).partition("\n")[0]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        if lines[start].strip() == header:
            rest = lines[end:]
            return "".join([*lines[:start], new.to_toml(name), *(["\n"] if rest else []), *rest])
    return text.rstrip("\n") + "\n\n" + new.to_toml(name)


@lru_cache(maxsize=1024)
def _nearest(kernel: Kernel, device: str, problem: Problem) -> Tile:
    entries = section(device).tiles[kernel]
    return entries[min(entries, key=problem.distance)].within(problem.sizes)


@cache
def sections() -> dict[str, Section]:
    """All of the table, by name. Raises ValueError, which names the section, where the file is damaged."""
    found = {}
    for name, table in toml.read(TABLE).items():
        try:
            found[name] = Section.of(table)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TABLE}: section {name}: {type(error).__name__}: {error}") from None
    if FALLBACK not in found:
        raise ValueError(f"{TABLE}: no section {FALLBACK}")
    return found
