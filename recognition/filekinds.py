"""What a file is, told from its first bytes, where it is not what its name says."""

_ARCHIVES = {
    b"\x1f\x8b": "compressed with gzip: unpack it with gunzip",
    b"BZh": "compressed with bzip2: unpack it with bunzip2",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with unzstd",
    b"PK\x03\x04": "a zip archive, as torch.save and numpy.savez write too: unpack it, or give another file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
}
_OTHERS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"%PDF": "a PDF document",
    b"\x0a\x23\xd7\xce": "a RecordIO file (.rec), as data.path takes it",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program",
}
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<?xml")


def mistaken(data: bytes) -> str | None:
    """What a file that begins with `data` is, and the way out; None where it is none of the usual mistakes.

    The sentence goes on from "this is ...".
    """
    start = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS and not the file itself: fetch that with `git lfs pull`"
    if start.lower().startswith(_PAGES):
        return (
            "a web page (HTML), which a download leaves that needs a login or a confirmation: download the file again"
        )
    if start.startswith((b'{"error', b'{"message', b'{"detail')):
        return "a server's answer (JSON) and not the file: download the file again"
    for magic, kind in (_ARCHIVES | _OTHERS).items():
        if data.startswith(magic):
            return kind
    if data[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if data and not any(data[:4096]):
        return "filled with zeros, as a copy or download that did not finish leaves it: fetch it again"
    return None
