"""MXNet's RecordIO container without MXNet: finding the byte ranges of the payloads in a .rec file, and writing.

A record is `uint32 magic, uint32 (part << 29 | length)`, the payload, and padding to 4 bytes. Where the magic number
occurs in a payload at a multiple of 4, the writer drops it and splits the payload there: part 1 is the first piece,
2 a middle one, 3 the last one, 0 an undivided payload. The dropped number equals the magic number at the head of the
next piece's record, so the byte range of a piece that another follows is 4 bytes longer than its header says, and no
byte has to be copied.
The .idx file holds lines of `key<TAB>offset`.
"""

import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from recognition.errors import UserError
from recognition.files.atomic import sync, temporary_path
from recognition.files.kinds import what_is
from recognition.files.paths import shown
from recognition.tracking.progress import task

MAGIC = 0xCED7230A
MAX_LENGTH = (1 << 29) - 1
PREFIX = struct.Struct("<II")
WHOLE, FIRST, MIDDLE, LAST = range(4)

_CHUNK = 1 << 20
_MAGIC_BYTES = struct.pack("<I", MAGIC)


@dataclass(frozen=True)
class Records:
    """Payloads of N records as R >= N byte ranges, in the order of the file.

    keys: int64 [N], or the records' numbers if there is no .idx. positions: int64 [N], the start of each record.
    starts: int64 [N+1], the first range of each record. offsets: uint64 [R]. lengths: uint32 [R]. notes: sentences for
    the user.
    """

    keys: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, keep: np.ndarray) -> "Records":
        """Return the records where `keep`, bool [N], is true."""
        counts = np.diff(self.starts)
        pieces = np.repeat(keep, counts)
        starts = np.concatenate(([0], np.cumsum(counts[keep])))
        offsets, lengths = self.offsets[pieces], self.lengths[pieces]
        return Records(self.keys[keep], self.positions[keep], starts, offsets, lengths, self.notes)

    def skip_bytes(self, header: np.ndarray) -> None:
        """Advance the ranges past the first `header` bytes of each payload, int64 [N], in place."""
        first = self.starts[:-1]
        taken = np.minimum(header, self.lengths[first])
        self.offsets[first] += taken.astype(np.uint64)
        self.lengths[first] -= taken.astype(np.uint32)
        for row in np.flatnonzero(taken < header):
            rest = int(header[row] - taken[row])
            for piece in range(self.starts[row] + 1, self.starts[row + 1]):
                step = min(rest, int(self.lengths[piece]))
                self.offsets[piece] += np.uint64(step)
                self.lengths[piece] -= np.uint32(step)
                rest -= step


