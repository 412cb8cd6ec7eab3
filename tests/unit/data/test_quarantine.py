import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recognition.data.quarantine import BadImage, Quarantine, check_header
from recognition.errors import UserError
from recognition.images import MAX_PIXELS


class Nowhere:
    """Stands in for an index."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.labels = np.arange(num_images) * 10

    def describe(self, sample: int) -> str:
        return f"sample {sample}"


def encode(form: str = "JPEG", size: tuple[int, int] = (37, 53), **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int) -> bytes:
    whole = encode("PNG")
    return whole[:16] + width.to_bytes(4) + height.to_bytes(4) + whole[24:]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "optimize": True}),
        ("JPEG", {"restart_marker_blocks": 2}),
        ("JPEG", {"exif": b"Exif\x00\x00" + bytes(300), "comment": b"\xff\xc0 no frame header"}),
        ("PNG", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("PPM", {}),
    ],
)
def test_header_gives_the_size(form: str, options: dict[str, Any]) -> None:
    encoded = encode(form, **options)
    assert check_header(encoded) == (53, 37)


def test_header_refuses() -> None:
    jpeg = encode()
    for encoded, message in [
        (b"", "no bytes"),
        (b"\xff\xd8", "frame header"),
        (jpeg[:20], "frame header"),
        (jpeg[: len(jpeg) // 2], "truncated"),
        (png(32, 32)[:-12], "truncated"),
        (png(MAX_PIXELS, 2), "more than 64,000,000 pixels"),
        (png(0, 2), "0 x 2 pixels"),
        (b"GIF89a", "it is a GIF, which is not decoded"),
        (b"P6 10000 10000 255 ", "pixels"),
        (b"P6 100000 100000 255 ", "pixels"),
    ]:
        with pytest.raises(BadImage, match=message):
            check_header(encoded)
    assert check_header(png(MAX_PIXELS, 1)) == (1, MAX_PIXELS)


def test_quarantine_is_shared_by_appending(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    first, second = (Quarantine(Nowhere(6), path) for _ in range(2))  # type: ignore[arg-type]
    first.add(3, "what")
    second.add(4, "why")
    first.add(3, "again")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"sample": 3, "label": 30, "where": "sample 3", "error": "what"},
        {"sample": 4, "label": 40, "where": "sample 4", "error": "why"},
    ]
    assert first.replace(np.array([2, 3, 4])).tolist() == [2, 4, 4]
    assert second.replace(np.array([3, 4, 5])).tolist() == [3, 5, 5]
    first.add(5, "last")
    first.add(4, "too")
    assert first.replace(np.array([3, 4, 5, 0])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("images", "bearable"), [(3, 2), (150, 100), (20_000, 200)])
def test_too_many_bad_images(images: int, bearable: int) -> None:
    quarantine = Quarantine(Nowhere(images), None)  # type: ignore[arg-type]
    for sample in range(bearable):
        quarantine.add(sample, "torn")
    assert quarantine.replace(np.array([0])).tolist() == [bearable]
    for _ in range(2):
        with pytest.raises(UserError, match=f"{bearable + 1} of {images} images .* sample 0: torn; sample 1: torn; "):
            quarantine.add(bearable, "torn")
    with pytest.raises(UserError):
        quarantine.replace(np.array([0]))
