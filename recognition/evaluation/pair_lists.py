"""Lists of pairs as text, in the forms of LFW and other sets.

LFW (vis-www.cs.umass.edu/lfw/README.txt): a line `sets n` or `n`, then for each set n lines `name i j` and n lines
`name i other j`; FaceNet's has no first line, scikit-learn's and Kaggle's are separated by tabs or commas.
CALFW and CPLFW (whdeng.cn/CALFW, whdeng.cn/CPLFW: `pairs_CALFW.txt`, `pairs_CPLFW.txt`): a pair is two lines
`file label` with one label, which is 0 for an impostor pair, and for a genuine one 1 or the number of its fold; genuine
pairs come first. Others: `path path label`, or the label first.
"""

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recognition.errors import UserError
from recognition.evaluation.bin_files import LABELS
from recognition.files.kinds import what_is
from recognition.tracking.terminal import escape

SAMPLE = 200
"""Number of lines that decide a list's form."""


class ListedPair(NamedTuple):
    """Pair of a list: its first line, the possible names of each image, whether it is genuine, and its label."""

    line: int
    first: tuple[str, ...]
    second: tuple[str, ...]
    same: bool
    label: str


@dataclass(frozen=True)
class PairList:
    """List of pairs as the file has it."""

    form: str
    """Description of the list's form."""
    entries: Sequence[ListedPair]
    sets: int | None
    """Number of sets that the first line announces; None if there is no such line."""


def read_list(path: str, data: bytes) -> PairList:
    """Read a list of pairs. Raises UserError if its form is unknown or a line differs from the form of the others."""
    text = _text(path, data)
    lines = list(_lines(text))
    if not lines:
        raise UserError(f"{path}: the list has no line; make it again")
    guessed = re.search("[\udc80-\udcff]", text) is not None
    guess = ", not UTF-8 and taken for Latin-1 where no file has the very bytes" if guessed else ""
    announced = re.split(r"[ \t,;]+", lines[0][1].strip(" \t,;"))
    if len(announced) <= 2 and all(field.isascii() and field.isdecimal() for field in announced):
        form, split = _form(lines[1:], [_LFW])
        entries = _entries(path, lines[1:], form, split)
        _check_announced(path, entries, *(1, *map(int, announced))[-2:])
        return PairList(form.name + guess, entries, int(announced[0]) if len(announced) == 2 else 1)
    form, split = _form(lines[:SAMPLE], _FORMS)
    fits = sum(form.read(split(text)) is not None for _, text in lines[:SAMPLE])
    if 2 * fits < len(lines[:SAMPLE]):
        number, text = lines[0]
        kind = what_is(data)
        if not kind.startswith("text"):
            raise UserError(f"{path}: not a list of pairs, but {kind}")
        raise UserError(
            f"{path}: no list of pairs: line {number} is {_shown(text)}; the lines of one are all "
            + ", or all ".join(known.name for known in _FORMS)
        )
    header = ""
    if len(lines) > 1 and form.read(split(lines[0][1])) is None and _is_header(split(lines[0][1])):
        header = f", its first line {_shown(lines[0][1])} passed over"
        lines = lines[1:]
    return PairList(form.name + header + guess, _entries(path, lines, form, split), None)


Fields = list[str]
_Half = tuple[tuple[str, ...], str]


class _Form(NamedTuple):
    """Form of lines: its name, and a function that reads the fields of a line or returns None if they do not fit."""

    name: str
    read: Callable[[Fields], tuple[tuple[str, ...], tuple[str, ...], bool, str] | _Half | None]


def _lfw(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...], bool, str] | None:
    match fields:
        case [name, first, second]:
            other = name
        case [name, first, other, second]:
            pass
        case _:
            return None
    first, second = first.strip(), second.strip()
    if not (name and other and first.isdecimal() and second.isdecimal()):
        return None
    return _person(name, int(first)), _person(other, int(second)), name == other, ""


def _person(name: str, number: int) -> tuple[str, ...]:
    """Return the possible names of a person's image: LFW's, and those of FaceNet's alignment, which end in `_0`."""
    names = []
    for spelling in _spellings(name):
        file = f"{spelling}_{number:04d}"
        names += [f"{spelling}/{file}", file, f"{spelling}/{file}_0"]
    return tuple(names)


def _spellings(name: str) -> tuple[str, ...]:
    """Return a name as it stands, and without blanks around it if that differs."""
    return tuple(dict.fromkeys((name, name.strip(" "))))


def _paths(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...], bool, str] | None:
    if len(fields) != 3 or not all(fields):
        return None
    first, second, label = fields
    same = LABELS.get(label.strip().lower())
    if same is None or second.strip().lower() in LABELS:
        return None
    return _spellings(first), _spellings(second), same, label.strip()


def _label_first(fields: Fields) -> tuple[tuple[str, ...], tuple[str, ...], bool, str] | None:
    return _paths([*fields[1:], fields[0]]) if fields else None


