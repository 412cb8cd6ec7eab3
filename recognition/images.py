"""Pictures: encoded bytes to RGB levels, and levels of any size to a square of the model's.

This says what the pixels of each kind of image are. Verification and the loader "torchvision" use it; "dali" decodes by
itself what it decodes to the same pixels, and leaves the rest to this module.
"""

import io
import math
import zlib
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
"""What is decoded, by Pillow's names."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf"),
)
"""Of files of these kinds, in lower case."""

MAX_PIXELS = 64_000_000
"""An image with more pixels is refused unread: a small file can claim to be a huge one."""


class Undecodable(ValueError):
    """Why an image cannot be decoded."""


def decode(encoded: bytes) -> Pixels:
    """An image [H, W, 3], RGB, turned as its EXIF orientation says; of several pictures the first. Raises Undecodable.

    Of 16 bits a level the upper 8 are kept. Colours are taken as they are stored: no colour profile or gamma is
    applied, and transparency is left out.
    """
    try:
        if encoded.startswith(_PNG):
            encoded = _sound(encoded)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Undecodable(f"it has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        raise Undecodable(str(error)) from error
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def fit(pixels: Pixels, size: int, how: str) -> Pixels:
    """`pixels` [H, W, 3] at `size` pixels a side.

    `how` is "resize": by linear interpolation, smoothed where it shrinks, height and width each by its own factor;
    "crop": the same of the largest square in the middle; or "exact": ValueError where they have another size.
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
    return np.rint(_scaled(_scaled(pixels, size).swapaxes(0, 1), size).swapaxes(0, 1)).astype(np.uint8)


def _scaled(lines: NDArray[np.generic], size: int) -> NDArray[np.float32]:
    """`lines` [n, ...] as `size` lines: a sum over the taps that is the same in every thread and beside any image."""
    places, shares = _taps(len(lines), size)
    scaled = np.zeros((size, *lines.shape[1:]), np.float32)
    for place, share in zip(places, shares, strict=True):
        scaled += lines[place] * share[:, None, None]
    return scaled


@lru_cache(256)
def _taps(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Which of `length` lines of pixels, and with which share, make each of `size` new ones: both [taps, size].

    Triangles around the new lines' centres, as wide as their distance or the old ones', whichever is more. Beyond the
    border, the border's pixels go on, as with DALI; torchvision and Pillow cut the triangles off there.
    """
    width = max(length / size, 1.0)
    centres = (np.arange(size) + 0.5) * length / size - 0.5
    reach = math.ceil(width)
    places = np.floor(centres) + np.arange(-reach, reach + 2)[:, None]
    shares = np.maximum(0, 1 - np.abs(places - centres) / width)
    shares /= shares.sum(axis=0)
    return places.clip(0, length - 1).astype(np.int64), shares.astype(np.float32)


_PNG = b"\x89PNG\r\n\x1a\n"


def _sound(encoded: bytes) -> bytes:
    """A PNG without its auxiliary chunks whose checksums are wrong: viewers pass over them, Pillow stops there."""
    return _PNG + b"".join(_sound_chunks(encoded))


def _sound_chunks(encoded: bytes) -> Iterator[bytes]:
    start, kind = len(_PNG), b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(encoded[start : start + 4])
        kind, chunk = encoded[start + 4 : start + 8], encoded[start:end]
        if len(chunk) < 12 or end > len(encoded):
            raise Undecodable("a PNG that ends early")
        right = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if right:
            yield chunk
        elif not kind[0] & 0x20:
            raise Undecodable(f"a PNG whose chunk {kind.decode('ascii', 'replace')} has a wrong checksum")
        start = end
