"""Verification sets: InsightFace's `.bin` files, and LFW's `pairs.txt` with a folder of images.

A `.bin` is a pickle, and people pass them around. So it is read by an unpickler to which the few NumPy names that such
files hold mean passive records of bytes: nothing that the file names is imported or called, NumPy included.
"""

import io
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recognition.config import UserError
from recognition.images import Undecodable, decode

SUFFIXES = (".jpg", ".png", ".jpeg")


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of face images, and whether the two of each show one person.

    Pair `i` is images `2i` and `2i + 1`.
    """

    path: Path
    """The file that the set was read from."""
    images: Sequence[bytes]
    """2P encoded images."""
    same: np.ndarray
    """bool [P]: true for a genuine pair, false for an impostor pair."""
    files: Sequence[Path] = ()
    """2P image files, where each image has one."""

    def __len__(self) -> int:
        return len(self.same)

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    def describe(self, image: int) -> str:
        """Names an image in an error: the set's file, the pair (from 1), which of its two, and the image's file."""
        place = f"{self.path}: image {image % 2 + 1} of pair {image // 2 + 1}"
        return f"{place} ({self.files[image]})" if self.files else place

    def decode(self, image: int) -> np.ndarray:
        """Image `image`, uint8 [H, W, 3]: see `recognition.images.decode`. Raises UserError where that raises."""
        try:
            return decode(self.images[image])
        except Undecodable as error:
            raise UserError(
                f"{self.describe(image)} cannot be decoded: {error}; replace the image, or make the set without it"
            ) from None


def read_pairs(path: Path | str, images: Path | None = None) -> PairSet:
    """Read a verification set; a name that ends in `.txt` is LFW's text format, any other a `.bin`.

    `.bin`: a pickle, protocol 0 to 5, of (list of 2P encoded images, list of P booleans), each image bytes, a Python-2
    string or a NumPy uint8 array.

    Text: a line `sets n` or `n`, then for each set n lines `name i j` and n lines `name i other j`
    (http://vis-www.cs.umass.edu/lfw/README.txt). Image j of a person is `name/name_000j.jpg` (or .png, .jpeg) in the
    folder `images`; without it, in the first of these that has the first image: the folder of the text file, then the
    folders in it, by name. Ten sets are the protocol's ten folds and stay in the file's order; of any other number,
    genuine and impostor pairs are taken in turns, so that ten consecutive folds hold as many of each.

    Raises UserError where the file is missing, empty, truncated or of another kind, wants to run code, holds an odd
    number of images or another number than two per pair, or an image file is missing.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{path}: the file is empty; copy or download it again")
    if path.suffix.lower() == ".txt":
        return _from_text(path, data, images)
    return _from_pickle(path, data)


class _Record:
    """What a pickle's NumPy object is read as: its arguments and its state, with no behaviour."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type(_Record):
    """dtype(name, align, copy)"""


class _Array(_Record):
    """_reconstruct(type, shape, code) with state (version, shape, dtype, Fortran order, bytes)"""


class _Buffer(_Record):
    """_frombuffer(bytes, dtype, shape, order)"""


class _Scalar(_Record):
    """scalar(dtype, bytes)"""


class _Text(_Record):
    """_codecs.encode(text, "latin1"): how Python 3 writes bytes at protocol 2"""


_ALLOWED: dict[tuple[str, str], type[_Record]] = {
    ("_codecs", "encode"): _Text,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Buffer for core in ("core", "_core")},
}


class _Forbidden(pickle.UnpicklingError):
    """The pickle names something that a verification set does not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(ascii(f"{module}.{name}")) from None


def _from_pickle(path: Path, data: bytes) -> PairSet:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _Forbidden as error:
        raise UserError(
            f"{path}: refused: the file asks for {error}, which no verification set needs and which could run code on "
            "this machine; get the set from another source"
        ) from None
    except Exception as error:  # the pickle machine raises nearly anything on broken data
        if isinstance(error, EOFError) or "truncated" in str(error) or "exhausted" in str(error):
            raise UserError(f"{path}: truncated after {len(data):,} bytes; copy or download it again") from None
        raise UserError(
            f"{path}: not a verification set ({error}); a .bin file is a pickle of (images, issame), LFW's text format "
            "is read from a file whose name ends in .txt"
        ) from None
    if not isinstance(content, tuple | list) or len(content) != 2 or not isinstance(content[0], tuple | list):
        raise UserError(f"{path}: not a verification set: the pickle does not hold (list of images, list of booleans)")
    try:
        same = np.array(list(_flags(content[1])), dtype=bool)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: the second half of the pickle is not a list of booleans: {error}") from None
    images = []
    for number, item in enumerate(content[0]):
        try:
            images.append(_image(item))
        except (TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{path}: image {number % 2 + 1} of pair {number // 2 + 1} is not bytes or a uint8 array: {error}"
            ) from None
    if len(images) % 2:
        raise UserError(f"{path}: an odd number of images ({len(images)}), but a pair is two; make the set again")
    if len(images) != 2 * len(same):
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs, but a pair is two; make the set again")
    if not images:
        raise UserError(f"{path}: the set holds no pairs; make it again")
    return PairSet(path, images, same)


def _bytes(item: Any) -> bytes:
    match item:
        case bytes() | bytearray():
            return bytes(item)
        case str():
            return item.encode("latin1")
        case _Text(arguments=(str(text), str("latin1" | "latin-1"))):
            return text.encode("latin1")
    raise TypeError(f"it is of the kind {_kind(item)}")


def _kind(item: Any) -> str:
    return type(item).__name__.strip("_").lower()


def _array(item: _Record) -> tuple[str, bytes]:
    """The dtype's name (of two characters, as `u1`) and the values' bytes."""
    match item:
        case _Array(state=(_, _, _Type(arguments=(kind, *_)), _, data)):
            pass
        case _Buffer(arguments=(data, _Type(arguments=(kind, *_)), *_)):
            pass
        case _Scalar(arguments=(_Type(arguments=(kind, *_)), data)):
            pass
        case _:
            raise TypeError("it is an incomplete array")
    kind = _bytes(kind).decode("latin1")
    if kind not in ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        raise TypeError(f"it is an array of dtype {kind}")
    return kind, _bytes(data)


def _image(item: Any) -> bytes:
    if not isinstance(item, _Array | _Buffer):
        return _bytes(item)
    kind, data = _array(item)
    if kind not in ("u1", "i1"):
        raise TypeError(f"it is an array of dtype {kind}")
    return data


def _flags(items: Any) -> Iterator[bool]:
    """The truth of each item of a list, or of an array of booleans or integers in either byte order."""
    if isinstance(items, _Record):
        kind, data = _array(items)
        values = np.frombuffer(data, np.uint8).reshape(-1, int(kind[1]))
        yield from (bool(value.any()) for value in values)
        return
    for number, item in enumerate(items):
        if isinstance(item, _Scalar):
            yield any(_array(item)[1])
        elif item in (0, 1):
            yield bool(item)
        else:
            raise ValueError(f"item {number} is of the kind {_kind(item)}")


def _from_text(path: Path, data: bytes, images: Path | None) -> PairSet:
    try:
        lines = [line.split() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a .bin file keeps its suffix") from None
    header = lines[0] if lines else []
    if len(header) not in (1, 2) or not all(field.isdecimal() for field in header):
        raise UserError(f"{path}: the first line of LFW's format is `sets n` or `n`, pairs of each kind in a set")
    sets, size = (1, *map(int, header))[-2:]
    if not sets * size or len(lines) - 1 != 2 * sets * size:
        raise UserError(
            f"{path}: {len(lines) - 1} pairs, but the first line announces 2 x {sets} x {size}; download it again"
        )
    pairs = [_pair(path, fields) for fields in lines[1:]]
    same = np.array([first[0] == second[0] for first, second in pairs])
    if same.sum() != sets * size:
        raise UserError(f"{path}: {same.sum()} genuine pairs, but the first line announces {sets} x {size}")
    order = np.arange(len(pairs))
    if sets != 10:
        order = np.stack([order[same], order[~same]], axis=1).ravel()
    folders = [images] if images else [path.parent, *sorted(item for item in path.parent.iterdir() if item.is_dir())]
    folder = next((folder for folder in folders if _find(folder, *pairs[0][0])), None)
    if folder is None:
        name, number = pairs[0][0]
        raise UserError(
            f"{path}: no image {_relative(name, number)}.jpg (or .png, .jpeg) in "
            f"{images or f'{path.parent} or a folder in it'}; put the images' folder beside the file, or name it"
        )
    read: dict[Path, bytes] = {}
    files = []
    for name, number in (image for pair in order for image in pairs[pair]):
        file = _find(folder, name, number)
        if file is None:
            raise UserError(f"{path}: no image {_relative(name, number)}.jpg (or .png, .jpeg) in {folder}")
        if file not in read:
            read[file] = file.read_bytes()
        files.append(file)
    return PairSet(path, [read[file] for file in files], same[order], files)


def _pair(path: Path, fields: list[str]) -> tuple[tuple[str, int], tuple[str, int]]:
    """Name and number of a line's two images."""
    match fields:
        case [name, first, second]:
            other = name
        case [name, first, other, second]:
            pass
        case _:
            fields = []
    if not fields or not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"{path}: {' '.join(fields)!r} is neither `name i j` nor `name i other j`")
    if not all(part == Path(part).name and part != ".." for part in (name, other)):
        raise UserError(f"{path}: a person's name must be the name of a folder, not {name!r}, {other!r}")
    return (name, int(first)), (other, int(second))


def _relative(name: str, number: int) -> str:
    return f"{name}/{name}_{number:04d}"


def _find(folder: Path, name: str, number: int) -> Path | None:
    files = (folder / f"{_relative(name, number)}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)
