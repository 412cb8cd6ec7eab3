"""Decoding of images to RGB levels, and resizing to the square that the model takes.

This module defines the pixels of each kind of image. Verification and the loader "torchvision" use it; the loader
"dali" lets DALI decode the kinds for which that gives the same pixels, and uses this module for the others.
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""Formats that are decoded, by Pillow's names."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
)
"""Suffixes of files in these formats, in lower case."""

MAX_PIXELS = 64_000_000
"""Limit above which an image is refused undecoded, as a small file can claim to be a huge image."""
_CUT = "truncated: its end is missing"
_TOO_LARGE = f"it has more than {MAX_PIXELS:,} pixels"


class Undecodable(ValueError):
    """An image that cannot be decoded; the text says why."""


def decode(encoded: bytes) -> Pixels:
    """Decode an image to uint8 RGB [H, W, 3], turned by its EXIF orientation. Raises Undecodable.

    Of several pictures in a file the first is decoded, and of 16-bit levels the upper 8 bits are kept. Colours are
    those that are stored: no colour profile or gamma is applied, and transparency is dropped.
    """
    size(encoded)
    exif = b""
    if encoded.startswith((_JPEG, _PNG)):
        encoded, exif = _bare_jpeg(encoded) if encoded.startswith(_JPEG) else _bare_png(encoded)
    with _opened(encoded) as image:
        image.load()
        turn = _TURNS.get(_orientation(exif or image.info.get("exif", b"").removeprefix(_EXIF)))
        return _levels(image if turn is None else image.transpose(turn))


def size(encoded: bytes) -> tuple[int, int]:
    """Read height and width of an image, before any turn, without decoding it (about 2 us for a JPEG).

    Raises Undecodable for other files, images larger than MAX_PIXELS, and truncated ones that lack their end mark.
    """
    if encoded.startswith(_JPEG):
        frame = read_jpeg_header(encoded)
        if frame.bits != 8:
            raise Undecodable(f"it is a JPEG of {frame.bits} bits a level, which is not decoded; save it with 8")
        height, width = frame.height, frame.width
        complete = encoded.rfind(b"\xff\xd9") > 0
    elif encoded.startswith(_PNG) and encoded[12:16] == b"IHDR":
        width, height, bits, colour, *methods = struct.unpack_from(">IIBBBBB", encoded.ljust(29), 16)
        if bits not in _PNG_BITS.get(colour, ()) or methods not in ([0, 0, 0], [0, 0, 1]):
            raise Undecodable("its PNG header is broken")
        complete = encoded.rfind(b"IEND") > 0
    elif not encoded:
        raise Undecodable("no bytes")
    elif encoded[8:12] == b"WEBP" and len(encoded) < int.from_bytes(encoded[4:8], "little"):
        raise Undecodable(_CUT)
    else:
        with _opened(encoded) as image:
            height, width = image.height, image.width
        complete = True
    if not height * width:
        raise Undecodable(f"its header says {width} x {height} pixels")
    if height * width > MAX_PIXELS:
        raise Undecodable(_TOO_LARGE)
    if not complete:
        raise Undecodable(_CUT)
    return height, width


@dataclass(frozen=True)
class JpegHeader:
    """Content of a JPEG's frame header, and of the Adobe marker before it."""

    marker: int
    """Coding: 0xC0 and 0xC1 sequential, 0xC2 progressive; others lossless, hierarchical or arithmetic."""
    bits: int
    height: int
    width: int
    components: int
    adobe: int | None
    """Colour transform in the Adobe marker: 0 is none, 1 is YCbCr, 2 is YCCK; None without a marker."""
    regular: bool
    """True if the segments follow one another without gaps and are of the kinds that encoders write today."""


def read_jpeg_header(encoded: bytes) -> JpegHeader:
    """Read the segments of a JPEG before its first scan. Raises Undecodable if there is no frame header."""
    header: tuple[int, ...] | None = None
    adobe, regular, expected = None, True, 2
    for marker, start, end in _segments(encoded):
        regular &= start == expected
        expected = end
        if marker == 0xEE and encoded[start + 4 : start + 9] == b"Adobe" and end - start >= 16:
            adobe = encoded[start + 15]
        elif marker in _FRAMES and end - start >= 10:
            header = header or (marker, *struct.unpack_from(">BHHB", encoded, start + 4))
            regular &= end - start == 10 + 3 * header[-1]
        else:
            regular &= marker in _BESIDES
    if header is None:
        raise Undecodable("a JPEG without a frame header")
    marker, bits, height, width, components = header
    regular &= encoded.startswith(b"\xff\xda", expected)
    return JpegHeader(marker, bits, height, width, components, adobe, regular)


def _segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of a JPEG's segments (ITU-T T.81, annex B) up to its first scan."""
    place = 2
    while place + 4 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            place += 2
        elif marker in (0xD9, 0xDA):
            break
        else:
            end = place + 2 + int.from_bytes(encoded[place + 2 : place + 4])
            yield marker, place, min(end, len(encoded))
            place = end


def _bare_jpeg(encoded: bytes) -> tuple[bytes, bytes]:
    """Strip a JPEG of its metadata, so that faults there do no harm; return it and its EXIF block."""
    parts, exif, end = [_JPEG], b"", len(_JPEG)
    for marker, start, end in _segments(encoded):
        if marker == 0xE1 and encoded.startswith(_EXIF, start + 4):
            exif = exif or encoded[start + 10 : end]
        if marker in (0xE0, 0xEE) or marker < 0xE0:  # JFIF's and Adobe's segments define the colours
            parts.append(encoded[start:end])
    return b"".join([*parts, encoded[end:]]), exif


@contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    """Open an image without decoding it; within the context, Pillow's exceptions become Undecodable."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            yield image
    except Undecodable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Undecodable(_TOO_LARGE) from None
    except UnidentifiedImageError:
        raise Undecodable(_describe_other_file(encoded)) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise Undecodable(str(error) or type(error).__name__) from error


def fit(pixels: Pixels, size: int, how: str) -> Pixels:
    """Resize `pixels` uint8 [H, W, 3] to `size` pixels a side.

    `how` is "resize": linear interpolation, smoothed where it shrinks, with separate factors for height and width;
    "crop": the largest square in the middle, resized; or "exact": raise ValueError for another size.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return pixels
    if how == "exact":
        raise ValueError(f"{width} x {height} pixels, not {size} x {size}")
    if how == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    height, width = pixels.shape[:2]
    rows = _scaled(pixels.reshape(height, -1), size).reshape(size, width, 3)
    columns = _scaled(rows.swapaxes(0, 1).reshape(width, -1), size).reshape(size, size, 3)
    return np.rint(columns.swapaxes(0, 1)).astype(np.uint8)


def _scaled(lines: NDArray[np.generic], size: int) -> NDArray[np.float32]:
    """Resample `lines` [n, m] to [size, m]; the order of summation is fixed, so the result is reproducible."""
    sources, weights = _taps(len(lines), size)
    scaled = np.zeros((size, lines.shape[1]), np.float32)
    for source, weight in zip(sources, weights, strict=True):
        scaled += lines[source] * weight[:, None]
    return scaled


@lru_cache(256)
def _taps(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the source lines, of `length`, and their weights for each of `size` new lines: [taps, size] each.

    The weights are triangles around the new lines' centres, as wide as the distance of new lines or of old ones,
    whichever is larger. Border pixels are repeated beyond the border, as by DALI; torchvision and Pillow cut the
    triangles off instead.
    """
    width = max(length / size, 1.0)
    centres = (np.arange(size) + 0.5) * length / size - 0.5
    reach = math.ceil(width)
    sources = np.floor(centres) + np.arange(-reach, reach + 2)[:, None]
    weights = np.maximum(0, 1 - np.abs(sources - centres) / width)
    weights /= weights.sum(axis=0)
    return sources.clip(0, length - 1).astype(np.int64), weights.astype(np.float32)


_EXIF = b"Exif\0\0"
_JPEG = b"\xff\xd8"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG's frame headers."""
_BESIDES = frozenset([0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE])
"""Markers of tables, application segments and comments."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Possible bits per level of each colour type."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(exif: bytes) -> int:
    """Read the orientation from an EXIF block's first directory; 0 if it is missing or the block is broken.

    Pillow could read it, too, but differs from OpenCV and DALI if the entry's type is wrong.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4], "")
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, place)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 0


def _levels(image: Image.Image) -> Pixels:
    """Convert a decoded image to uint8 RGB [H, W, 3]."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise Undecodable("its levels have 32 bits: nothing says which is white")
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def _describe_other_file(encoded: bytes) -> str:
    """Describe bytes in none of the formats, and the way out."""
    for marks, start, text in _OTHERS:
        if encoded.startswith(marks, start):
            return text
    return "it is no image of a kind that is decoded (" + ", ".join(FORMATS) + ")"


_SAVE = ", which is not decoded; save it as a JPEG or a PNG"
_AGAIN = "; copy or download the image again"
_OTHERS = [
    ((b"GIF8",), 0, "it is a GIF" + _SAVE),
    ((b"ftypavif", b"ftypavis"), 4, "it is an AVIF" + _SAVE),
    ((b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1"), 4, "it is a HEIC" + _SAVE),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), 0, "it is a JPEG XL" + _SAVE),
    ((b"8BPS",), 0, "it is a Photoshop file" + _SAVE),
    ((b"\0\0\1\0",), 0, "it is an icon" + _SAVE),
    ((b"\x93NUMPY", b"\x80\x04", b"\x80\x05"), 0, "it is an array, not an encoded image; save it as a PNG"),
    ((b"<!", b"<html", b"<HTML"), 0, "it is a web page" + _AGAIN),
    ((b"version https://git-lfs",), 0, "it is Git LFS's pointer to a file; fetch that by `git lfs pull`"),
    ((b"\x1f\x8b", b"PK\3\4"), 0, "it is an archive; unpack it"),
]
"""First bytes of other files, their offset, and the description."""


def png_is_intact(encoded: bytes) -> bool:
    """Tell whether a PNG's chunks are complete up to the last, with correct checksums on the critical ones."""
    try:
        return len(_bare_png(encoded)[0]) > 0
    except Undecodable:
        return False


def _bare_png(encoded: bytes) -> tuple[bytes, bytes]:
    """Strip a PNG to its critical chunks, so that faults in others do no harm; return it and its EXIF block.

    Raises Undecodable if a critical chunk is broken or missing.
    """
    parts, exif = [_PNG], b""
    start, kind = len(_PNG), b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(encoded[start : start + 4])
        kind, chunk = encoded[start + 4 : start + 8], encoded[start:end]
        if len(chunk) < 12 or end > len(encoded):
            raise Undecodable(_CUT)
        critical = not kind[0] & 0x20
        if critical or kind == b"eXIf":
            right = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
            if critical and not right:
                raise Undecodable(f"its chunk {kind.decode('ascii', 'replace')} has a wrong checksum")
            if critical:
                parts.append(chunk)
            elif right:
                exif = chunk[8:-4]
        start = end
    return b"".join(parts), exif