def read_records(rec: Path) -> tuple[Records, np.ndarray]:
    """Find the payload of every record that the .idx of `rec` lists, each once, or of all records if there is no .idx.

    Returns the ranges, and words 0, 1 and 6 of each payload as they stand in the file, uint32 [N,3]: the fields of an
    image's header, read in the same pass. The words are undefined if the first piece is shorter. Raises UserError,
    naming file, key and offset, if the file is cut off or its headers are not RecordIO's.
    """
    size = _size(rec)
    words = np.asarray(np.memmap(rec, dtype="<u4", mode="r", shape=(size // 4,)))
    idx = rec.with_suffix(".idx")
    notes: list[str] = []
    if idx.is_file():
        keys, positions = _listed_records(idx, notes)
    else:
        positions = _walk(rec, words, size)
        keys = np.arange(len(positions))
    found = Records(
        keys,
        positions,
        np.arange(len(keys) + 1),
        positions.astype(np.uint64) + np.uint64(PREFIX.size),
        np.empty(len(keys), np.uint32),
    )
    outside = (positions < 0) | (positions % 4 != 0) | (positions + PREFIX.size > size)
    for row in np.flatnonzero(outside).tolist():
        way_out = f"{shown(idx.name)} belongs to another file or {shown(rec.name)} is cut off: copy both again."
        raise bad_record(rec, found, row, f"lies outside the file's {size} bytes or off the 4-byte grid", way_out)
    parts, heads = _read_heads(rec, words, found)
    ends = positions + PREFIX.size + (found.lengths.astype(np.int64) + 3) // 4 * 4
    for row in np.flatnonzero(ends > size).tolist():
        raise bad_record(rec, found, row, f"ends at byte {ends[row]} but the file has {size}", _copy_again(rec))
    for row in np.flatnonzero(parts > FIRST).tolist():
        raise bad_record(rec, found, row, "is a later piece of a divided record", _copy_again(rec))
    joined = _join(rec, words, found, np.flatnonzero(parts == FIRST))
    if idx.is_file() and (unlisted := _count_unlisted(words, joined)):
        notes.append(
            f"{shown(idx.name)} lists {len(keys):,} records; the other {unlisted:,} of {shown(rec.name)} are not "
            "taken. Without the .idx the .rec file is read from end to end"
        )
    return replace(joined, notes=tuple(notes)), heads


def _listed_records(idx: Path, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read keys and positions from an .idx, int64 [N] each, in the order of the file; note those listed twice."""
    keys, positions = _read_idx(idx)
    repeats = len(keys)
    positions, order = np.unique(positions, return_index=True)
    repeats -= len(positions)
    if repeats:
        records = f"{repeats:,} record{'s' * (repeats != 1)}"
        notes.append(f"{shown(idx.name)} lists {records} more than once: each is taken once")
    return keys[order], positions


def _read_heads(rec: Path, words: np.ndarray, found: Records) -> tuple[np.ndarray, np.ndarray]:
    """Read the part of each record, uint8 [N], words 0, 1 and 6 of its payload, uint32 [N,3], and `found.lengths`."""
    heads = np.empty((len(found), 3), np.uint32)
    parts = np.empty(len(found), np.uint8)
    with task(f"indexing {shown(rec.name)}", total=len(found), unit="records") as advance:
        for begin in range(0, len(found), _CHUNK):
            rows = slice(begin, min(begin + _CHUNK, len(found)))
            columns = found.positions[rows, None] // 4 + np.array([0, 1, 2, 3, 8])
            head = words[np.minimum(columns, len(words) - 1)]
            for row in np.flatnonzero(head[:, 0] != MAGIC).tolist():
                fault = "does not begin with RecordIO's magic number"
                raise bad_record(rec, found, begin + row, fault, _copy_again(rec))
            parts[rows] = head[:, 1] >> 29
            found.lengths[rows] = head[:, 1] & MAX_LENGTH
            heads[rows] = head[:, 2:]
            advance(rows.stop)
    return parts, heads


def _size(rec: Path) -> int:
    try:
        size = rec.stat().st_size
    except OSError as error:
        raise UserError(f"{shown(rec)}: {error.strerror}") from None
    if size < PREFIX.size:
        raise UserError(f"{shown(rec)}: has {size} bytes, too few for a record: copy or pack it again")
    return size


def _read_idx(idx: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read keys and positions, int64 [N] each, as an .idx lists them."""
    way_out = "Copy it again, or remove it: the .rec file is then read from end to end."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is reported below
            table = np.loadtxt(idx, dtype=np.int64, comments=None, ndmin=2)
    except ValueError as error:
        reason = f"{error}; the file is {what_is(idx)}"
        raise UserError(f"{shown(idx)}: not lines of key and offset ({reason}). {way_out}") from None
    if not len(table):
        raise UserError(f"{shown(idx)}: is empty. {way_out}")
    if table.shape[1] != 2:
        raise UserError(f"{shown(idx)}: not lines of key and offset ({table.shape[1]} columns). {way_out}")
    return table[:, 0].copy(), table[:, 1].copy()


def _walk(rec: Path, words: np.ndarray, size: int) -> np.ndarray:
    """Find the positions of all undivided records and first pieces, int64 [N], in one pass over the file.

    All magic numbers are found first; then each record must end where the next one begins. So a magic number within a
    payload is skipped, which writers that do not divide records leave there.
    """
    step = 16 * _CHUNK
    hits = []
    with task(f"reading {shown(rec.name)} from end to end", total=size, unit="bytes") as advance:
        for begin in range(0, len(words) - 1, step):
            hits.append(np.flatnonzero(words[begin : begin + step] == MAGIC) + begin)
            advance(min((begin + step) * 4, size))
    places = np.concatenate(hits)
    places = places[places < len(words) - 1]
    prefixes = words[places + 1]
    positions = places * 4
    ends = positions + PREFIX.size + ((prefixes & MAX_LENGTH).astype(np.int64) + 3) // 4 * 4
    if not np.array_equal(ends, np.append(positions[1:], size)) or positions[0] != 0:
        chain = _chain(rec, positions, ends, size)
        positions, prefixes = positions[chain], prefixes[chain]
    return positions[prefixes >> 29 <= FIRST]


def _chain(rec: Path, positions: np.ndarray, ends: np.ndarray, size: int) -> np.ndarray:
    """Follow the records from byte 0 to the end of the file; return their rows in `positions`."""
    chain: list[int] = []
    position = 0
    while position != size:
        row = int(np.searchsorted(positions, position))
        if row == len(positions) or positions[row] != position:
            what = "the file ends inside it" if position > size else "no magic number there"
            where = f"{shown(rec)}: record {len(chain)}, expected at byte {position}"
            raise UserError(f"{where}: {what}. {_copy_again(rec)}")
        chain.append(row)
        position = int(ends[row])
    return np.array(chain)


def _count_unlisted(words: np.ndarray, found: Records) -> int:
    """Count the records before, between and behind those in `found`."""
    last = found.starts[1:] - 1
    ends = (found.offsets[last].astype(np.int64) + found.lengths[last] + 3) // 4
    begins = np.append(found.positions, len(words) * 4) // 4
    previous = np.concatenate(([0], ends))
    count = 0
    for gap in np.flatnonzero(previous < begins):
        word, end = int(previous[gap]), int(begins[gap])
        while word + 1 < end and words[word] == MAGIC:
            count += int(words[word + 1]) >> 29 <= FIRST
            word += 2 + ((int(words[word + 1]) & MAX_LENGTH) + 3) // 4
    return count


def _join(rec: Path, words: np.ndarray, found: Records, divided: np.ndarray) -> Records:
    """Give the divided records, whose rows are in `divided`, the ranges of all their pieces."""
    if not len(divided):
        return found
    counts = np.ones(len(found), np.int64)
    pieces: list[tuple[int, int]] = []
    for row in divided:
        before = len(pieces)
        word, part, length = int(found.positions[row]) // 4, FIRST, int(found.lengths[row])
        while part != LAST:
            pieces.append(((word + 2) * 4, length + 4))
            word += 2 + length // 4
            if length % 4 or word + 1 >= len(words) or words[word] != MAGIC:
                raise bad_record(rec, found, row, f"lacks its next piece at byte {word * 4}", _copy_again(rec))
            part, length = int(words[word + 1]) >> 29, int(words[word + 1]) & MAX_LENGTH
            if part not in (MIDDLE, LAST) or (word + 2) * 4 + length > len(words) * 4:
                raise bad_record(rec, found, row, f"lacks its next piece at byte {word * 4}", _copy_again(rec))
        if length:
            pieces.append(((word + 2) * 4, length))
        counts[row] = len(pieces) - before
    starts = np.concatenate(([0], np.cumsum(counts)))
    offsets, lengths = np.repeat(found.offsets, counts), np.repeat(found.lengths, counts)
    ours = np.repeat(np.isin(np.arange(len(found)), divided), counts)
    offsets[ours], lengths[ours] = np.array(pieces, np.uint64).T
    return replace(found, starts=starts, offsets=offsets, lengths=lengths)


def _copy_again(rec: Path) -> str:
    kind = what_is(rec)
    return f"{shown(rec.name)} is {'damaged' if 'RecordIO' in kind else kind}: copy or pack it again."


def bad_record(rec: Path, found: Records, row: int, fault: str, way_out: str) -> UserError:
    """Make a UserError that names file, key and offset of the record in `row`."""
    where = f"record with key {found.keys[row]} at byte {found.positions[row]}"
    return UserError(f"{shown(rec)}: {where} {fault}. {way_out}")


class RecordWriter:
    """Writer of `rec_path` and the .idx beside it, byte for byte as MXNet writes them.

    Both files get their names on `close()`; if the context ends in an exception, neither is left behind.
    """

    def __init__(self, rec_path: Path) -> None:
        self._targets = (rec_path, rec_path.with_suffix(".idx"))
        self._temporaries = tuple(temporary_path(path) for path in self._targets)
        self._rec = self._temporaries[0].open("wb")
        self._idx = self._temporaries[1].open("w", encoding="ascii", newline="\n")

    def write(self, key: int, payload: bytes) -> None:
        """Append a record. Raises UserError for a payload that RecordIO cannot hold (512 MiB or more)."""
        if len(payload) > MAX_LENGTH:
            raise UserError(f"record {key} has {len(payload)} bytes; RecordIO holds at most {MAX_LENGTH}")
        self._idx.write(f"{key}\t{self._rec.tell()}\n")
        pieces = list(_split(payload))
        for number, piece in enumerate(pieces):
            if len(pieces) == 1:
                part = WHOLE
            elif number == 0:
                part = FIRST
            else:
                part = LAST if number == len(pieces) - 1 else MIDDLE
            self._rec.write(PREFIX.pack(MAGIC, part << 29 | len(piece)) + piece + bytes(-len(piece) % 4))

    def rewrite(self, position: int, payload: bytes) -> None:
        """Replace the payload of the undivided record at `position` by one of the same length."""
        end = self._rec.tell()
        self._rec.seek(position + PREFIX.size)
        self._rec.write(payload)
        self._rec.seek(end)

    def close(self) -> None:
        """Finish both files and give them their names."""
        if self._rec.closed:
            return
        for file in (self._rec, self._idx):
            file.close()
        for temporary in self._temporaries:
            sync(temporary)
        for temporary, target in zip(self._temporaries, self._targets, strict=True):
            temporary.replace(target)

    def abort(self) -> None:
        """Delete the unfinished files."""
        self._rec.close()
        self._idx.close()
        for temporary in self._temporaries:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _split(payload: bytes) -> Iterator[bytes]:
    """Yield the pieces between the magic numbers at multiples of 4."""
    begin = 0
    found = payload.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            yield payload[begin:found]
            begin = found + 4
            found = payload.find(_MAGIC_BYTES, begin)
        else:
            found = payload.find(_MAGIC_BYTES, found + 1)
    yield payload[begin:]