def _half(fields: Fields) -> _Half | None:
    match fields:
        case [file, label] if file and re.fullmatch(r" *-?\d{1,4} *", label, re.ASCII) and not file.isdecimal():
            # The images may be sorted into folders of people, as LFW's are.
            return (*_spellings(file), f"{file.strip().rpartition('_')[0]}/{file.strip()}"), label.strip()
    return None


_LFW = _Form("`name i j` or `name i other j` (LFW)", _lfw)
_TWO_LINES = _Form("`file label`, two lines a pair (CALFW, CPLFW)", _half)
_FORMS = (_LFW, _Form("`path path label`", _paths), _Form("`label path path`", _label_first), _TWO_LINES)


def _by_blanks(text: str) -> Fields:
    return re.split(r"[ \t]+", text.strip(" \t"))


def _by_tabs(text: str) -> Fields:
    return text.rstrip("\t ").split("\t")


def _by(delimiter: str) -> Callable[[str], Fields]:
    def split(text: str) -> Fields:
        fields = [field.strip() for field in next(csv.reader([text], delimiter=delimiter), [])]
        while fields and not fields[-1]:  # a genuine pair in a table of four columns
            fields.pop()
        return fields

    return split


_SPLITS = (_by_tabs, _by(","), _by(";"), _by_blanks)


def _form(lines: Sequence[tuple[int, str]], forms: Sequence[_Form]) -> tuple[_Form, Callable[[str], Fields]]:
    """Choose the form and the separator that most of the lines fit, the first of equals."""
    best: tuple[_Form, Callable[[str], Fields]] = (forms[0], _by_blanks)
    most = 0
    for split in _SPLITS:
        fields = [split(text) for _, text in lines[:SAMPLE]]
        for form in forms:
            fits = sum(form.read(item) is not None for item in fields)
            if fits > most:
                best, most = (form, split), fits
    return best


def _is_header(fields: Fields) -> bool:
    return len(fields) > 1 and not any(field.lstrip("-").isdecimal() or "/" in field for field in fields)


def _entries(
    path: str, lines: Sequence[tuple[int, str]], form: _Form, split: Callable[[str], Fields]
) -> list[ListedPair]:
    entries: list[ListedPair] = []
    halves: list[tuple[int, _Half]] = []
    for number, text in lines:
        read = form.read(split(text))
        if read is None:
            raise UserError(
                f"{path}: line {number} is {_shown(text)}, not {form.name} as the others are: mend that line"
            )
        if len(read) == 2:
            halves.append((number, read))
            continue
        entries.append(ListedPair(number, *read))
        if form is _LFW:
            for person in read[:2]:
                name = person[1][: person[1].rindex("_")]
                if name != Path(name).name or name == "..":
                    raise UserError(
                        f"{path}: line {number}: a person's name must be the name of a folder, not {_shown(name)}"
                    )
    for (number, (first, label)), (after, (second, other)) in zip(halves[::2], halves[1::2], strict=False):
        if label != other:
            raise UserError(
                f"{path}: lines {number} and {after} are one pair, but have the labels {label} and {other}: "
                "a line is missing or one too many above"
            )
        entries.append(ListedPair(number, first, second, int(label) > 0, label))
    if len(halves) % 2:
        raise UserError(f"{path}: line {halves[-1][0]} has no second one, but a pair is two lines; download it again")
    zero = next((entry for entry in entries if entry.label in ("0", "0.0")), None)
    minus = next((entry for entry in entries if entry.label.startswith("-")), None)
    if zero and minus:
        raise UserError(
            f"{path}: line {zero.line} has the label 0 and line {minus.line} has -1, and which of them is an impostor "
            "pair is not known; write 1 and 0"
        )
    return entries


def _check_announced(path: str, entries: Sequence[ListedPair], sets: int, size: int) -> None:
    if not sets * size or len(entries) != 2 * sets * size:
        raise UserError(
            f"{path}: {len(entries)} pairs, but the first line announces 2 x {sets} x {size}; download it again, or "
            "remove that line"
        )
    genuine = int(np.sum([entry.same for entry in entries]))
    if genuine != sets * size:
        raise UserError(
            f"{path}: {genuine} genuine pairs, but the first line announces {sets} x {size}; download it again, or "
            "remove that line"
        )


def _text(path: str, data: bytes) -> str:
    """Decode the file; bytes that are not UTF-8 become surrogates, as in Python's file names."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(encoding).removeprefix("\ufeff")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: broken {encoding.upper()} ({error}); save it as UTF-8") from None
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise UserError(
            f"{path}: not a list of pairs: line {line} has a NUL byte; this is {what_is(data)}. Save a list as UTF-8; "
            "a .bin file keeps its suffix"
        )
    return data.decode("utf-8", "surrogateescape")


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield lines that are not blank, with their numbers; Unicode's other line ends may occur within names."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip(" \t"):
            yield number, line


def _shown(text: str) -> str:
    """Quote a line in an error, escaped and cut to a moderate length."""
    return f"'{escape(text[:200])}{'...' if len(text) > 200 else ''}'"
