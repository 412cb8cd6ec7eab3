"""What a file really is, against files that their own libraries write."""

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from tarfile import TarInfo

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from recognition.files.kinds import what_is


def image(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, kind)
    return stream.getvalue()


def saved(save: object) -> bytes:
    stream = io.BytesIO()
    save(stream)  # type: ignore[operator]
    return stream.getvalue()


def model() -> bytes:
    value = onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "g", [value], [value])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        *((image(kind), f"a {kind} image") for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM")),
        (image("WEBP"), "a WebP image"),
        (image("JPEG2000"), "a JPEG 2000 image"),
        (saved(lambda stream: torch.save({"a": torch.zeros(2)}, stream)), "a file of torch.save"),
        (saved(lambda stream: np.save(stream, np.zeros(2))), "a NumPy array"),
        (saved(lambda stream: np.savez(stream, a=np.zeros(2))), "NumPy arrays"),
        (saved(lambda stream: zipfile.ZipFile(stream, "w").writestr("a.txt", "x")), "a zip archive: unpack"),
        (TarInfo("a").tobuf(), "a tar archive"),
        (gzip.compress(b"x"), "gzip-compressed"),
        (pickle.dumps(([b""], [True])), "a pickle"),
        (model(), "an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
        (b"\xef\xbb\xbf\n <!doctype HTML>\n<html>", "an HTML page"),
        (b'<?xml version="1.0"?><!-- x --><html>', "an HTML page"),
        (b'{"message": "not found"}', "JSON"),
        (b"", "an empty file"),
        (bytes(100), "nothing but zeros"),
        (("é" * 5000).encode(), "text"),
        ("x,José\n".encode("latin-1"), "text that is not in UTF-8"),
        ("x".encode("utf-16"), "text in UTF-16"),
        (bytes(range(200)) * 9, "binary"),
        (b"[run]\nseed = 1\n", "text"),
    ],
    # Not by the content: archives hold the time, and workers have to agree on the names.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_content_is(content: bytes, name: str, tmp_path: Path) -> None:
    assert what_is(content).startswith(name)
    (tmp_path / "file").write_bytes(content)
    assert what_is(tmp_path / "file") == what_is(content)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert what_is(tmp_path) == "a folder"
    assert what_is(tmp_path / "none") == "unreadable: No such file or directory"
