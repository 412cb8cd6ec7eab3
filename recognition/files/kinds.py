"""The kind of a file by its first bytes, for messages about files that are not what their name says."""

import codecs
import re
from pathlib import Path

_HEAD = 4096
_MAGIC = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip-compressed: unpack it with `gunzip < FILE > NEW` or `tar xzf`"),
    (b"BZh", "bzip2-compressed: unpack it with `bunzip2 < FILE > NEW` or `tar xjf`"),
    (b"\xfd7zXZ\x00", "xz-compressed: unpack it with `unxz < FILE > NEW` or `tar xJf`"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed: unpack it with `unzstd < FILE > NEW`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes"),
    (b"%PDF", "a PDF document"),
    (b"\x0a\x23\xd7\xce", "a RecordIO file of MXNet"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program or library"),
)
_BRANDS = {
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"heic": "a HEIC image",
    b"heix": "a HEIC image",
    b"mif1": "a HEIF image",
}
_PAGE = re.compile(
    rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)


def what_is(content: Path | bytes) -> str:
    """Name the kind of a file, or of content with these first bytes: "an HTML page, ...", "a zip archive".

    If there is a remedy, the name includes it. Never raises: a file that cannot be read is "unreadable".
    """
    if isinstance(content, Path):
        if content.is_dir():
            return "a folder"
        try:
            with content.open("rb") as file:
                content = file.read(_HEAD)
        except (OSError, ValueError) as error:
            return f"unreadable: {getattr(error, 'strerror', None) or error}"
    return _name(content[:_HEAD])


def _name(head: bytes) -> str:
    if not head:
        return "an empty file"
    if not head.strip(b"\x00"):
        return "nothing but zeros: a download or a copy was cut short"
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return _archive(head) if name == "a zip archive" else name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video")
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it with `tar xf`"
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "an HTML page: the link led to a web page, not to the file; download the file itself"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "a safetensors file"
    if re.match(rb"P[1-7]\s", head):
        return "a PPM image"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle"
    # The first field of an ONNX model is its IR version.
    if head[:1] == b"\x08" and len(head) > 2 and head[1] < 32 and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42"):
        return "an ONNX model"
    return _text(head)


def _archive(head: bytes) -> str:
    """Name the kind of a zip archive by its first entry, as torch.save and numpy.savez write such archives too."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/.format_version", b"/.data/serialization_id")):
        return "a file of torch.save"
    if name.endswith(b"constants.pkl") or b"/code/" in name:
        return "a TorchScript model"
    if name.endswith(b".npy"):
        return "NumPy arrays (.npz)"
    return "a zip archive: unpack it with `unzip`"


def _text(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16: save it as UTF-8"
    try:
        # The last character may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        readable = sum(byte >= 0x20 or byte in b"\t\r\n" for byte in head) / len(head)
        return "text that is not in UTF-8: save it as UTF-8" if readable > 0.99 else "binary, of no known kind"
    if "\x00" in text:
        return "binary, of no known kind"
    return "JSON" if re.match(r'\s*(\{\s*["}]|\[\s*[\[{\]"\d])', text) else "text"
