"""Images of every kind, and the levels that each has to show: written from known levels, not read back."""

import base64
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

ROWS, COLUMNS, SIDE = 2, 3, 16  # blocks of one colour: what JPEG keeps exactly but for rounding
COLOURS = [(200, 40, 60), (40, 180, 70), (50, 60, 190), (120, 120, 120), (230, 220, 60), (20, 30, 40)]
GREYS = [10, 85, 170, 255, 0, 127]


@dataclass(frozen=True)
class Kind:
    """An image file of some kind."""

    encoded: bytes
    shown: np.ndarray | None = None
    """uint8 [H, W, 3]: what has to be seen; None where the file is to be refused."""
    lossy: bool = False
    """Whether two levels more or less are as good, and the seams between the blocks do not count."""
    within: int = 0
    """Levels more or less that are as good of what is not lossy."""
    reason: str = ""
    """Where the file is to be refused: what is said of it."""


def blocks(values: list) -> np.ndarray:
    """[32, 48, ...] of six blocks of one value each, which no turn and no mirror image leaves as they are."""
    grid = np.array(values).reshape(ROWS, COLUMNS, *np.shape(values)[1:])
    return grid.repeat(SIDE, axis=0).repeat(SIDE, axis=1)


RGB = blocks(COLOURS).astype(np.uint8)
GREY = blocks(GREYS).astype(np.uint8)
ALPHA = blocks([0, 255, 1, 77, 200, 0]).astype(np.uint8)
DEEP_GREY = blocks([0x0AFF, 0x5580, 0xAA01, 0xFFFF, 0x00FF, 0x7F80]).astype(np.uint16)
DEEP_RGB = RGB.astype(np.uint16) * 256 + np.array([255, 128, 1], np.uint16)


def as_grey(levels: np.ndarray) -> np.ndarray:
    """Grey levels [H, W] as RGB."""
    return np.stack([levels] * 3, axis=-1).astype(np.uint8)


