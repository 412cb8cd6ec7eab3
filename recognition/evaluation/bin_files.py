"""InsightFace's `.bin` files: a pickle of (list of 2P encoded images, list of P booleans).

A pickle from a stranger may run code. Hence the unpickler here imports and calls nothing that the file names, NumPy
included: the few NumPy names in such files become passive records of bytes.
"""

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recognition.errors import UserError
from recognition.files.kinds import what_is
from recognition.images import SUFFIXES
from recognition.tracking.terminal import escape

LABELS: dict[Any, bool] = {
    **dict.fromkeys(("1", "1.0", "true"), True),
    **dict.fromkeys(("0", "0.0", "false", "-1", "-1.0"), False),
}
"""Labels of a pair, in lower case: true for a genuine pair."""


def is_pickle(path: Path, data: bytes) -> bool:
    """Tell whether a file is a pickle, by its name, else by its first bytes."""
    named = path.suffix.lower() in (".bin", ".pkl", ".pickle")
    # Protocols 2 and later begin with a mark; 0 and 1 with a tuple or a list.
    return named or data[:1] == b"\x80" or re.match(rb"\(*(lp\d|\]q)", data) is not None


def read_bin(path: str, data: bytes) -> tuple[list[bytes], np.ndarray]:
    """Read the encoded images, 2P, and the flags, bool [P], of a `.bin`; an image that is None in the file is empty.

    Raises UserError if the file is truncated or of another kind, would run code, or does not hold two images per
    pair.
    """
    content = _unpickle(path, data)
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise UserError(
            f"{path}: not a verification set: the pickle holds {_described(content)}; it does not hold (list of "
            "images, list of booleans)"
        )
    if not isinstance(content[0], tuple | list):
        raise UserError(
            f"{path}: not a verification set: it does not hold a list of encoded images, but {_described(content[0])}"
            f"{_encode_first(content[0])}"
        )
    try:
        same = _to_booleans(list(_values(content[1])))
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: the second half of the pickle is not a list of booleans: {error}") from None
    images = []
    for number, item in enumerate(content[0]):
        try:
            images.append(b"" if item is None else _image(item))
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise UserError(
                f"{path}: image {number % 2 + 1} of pair {number // 2 + 1} is not bytes or a uint8 array: {error}"
            ) from None
    if len(images) % 2:
        raise UserError(f"{path}: an odd number of images ({len(images)}), but a pair is two; make the set again")
    if len(images) != 2 * len(same):
        raise UserError(f"{path}: {len(images)} images for {len(same)} pairs, but a pair is two; make the set again")
    return images, same


class _Record:
    """Passive stand-in for a NumPy object in a pickle: its arguments and its state."""

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Type(_Record):
    """dtype(name, align, copy) with state (version, byte order, ...)"""


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
    """Error for a pickle that names something no verification set needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Record]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(ascii(f"{module}.{name}")) from None


def _unpickle(path: str, data: bytes) -> Any:
    try:
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _Forbidden as error:
        raise UserError(
            f"{path}: refused: the file asks for {error}, which no verification set needs and which could run code on "
            "this machine; get the set from another source"
        ) from None
    except Exception as error:  # unpickling broken data raises nearly anything
        cut = isinstance(error, EOFError) or "truncated" in str(error) or "exhausted" in str(error)
        if cut and data[:1] in (b"\x80", b"(", b"]", b"}"):
            raise UserError(f"{path}: truncated after {len(data):,} bytes; copy or download it again") from None
        raise UserError(
            f"{path}: not a verification set, but {what_is(data)} ({error}). A .bin file is a pickle of (images, "
            "issame); a list of pairs is read from a file with another suffix, such as .txt"
        ) from None


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


def _described(item: Any) -> str:
    """Describe the content of a pickle in an error."""
    if isinstance(item, dict):
        return f"a dict of {', '.join(escape(repr(key)) for key in list(item)[:5])}"
    if isinstance(item, _Array | _Buffer):
        return f"one array of shape {list(_shape(item))}"
    if isinstance(item, tuple | list):
        return f"a {_kind(item)} of {len(item)}"
    return f"a {_kind(item)}"


def _shape(item: _Record) -> tuple[int, ...]:
    match item:
        case _Array(state=(_, tuple(shape), *_)) | _Buffer(arguments=(_, _, tuple(shape), *_)):
            return shape
    return ()


def _encode_first(item: Any) -> str:
    """Return the advice for decoded pictures, which are refused as the order of their channels is unknown."""
    if isinstance(item, _Array | _Buffer) and len(_shape(item)) >= 3:
        return ": pictures must be encoded, e.g. each as cv2.imencode('.png', bgr)[1].tobytes()"
    return ""


def _array(item: _Record) -> np.ndarray:
    """Return the values of an array, flat, if its type is one that flags or encoded images have. Raises TypeError."""
    match item:
        case _Array(state=(_, _, _Type() as form, _, data)):
            pass
        case _Buffer(arguments=(data, _Type() as form, *_)):
            pass
        case _Scalar(arguments=(_Type() as form, data)):
            pass
        case _:
            raise TypeError("it is an incomplete array")
    kind = _bytes(form.arguments[0]).decode("latin1")
    if kind not in ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"):
        raise TypeError(f"it is an array of dtype {kind}")
    order = ">" if list(form.state)[1:2] in ([">"], [b">"]) else "<"
    return np.frombuffer(_bytes(data), "u1" if kind == "b1" else order + kind)


def _image(item: Any) -> bytes:
    if not isinstance(item, _Array | _Buffer):
        data = _bytes(item)
        if len(data) < 1024 and data.lower().endswith(tuple(suffix.encode() for suffix in SUFFIXES)):
            raise TypeError(f"it is the name of a file, {escape(data.decode('latin1'))}: put in the file's bytes")
        return data
    shape, values = _shape(item), _array(item)
    if values.dtype not in (np.uint8, np.int8):
        raise TypeError(f"it is an array of dtype {values.dtype.kind}{values.dtype.itemsize}")
    if sum(length != 1 for length in shape) > 1:
        raise TypeError(f"it is a decoded picture, an array of shape {list(shape)}{_encode_first(item) or _ENCODE}")
    return values.tobytes()


_ENCODE = ": pictures must be encoded, as JPEG or PNG"


def _values(items: Any) -> Iterator[Any]:
    """Yield the items of a list or an array as numbers, booleans or texts."""
    if isinstance(items, _Record):
        yield from _array(items).tolist()
        return
    for item in items:
        if isinstance(item, _Record) and not isinstance(item, _Text):
            yield from _array(item).tolist()
        else:
            yield _bytes(item).decode("latin1") if isinstance(item, _Text | bytes) else item


def _to_booleans(values: Sequence[Any]) -> np.ndarray:
    """Convert flags to bool [P]: 0 and 1, or -1 and 1, as numbers or texts. Raises ValueError for others."""
    same = np.empty(len(values), bool)
    seen = set()
    for number, value in enumerate(values):
        flag = LABELS.get(value.strip().lower() if isinstance(value, str) else f"{value:g}" if _is_real(value) else "")
        if flag is None:
            raise ValueError(f"item {number} is {escape(repr(value))[:80]}, of the kind {_kind(value)}, not 0 or 1")
        same[number] = flag
        seen.add(float(value) if _is_real(value) else str(value))
    if {0.0, -1.0} <= seen or {"0", "-1"} <= seen:
        raise ValueError("it holds 0 and -1 both, and which of them is an impostor pair is not known")
    return same


def _is_real(value: Any) -> bool:
    return isinstance(value, bool | int | float)
