"""An index whose files are damaged in ways that its sizes do not tell: found by `make soak SOAK=fuzzing`."""

from pathlib import Path

import numpy as np
import pytest

from recognition.data.index import open_index
from recognition.data.insightface_rec import InsightFaceWriter
from recognition.errors import UserError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    with InsightFaceWriter(tmp_path / "data") as writer:
        for image in range(6):
            writer.add(image // 2, f"image {image}".encode())
    return tmp_path / "data"


def test_a_header_that_is_no_python_is_damage(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = open_index(data).folder / "labels.npy"
    # NumPy reads headers by Python's own parser, and lets its errors through.
    path.write_bytes(path.read_bytes().replace(b")", b" ", 1))
    assert open_index(data).read(5) == b"image 5"
    assert "labels.npy" in caplog.text and "the index is damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [("ranges", 3, (0, 1 << 63, 9)), ("ranges", 3, (7, 0, 9)), ("starts", 4, 1 << 40)],
    ids=["offset", "file", "start"],
)
def test_a_place_in_no_file_is_named(data: Path, name: str, place: int, value: object) -> None:
    path = open_index(data).folder / f"{name}.npy"
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    index = open_index(data)
    assert index.read(0) == b"image 0"
    with pytest.raises(UserError, match=r"recognition-index/train\.rec: the index is damaged at sample 3 .*delete it"):
        index.read(3)