def save(levels: np.ndarray | Image.Image, form: str, **options: object) -> bytes:
    """Encode by Pillow."""
    stream = io.BytesIO()
    image = levels if isinstance(levels, Image.Image) else Image.fromarray(levels)
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(levels: np.ndarray, orientation: int) -> np.ndarray:
    """How `levels` [H, W, 3] are to be shown with this EXIF orientation."""
    mirrored = levels[:, ::-1]
    return np.ascontiguousarray(
        {
            1: levels,
            2: mirrored,
            3: np.rot90(levels, 2),
            4: levels[::-1],
            5: levels.swapaxes(0, 1),
            6: np.rot90(levels, -1),
            7: np.rot90(levels, 2).swapaxes(0, 1),
            8: np.rot90(levels),
        }[orientation]
    )


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """An EXIF block, with a thumbnail in its second directory where there is one."""
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    first = struct.pack(">H", 1) + entry
    if not thumbnail:
        return b"Exif\0\0MM\0*\0\0\0\x08" + first + bytes(4)
    after = 8 + len(first) + 4
    second = struct.pack(">HHHIIHHIII", 2, 0x0201, 4, 1, after + 30, 0x0202, 4, 1, len(thumbnail), 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + first + struct.pack(">I", after) + second + thumbnail


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(levels: np.ndarray, bits: int) -> bytes:
    """Rows of samples of `bits` bits each, filled up to whole bytes, as PNG, BMP and TIFF pack them."""
    rows = levels.reshape(len(levels), -1)
    if bits == 16:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    unpacked = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    lines = np.packbits(unpacked.reshape(len(rows), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + line.tobytes() for line in lines)


def png(
    levels: np.ndarray, bits: int, colour: int, *extra: bytes, interlaced: bool = False, after: bytes = b""
) -> bytes:
    """A PNG of `levels` [H, W] or [H, W, channels], with chunks before and after its data."""
    height, width = levels.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    data = b"".join(packed(levels[top::down, left::across], bits) for top, left, down, across in passes)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    body = chunk(b"IDAT", zlib.compress(data)) + after
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + body + chunk(b"IEND", b"")


def bmp(indices: np.ndarray, bits: int, palette: list[tuple[int, int, int]]) -> bytes:
    """A BMP with a palette, from its last row to the first; rows of whole bytes and of a multiple of four."""
    rows = b"".join(line + bytes(-len(line) % 4) for line in (packed(row[None], bits)[1:] for row in indices[::-1]))
    colours = b"".join(bytes((blue, green, red, 0)) for red, green, blue in palette)
    start = 54 + len(colours)
    header = struct.pack(
        "<2sIIIIiiHHIIiiII",
        *(b"BM", start + len(rows), 0, start, 40, indices.shape[1], indices.shape[0], 1, bits, 0),
        *(len(rows), 0, 0, len(palette), 0),
    )
    return header + colours + rows


def tiled_tiff(levels: np.ndarray) -> bytes:
    """A TIFF of RGB `levels` in uncompressed tiles of 16 x 16 pixels."""
    height, width, channels = levels.shape
    depth = 8 * levels.itemsize
    tiles = [
        levels[top : top + SIDE, left : left + SIDE].tobytes()
        for top in range(0, height, SIDE)
        for left in range(0, width, SIDE)
    ]
    count, tile = len(tiles), len(tiles[0])
    tags = 11
    after = 8 + 2 + 12 * tags + 4
    starts, sizes, bits = after, after + 4 * count, after + 8 * count
    data = bits + 6
    short, long = 3, 4
    entries = [
        *((256, short, 1, width), (257, short, 1, height), (258, short, 3, bits), (259, short, 1, 1)),
        *((262, short, 1, 2), (277, short, 1, channels), (284, short, 1, 1), (322, short, 1, SIDE)),
        *((323, short, 1, SIDE), (324, long, count, starts), (325, long, count, sizes)),
    ]
    directory = struct.pack("<H", tags) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    tables = struct.pack(f"<{count}I", *(data + tile * number for number in range(count)))
    tables += struct.pack(f"<{count}I", *[tile] * count) + struct.pack("<3H", *[depth] * 3)
    return b"II*\0\x08\0\0\0" + directory + tables + b"".join(tiles)


def jpeg_with(encoded: bytes, marker: int, content: bytes) -> bytes:
    """A JPEG with one more segment behind its first two bytes."""
    return encoded[:2] + bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content + encoded[2:]


# Of libjpeg's own encoder with `arith_code`, which Pillow does not reach: `RGB`.
ARITHMETIC = base64.b64decode(
    """/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAIBAQEBAQIBAQECAgICAgQDAgICAgUEBAMEBgUGBgYFBgYGBwkIBgcJBwYGCAsICQoKCgoKBggLDA
    sKDAkKCgr/2wBDAQICAgICAgUDAwUKBwYHCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgr/yQARCAAg
    ADADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/ANvDR8CuI6M3WcZ628Z2DM+y+lFD5RpjWJ7wcq9cn92niKHpbv/Z"""
)
YCCK = base64.b64decode(
    """/9j/7gAOQWRvYmUAZAAAAAAC/9sAQwACAQEBAQECAQEBAgICAgIEAwICAgIFBAQDBAYFBgYGBQYGBgcJCAYHCQcGBggLCAkKCgoKCgYICwwLCg
    wJCgoK/9sAQwECAgICAgIFAwMFCgcGBwoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoK/8AAFAgAIAAw
    BAEiAAIRAQMRAQQiAP/EAB8AAAEFAQEBAQEBAAAAAAAAAAABAgMEBQYHCAkKC//EALUQAAIBAwMCBAMFBQQEAAABfQECAwAEEQUSITFBBhNRYQ
    cicRQygZGhCCNCscEVUtHwJDNicoIJChYXGBkaJSYnKCkqNDU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6g4SFhoeIiYqS
    k5SVlpeYmZqio6Slpqeoqaqys7S1tre4ubrCw8TFxsfIycrS09TV1tfY2drh4uPk5ebn6Onq8fLz9PX29/j5+v/EAB8BAAMBAQEBAQEBAQEAAA
    AAAAABAgMEBQYHCAkKC//EALURAAIBAgQEAwQHBQQEAAECdwABAgMRBAUhMQYSQVEHYXETIjKBCBRCkaGxwQkjM1LwFWJy0QoWJDThJfEXGBka
    JicoKSo1Njc4OTpDREVGR0hJSlNUVVZXWFlaY2RlZmdoaWpzdHV2d3h5eoKDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxM
    XGx8jJytLT1NXW19jZ2uLj5OXm5+jp6vLz9PX29/j5+v/aAA4EAQACEQMRBAAAPwD6Uooor9EP8xz9/KKKK+b6KKK+4P8AosCiiivtiiiiv8dz
    +Swooor4/ooor/Qw/Pwooor8q6KKK/1IPzcKKKK/rEooor/Js/YAooor/9k="""
)


def jpegs() -> dict[str, Kind]:
    """JPEG files that are decoded."""
    picture, grey = save(RGB, "JPEG", quality=100, subsampling=0), save(GREY, "JPEG", quality=100)
    cmyk = np.concatenate([255 - RGB, np.zeros_like(RGB[..., :1])], axis=-1)
    black = np.concatenate([np.zeros_like(RGB), 255 - GREY[..., None]], axis=-1)
    thumbnail = save(255 - RGB[:16, :16], "JPEG")
    profile = b"ICC_PROFILE\0\x01\x01" + bytes(range(200))
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    found = {
        "baseline": picture,
        "4:2:0": save(RGB, "JPEG", quality=100, subsampling=2),
        "4:2:2": save(RGB, "JPEG", quality=100, subsampling=1),
        "progressive": save(RGB, "JPEG", quality=100, subsampling=0, progressive=True),
        "restart markers": save(RGB, "JPEG", quality=100, restart_marker_blocks=1),
        "arithmetic coding": ARITHMETIC,
        "RGB, Adobe transform 0": save(RGB, "JPEG", quality=100, keep_rgb=True),
        "ICC profile": jpeg_with(picture, 0xE2, profile),
        "thumbnail": jpeg_with(picture, 0xE1, exif(1, thumbnail)),
        "orientation in XMP alone": jpeg_with(picture, 0xE1, xmp),
        "broken EXIF": jpeg_with(picture, 0xE1, b"Exif\0\0" + bytes(range(40))),
        "EXIF orientation as another type": jpeg_with(
            picture, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\4\0\0\0\1\0\0\0\6"
        ),
        "EXIF orientation 9": jpeg_with(picture, 0xE1, exif(9)),
        "bytes behind its end": picture + bytes(range(256)) * 3,
        "two pictures (MPO)": save(
            Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.fromarray(255 - RGB)], quality=100
        ),
        "CMYK": save(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100),
    }
    kinds = {f"JPEG, {name}": Kind(encoded, RGB, lossy=True) for name, encoded in found.items()}
    kinds["JPEG, CMYK, black alone"] = Kind(
        save(Image.fromarray(black, "CMYK"), "JPEG", quality=100), as_grey(GREY), lossy=True
    )
    kinds["JPEG, grey"] = Kind(grey, as_grey(GREY), lossy=True)
    cut_exif = exif(6)[:-4]  # without the pointer to the next directory, which ends the block
    two = jpeg_with(jpeg_with(picture, 0xE1, exif(6)), 0xE1, exif(3))
    kinds["JPEG, EXIF cut"] = Kind(jpeg_with(picture, 0xE1, cut_exif), turned(RGB, 6), lossy=True)
    kinds["JPEG, two EXIF blocks"] = Kind(two, turned(RGB, 3), lossy=True)
    kinds["JPEG, YCCK"] = Kind(YCCK, RGB, lossy=True)
    for value in range(1, 9):
        kinds[f"JPEG, EXIF orientation {value}"] = Kind(
            jpeg_with(picture, 0xE1, exif(value)), turned(RGB, value), lossy=True
        )
    return kinds


def pngs() -> dict[str, Kind]:
    """PNG files that are decoded."""
    grey, rgb, palette, grey_alpha, rgb_alpha = 0, 2, 3, 4, 6
    colours = chunk(b"PLTE", bytes(np.array(COLOURS, np.uint8)))
    indices = blocks([0, 1, 2, 3, 4, 5])
    with_alpha = np.concatenate([RGB, ALPHA[..., None]], axis=-1)
    deep_alpha = np.concatenate([DEEP_RGB, ALPHA[..., None] * np.uint16(257)], axis=-1)
    two_greys = np.stack([GREY, ALPHA], axis=-1)
    deep_greys = np.stack([DEEP_GREY, ALPHA * np.uint16(257)], axis=-1)
    wrong = bytearray(chunk(b"tEXt", b"Comment\0of a camera"))
    wrong[-1] ^= 255
    animation = [
        chunk(b"acTL", struct.pack(">II", 2, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 48, 32, 0, 0, 1, 10, 0, 0)),
    ]
    second = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1, 48, 32, 0, 0, 1, 10, 0, 0)) + chunk(
        b"fdAT", struct.pack(">I", 2) + zlib.compress(packed(255 - RGB, 8))
    )
    kinds = {
        "1 bit grey": Kind(png(blocks([0, 1, 1, 0, 1, 0]), 1, grey), as_grey(blocks([0, 255, 255, 0, 255, 0]))),
        "2 bit grey": Kind(png(blocks([0, 1, 2, 3, 1, 0]), 2, grey), as_grey(blocks([0, 85, 170, 255, 85, 0]))),
        "4 bit grey": Kind(png(blocks([0, 1, 7, 15, 8, 3]), 4, grey), as_grey(blocks([0, 17, 119, 255, 136, 51]))),
        "8 bit grey": Kind(png(GREY, 8, grey), as_grey(GREY)),
        "16 bit grey": Kind(png(DEEP_GREY, 16, grey), as_grey(DEEP_GREY >> 8)),
        "8 bit grey, one grey transparent": Kind(png(GREY, 8, grey, chunk(b"tRNS", b"\0\x55")), as_grey(GREY)),
        "8 bit RGB": Kind(png(RGB, 8, rgb), RGB),
        "16 bit RGB": Kind(png(DEEP_RGB, 16, rgb), RGB),
        "16 bit RGB, one colour transparent": Kind(png(DEEP_RGB, 16, rgb, chunk(b"tRNS", bytes(6))), RGB),
        "palette": Kind(png(indices, 8, palette, colours), RGB),
        "palette, 4 bit": Kind(png(indices, 4, palette, colours), RGB),
        "palette with transparency": Kind(png(indices, 8, palette, colours, chunk(b"tRNS", b"\0\x80\xff")), RGB),
        "grey and alpha": Kind(png(two_greys, 8, grey_alpha), as_grey(GREY)),
        "16 bit grey and alpha": Kind(png(deep_greys, 16, grey_alpha), as_grey(DEEP_GREY >> 8)),
        "RGB and alpha, colours under alpha 0": Kind(png(with_alpha, 8, rgb_alpha), RGB),
        "16 bit RGB and alpha": Kind(png(deep_alpha, 16, rgb_alpha), RGB),
        "interlaced": Kind(png(RGB, 8, rgb, interlaced=True), RGB),
        "interlaced, 16 bit grey": Kind(png(DEEP_GREY, 16, grey, interlaced=True), as_grey(DEEP_GREY >> 8)),
        "gamma": Kind(png(RGB, 8, rgb, chunk(b"gAMA", struct.pack(">I", 100_000))), RGB),
        "sRGB": Kind(png(RGB, 8, rgb, chunk(b"sRGB", b"\0")), RGB),
        "ICC profile": Kind(png(RGB, 8, rgb, chunk(b"iCCP", b"none\0\0" + zlib.compress(bytes(200)))), RGB),
        "broken ICC profile": Kind(png(RGB, 8, rgb, chunk(b"iCCP", b"none\0\0broken")), RGB),
        "long text": Kind(png(RGB, 8, rgb, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))), RGB),
        "animated": Kind(png(RGB, 8, rgb, *animation, after=second), RGB),
        "wrong checksum of a text": Kind(png(RGB, 8, rgb, bytes(wrong)), RGB),
        "wrong checksum of EXIF": Kind(png(RGB, 8, rgb, chunk(b"eXIf", exif(6)[6:])[:-1] + b"\0"), RGB),
        "bytes behind its end": Kind(png(RGB, 8, rgb) + b"more", RGB),
        "EXIF behind the data": Kind(png(RGB, 8, rgb, after=chunk(b"eXIf", exif(6)[6:])), turned(RGB, 6)),
    }
    for value in range(1, 9):
        kinds[f"EXIF orientation {value}"] = Kind(png(RGB, 8, rgb, chunk(b"eXIf", exif(value)[6:])), turned(RGB, value))
    return {f"PNG, {name}": kind for name, kind in kinds.items()}


