"""Tile sizes of the Triton kernels and the chunk size of the backward pass, tuned for each device.

`tiles.toml` has a section for each device that was measured, and `fallback` for all others. A section lists tiles by
problem; the entry with the nearest problem is used. `recognition tune` measures a section anew. In the sizes, B is the
gathered batch, C the number of classes that a kernel processes in one call, D the embedding size.
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
"""Register pressure of the arithmetic on a product: plain (a linear function or a few operations), heavy (a filter, a
logistic loss, a power or an angle), centers (the maximum over sub-centres, which needs most registers)."""

TABLE = Path(__file__).with_name("tiles.toml")
FALLBACK = "fallback"
_LEAST = 16  # the smallest side of an operand that tensor cores multiply
_forced: ContextVar["Tile | None"] = ContextVar("forced", default=None)


@dataclass(frozen=True)
class Problem:
    """Work, number formats and sizes of a kernel call, by which its tile is chosen."""

    work: Work
    bytes: tuple[int, int]
    """Bytes per number, 2 or 4: the larger of the stored rows' and the products' operands'; the operands'."""
    sizes: tuple[int, int, int]
    """B, C, D"""

    def distance(self, other: "Problem") -> tuple[bool, int, float]:
        """Return whether the work differs, the number of formats that differ, and the doublings between the sizes."""
        types = sum(a != b for a, b in zip(self.bytes, other.bytes, strict=True))
        doublings = (abs(log2(max(a, 1) / max(b, 1))) for a, b in zip(self.sizes, other.sizes, strict=True))
        return self.work != other.work, types, sum(doublings)


@dataclass(frozen=True)
class Tile:
    """The block that one program of a kernel computes at a time. Raises ValueError if a kernel cannot use it."""

    batch: int
    """Samples per tile."""
    classes: int
    """Classes per tile."""
    depth: int
    """Dimensions of the embedding that are multiplied at a time."""
    warps: int
    """Warps per program, 32 threads each."""
    stages: int
    """Pipeline stages: slices of `depth` dimensions that are in flight at a time."""

    def __post_init__(self) -> None:
        sides = (self.batch, self.classes, self.depth)
        if any(number < 1 or number & (number - 1) for number in (*sides, self.warps)) or self.stages < 1:
            raise ValueError(f"{self}: the sides and the warps of a tile are powers of two, and stages at least 1")
        if min(sides) < _LEAST:
            raise ValueError(f"{self}: no side of a tile is below {_LEAST}")

    def within(self, sizes: tuple[int, int, int]) -> "Tile":
        """Return this tile with no side larger than B, C and D (`sizes`) need."""
        batch, classes, depth = (max(_LEAST, 1 << max(size - 1, 0).bit_length()) for size in sizes)
        return Tile(min(self.batch, batch), min(self.classes, classes), min(self.depth, depth), self.warps, self.stages)


@dataclass(frozen=True)
class Section:
    """The tuned numbers of a device."""

    names: tuple[str, ...]
    """Substrings of the device names that CUDA reports, by which a device is recognised."""
    source: str
    """Origin of the numbers, such as the measurement."""
    chunk: int
    """Rows per chunk of the backward pass, beyond which it gets no faster."""
    tiles: dict[Kernel, dict[Problem, Tile]]

    @staticmethod
    def of(table: dict[str, Any]) -> "Section":
        """Build a section from its TOML table. Raises KeyError, TypeError or ValueError if the table is malformed."""
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
        """Return the section as TOML text, with `name` as its header."""
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
    """Return the tile of `kernel` on the device that CUDA names `device`; an empty name selects the fallback.

    `itemsize`: bytes per number of the stored rows or of the products' operands, whichever is more. `options`: bytes
    per number of the operands; None: `itemsize`.
    """
    problem = Problem(work, (itemsize, itemsize if options is None else options), (batch, classes, embedding_size))
    return _forced.get() or _nearest(kernel, device, problem)


@contextmanager
def forced(best: Tile) -> Iterator[None]:
    """Make every kernel use this tile inside the block, whatever the table says. Tuning measures tiles this way."""
    token = _forced.set(best)
    try:
        yield
    finally:
        _forced.reset(token)


@lru_cache(maxsize=1024)
def chunk(device: str, *, batch: int, embedding_size: int, workspace: int, itemsize: int = 2) -> int:
    """Return the rows per chunk of the backward pass whose temporary memory stays within `workspace` bytes.

    A chunk of n rows needs the gradient of the products [B, n] and a copy of the rows [n, D], both with `itemsize`
    bytes per number; the gradient of the rows [n, D] in float32; and one float32 sum per row and block of samples. The
    result is a multiple of the classes per tile if a whole tile fits, and at least 1.
    """
    known = section(device)
    entries = known.tiles["logit_gradient"].values()
    blocks = -(-batch // min(entry.batch for entry in entries))
    row = itemsize * (batch + embedding_size) + 4 * (embedding_size + blocks + 1)
    most, step = min(known.chunk, workspace // row), max(entry.classes for entry in entries)
    return most // step * step or max(most, 1)


def section(device: str) -> Section:
    """Return the section of the device that CUDA names `device`."""
    return sections()[name_of(device)]


def name_of(device: str) -> str:
    """Return the name of the section for `device`: the one with the longest matching name, or the fallback."""
    fitting = [
        (len(part), name)
        for name, each in sections().items()
        for part in each.names
        if re.search(re.escape(part) + r"(?!\d)", device)
    ]
    return max(fitting)[1] if fitting else FALLBACK


def put(text: str, name: str, new: Section) -> str:
    """Return the table `text` with its section `name` replaced by `new`, or `new` appended; the rest is unchanged."""
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
    """Return all sections of the table by name. Raises ValueError, which names the section, if one is malformed."""
    found = {}
    for name, table in toml.read(TABLE).items():
        try:
            found[name] = Section.of(table)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{TABLE}: section {name}: {type(error).__name__}: {error}") from None
    if FALLBACK not in found:
        raise ValueError(f"{TABLE}: no section {FALLBACK}")
    return found
