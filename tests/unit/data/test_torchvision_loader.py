"""Images without DALI are DALI's, but for rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recognition.config import Augment, Data
from recognition.data.pipeline import Batch, Pipeline
from recognition.data.procedural import dataset
from recognition.data.torchvision_loader import TorchvisionLoader
from recognition.errors import UserError
from recognition.images import Undecodable, decode
from tests.unit.data.test_pipeline import EVERYTHING, Images, encode, picture

SIZE = 112
AUGMENTS = {
    "none": Augment(flip=0.0),
    "flip": Augment(),
    "geometry": Augment(flip=0.0, shift=0.1, zoom=0.1, rotate_degrees=20.0),
    "colour": Augment(flip=0.0, brightness=0.5, contrast=0.5, saturation=0.5, gray=0.3),
    "erase": Augment(flip=0.0, erase=0.5),
    "everything": EVERYTHING,
}
# In levels of 0..255. Each of geometry, colour and size rounds once, and where a level is nearly between two whole
# numbers the loaders may round to either side. A level of geometry that differs by one may, after a colour that doubles
# it, differ by two, and one of a resized image by another.
LARGEST = {"none": 0, "flip": 0, "geometry": 1, "colour": 1, "erase": 0, "everything": 3}
MEAN = 0.02  # measured: at most 0.005, in noise after geometry


def batches(loader: str, images: list[bytes], augment: Augment, steps: int = 1) -> list[Batch]:
    pipeline = Pipeline(
        Images(images),  # type: ignore[arg-type]
        Data(path=Path(), threads=2, augment=augment, loader=loader),  # type: ignore[arg-type]
        seed=1,
        batch=len(images),
        rank=0,
        world=1,
        device=torch.device("cpu"),
        image_size=SIZE,
        channels_last=True,
    )
    try:
        return [next(pipeline) for _ in range(steps)]
    finally:
        pipeline.close()


def differences(images: list[bytes], augment: Augment) -> torch.Tensor:
    """Return the differences of the two loaders' levels; all else is the same."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    ours, theirs = (batches(loader, images, augment, steps=2) for loader in ("torchvision", "dali"))
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.samples, its.samples)
        assert torch.equal(mine.labels, its.labels)
    return (torch.cat([batch.images for batch in ours]) - torch.cat([batch.images for batch in theirs])).abs() * 127.5


def ramp(step: int) -> Image.Image:
    line = np.arange(SIZE) * step // 2 % 256
    return Image.fromarray(
        np.stack(np.broadcast_arrays(line, line[:, None], line[:, None] + line), -1).astype(np.uint8)
    )


def noise(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def drawn() -> list[bytes]:
    """Faces, plain colours, ramps and noise, as JPEG and PNG."""
    plain = [encode(Image.new("RGB", (SIZE, SIZE), color)) for color in ((0, 0, 0), (255, 255, 255), (200, 30, 90))]
    others = [encode(image, "PNG") for k in range(1, 4) for image in (ramp(k), noise(k))]
    return [*(dataset.encode(1, identity, 0) for identity in range(8)), *plain, *others]


@pytest.mark.parametrize("kind", AUGMENTS)
def test_each_change_is_dalis(drawn: list[bytes], kind: str) -> None:
    found = differences(drawn, AUGMENTS[kind])
    assert found.max() < LARGEST[kind] + 1e-3
    assert found.mean() < MEAN


@pytest.mark.parametrize("size", [(80, 80), (90, 70), (113, 113), (160, 140), (250, 250), (300, 50)])
@pytest.mark.parametrize("kind", ["none", "everything"])
def test_other_sizes_become_what_dali_makes_of_them(size: tuple[int, int], kind: str) -> None:
    images = [encode(noise(seed, size), "PNG") for seed in range(4)] + [encode(picture(5, size), "PNG")]
    found = differences(images, AUGMENTS[kind])
    assert found.max() < max(LARGEST[kind], 1) + 1e-3
    assert found.mean() < MEAN


def oriented(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(1, (SIZE, 90)), form, exif=exif.tobytes())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_is_obeyed_as_dali_does(form: str) -> None:
    assert differences([oriented(form, value) for value in range(1, 9)], AUGMENTS["none"]).max() < 1 + 1e-3


def test_what_one_decodes_the_other_does_and_alike() -> None:
    color, gray = picture(1, (SIZE, SIZE)), picture(2, (SIZE, SIZE)).convert("L")
    alpha = color.convert("RGBA")
    alpha.putalpha(gray)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257 - 77)
    images = [
        encode(gray),
        encode(color.convert("CMYK")),
        encode(color, progressive=True, subsampling=2),
        *(
            encode(image, "PNG")
            for image in (gray, alpha, alpha.convert("LA"), color.quantize(64), gray.convert("1"), deep)
        ),
        *(encode(image, "BMP") for image in (color, gray, color.quantize(64))),
        encode(color, "WEBP", quality=80),
        encode(alpha, "WEBP", lossless=True),
        encode(color, "TIFF"),
        encode(color, "PPM"),
    ]
    assert differences(images, AUGMENTS["none"]).max() < 1e-3


def test_what_dali_refuses_is_refused() -> None:
    damaged = bytearray(encode(picture(0), "PNG"))
    damaged[-30] ^= 255
    for encoded in (encode(picture(0), "GIF"), bytes(damaged), b"", encode(picture(0))[:200]):
        with pytest.raises(Undecodable):
            decode(encoded)


def test_images_do_not_depend_on_the_threads_or_on_what_stands_beside_them(drawn: list[bytes]) -> None:
    (whole,) = batches("torchvision", drawn, EVERYTHING)
    pipeline = Pipeline(
        Images(drawn),  # type: ignore[arg-type]
        Data(path=Path(), threads=1, augment=EVERYTHING, loader="torchvision"),
        seed=1,
        batch=len(drawn),
        rank=1,
        world=2,
        device=torch.device("cpu"),
        image_size=SIZE,
        channels_last=True,
    )
    part = next(pipeline)
    pipeline.close()
    assert torch.equal(part.images, whole.images[-len(part.images) :])


def test_the_callers_threads_stay(drawn: list[bytes]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches("torchvision", drawn, EVERYTHING)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_setting_chooses_the_loader_and_dali_must_be_there(
    drawn: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made: list[object] = []
    start = TorchvisionLoader.__init__

    def counted(self: TorchvisionLoader, *given: Any) -> None:
        made.append(self)
        start(self, *given)

    monkeypatch.setattr(TorchvisionLoader, "__init__", counted)
    batches("auto", drawn, AUGMENTS["none"])
    assert len(made) == 1
    with pytest.raises(UserError, match=r"data\.loader is dali, which is not installed"):
        batches("dali", drawn, AUGMENTS["none"])