def others() -> dict[str, Kind]:
    """BMP, WebP, TIFF, PNM and JPEG 2000 files that are decoded."""
    picture, grey, second = Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(255 - RGB)
    with_alpha = Image.fromarray(np.concatenate([RGB, ALPHA[..., None]], axis=-1))
    inks = np.concatenate([255 - RGB, np.zeros_like(RGB[..., :1])], axis=-1)
    cmyk, deep = Image.fromarray(inks, "CMYK"), Image.fromarray(DEEP_GREY)
    bits = blocks([0, 1, 1, 0, 1, 0])
    ascii_grey = b"P2\n# made by hand\n48 32\n255\n" + b"\n".join(b" ".join(b"%d" % v for v in row) for row in GREY)
    ascii_rgb = b"P3 48 32 255\n" + b"\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in RGB)
    ascii_bits = b"P1\n48 32\n" + b"\n".join(b"".join(b"%d" % v for v in row) for row in 1 - bits)
    raw_bits = b"P4\n48 32\n" + b"".join(packed(row[None], 1)[1:] for row in 1 - bits)
    tagged = {value: save(RGB, "TIFF", tiffinfo={0x0112: value}) for value in (3, 6)}
    orientation = {value: exif(value)[6:] for value in (3, 6)}
    lossless = {"irreversible": False}
    return {
        "BMP, 1 bit": Kind(
            bmp(bits, 1, [COLOURS[0], COLOURS[4]]), blocks([COLOURS[4 * k] for k in (0, 1, 1, 0, 1, 0)])
        ),
        "BMP, 4 bit": Kind(bmp(blocks([0, 1, 2, 3, 4, 5]), 4, COLOURS), RGB),
        "BMP, 8 bit": Kind(bmp(blocks([0, 1, 2, 3, 4, 5]), 8, COLOURS), RGB),
        "BMP, 8 bit grey": Kind(save(grey, "BMP"), as_grey(GREY)),
        "BMP, 24 bit": Kind(save(picture, "BMP"), RGB),
        "BMP, 32 bit": Kind(save(with_alpha, "BMP"), RGB),
        "WebP, lossy": Kind(save(picture, "WEBP", quality=100), RGB, lossy=True),
        "WebP, lossless": Kind(save(picture, "WEBP", lossless=True), RGB),
        "WebP, alpha": Kind(save(with_alpha, "WEBP", lossless=True, exact=True), RGB),
        "WebP, lossy with alpha": Kind(save(with_alpha, "WEBP", quality=100, exact=True), RGB, lossy=True),
        "WebP, animated": Kind(
            save(picture, "WEBP", save_all=True, append_images=[second], lossless=True, duration=50), RGB
        ),
        **{
            f"WebP, EXIF orientation {value}": Kind(
                save(picture, "WEBP", lossless=True, exif=orientation[value]), turned(RGB, value)
            )
            for value in (3, 6)
        },
        "TIFF": Kind(save(picture, "TIFF"), RGB),
        "TIFF, LZW": Kind(save(picture, "TIFF", compression="tiff_lzw"), RGB),
        "TIFF, deflate": Kind(save(picture, "TIFF", compression="tiff_adobe_deflate"), RGB),
        "TIFF, packbits": Kind(save(picture, "TIFF", compression="packbits"), RGB),
        "TIFF, JPEG inside": Kind(save(picture, "TIFF", compression="jpeg", quality=100), RGB, lossy=True),
        "TIFF, 1 bit": Kind(
            save(Image.fromarray(bits.astype(bool)), "TIFF"), as_grey(blocks([0, 255, 255, 0, 255, 0]))
        ),
        "TIFF, grey": Kind(save(grey, "TIFF"), as_grey(GREY)),
        "TIFF, 16 bit grey": Kind(save(deep, "TIFF"), as_grey(DEEP_GREY >> 8)),
        "TIFF, 16 bit grey, LZW": Kind(save(deep, "TIFF", compression="tiff_lzw"), as_grey(DEEP_GREY >> 8)),
        "TIFF, 16 bit RGB": Kind(tiled_tiff(DEEP_RGB), RGB),
        "TIFF, alpha": Kind(save(with_alpha, "TIFF"), RGB),
        "TIFF, palette": Kind(save(picture.quantize(6), "TIFF"), RGB),
        "TIFF, CMYK": Kind(save(cmyk, "TIFF"), RGB),
        "TIFF, several pages": Kind(save(picture, "TIFF", save_all=True, append_images=[second]), RGB),
        "TIFF, tiled": Kind(tiled_tiff(RGB), RGB),
        "TIFF, BigTIFF": Kind(save(picture, "TIFF", big_tiff=True), RGB),
        **{f"TIFF, orientation {value}": Kind(encoded, turned(RGB, value)) for value, encoded in tagged.items()},
        "PPM": Kind(save(picture, "PPM"), RGB),
        "PPM, text": Kind(ascii_rgb, RGB),
        "PPM, 16 bit": Kind(b"P6 48 32 65535\n" + DEEP_RGB.astype(">u2").tobytes(), RGB, within=1),
        "PGM": Kind(save(grey, "PPM"), as_grey(GREY)),
        "PGM, text": Kind(ascii_grey, as_grey(GREY)),
        "PGM, 16 bit": Kind(b"P5 48 32 65535\n" + DEEP_GREY.astype(">u2").tobytes(), as_grey(DEEP_GREY >> 8)),
        "PBM": Kind(raw_bits, as_grey(255 * bits)),
        "PBM, text": Kind(ascii_bits, as_grey(255 * bits)),
        "JPEG 2000": Kind(save(picture, "JPEG2000", **lossless), RGB),
        "JPEG 2000, lossy": Kind(
            save(picture, "JPEG2000", irreversible=True, quality_mode="dB", quality_layers=[60]), RGB, lossy=True
        ),
        "JPEG 2000, codestream": Kind(save(picture, "JPEG2000", no_jp2=True, **lossless), RGB),
        "JPEG 2000, grey": Kind(save(grey, "JPEG2000", **lossless), as_grey(GREY)),
        "JPEG 2000, 16 bit grey": Kind(save(deep, "JPEG2000", **lossless), as_grey(DEEP_GREY >> 8)),
        "JPEG 2000, alpha": Kind(save(with_alpha, "JPEG2000", **lossless), RGB),
    }


def broken_but_shown() -> dict[str, Kind]:
    """Spoilt files that viewers show and that are decoded: below where a JPEG's data end, all is grey."""
    cut = save(RGB, "JPEG", quality=100, subsampling=0, restart_marker_blocks=6)  # a marker behind each 8 rows
    above = RGB.copy()
    above[SIDE:] = 128
    picture = save(RGB, "JPEG", quality=100, subsampling=0)
    return {
        "JPEG, cut, with an end put behind": Kind(cut[: cut.index(b"\xff\xd1")] + b"\xff\xd9", above, lossy=True),
        "JPEG, a marker that stands alone": Kind(picture[:2] + b"\xff\x01" + picture[2:], RGB, lossy=True),
        "JPEG, a byte between its segments": Kind(picture[:2] + b"\xff" + picture[2:], RGB, lossy=True),
    }


def refused() -> dict[str, Kind]:
    """Files that are not decoded, and what is said of them."""
    picture, deep = save(RGB, "JPEG"), bytearray(save(RGB, "JPEG"))
    deep[deep.index(b"\xff\xc0") + 4] = 12
    image, floats = save(RGB, "PNG"), Image.fromarray(GREY.astype(np.float32))
    spoilt = bytearray(image)
    spoilt[-30] ^= 255
    found = {
        "no bytes": (b"", "no bytes"),
        "GIF": (save(Image.fromarray(GREY), "GIF"), "it is a GIF"),
        "AVIF": (b"\0\0\0\x1cftypavif" + bytes(40), "it is an AVIF"),
        "HEIC": (b"\0\0\0\x1cftypheic" + bytes(40), "it is a HEIC"),
        "JPEG XL": (b"\xff\x0a" + bytes(40), "it is a JPEG XL"),
        "web page": (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS's pointer"),
        "other bytes": (b"garbage" * 30, "it is no image of a kind that is decoded"),
        "JPEG, 12 bit": (bytes(deep), "12 bits a level"),
        "JPEG, cut": (picture[: len(picture) // 2], "truncated"),
        "JPEG, header alone": (picture[:20], "without a frame header"),
        "PNG, cut": (image[:-20], "truncated"),
        "PNG, wrong checksum of its data": (bytes(spoilt), "chunk IDAT has a wrong checksum"),
        "WebP, cut": (save(RGB, "WEBP", quality=90)[:100], "truncated"),
        "TIFF, cut": (save(RGB, "TIFF")[:900], "truncated"),
        "TIFF, floats": (save(floats, "TIFF"), "levels have 32 bits"),
        "JPEG 2000, cut": (save(RGB, "JPEG2000")[:-60], "broken data stream"),
        "PPM, cut": (save(RGB, "PPM")[:900], "truncated"),
        "too large": (b"P5 60000 60000 255 ", "more than 64,000,000 pixels"),
    }
    return {name: Kind(encoded, reason=reason) for name, (encoded, reason) in found.items()}
