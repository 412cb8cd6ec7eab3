"""Every kind of image in every decoder, training's two and verification's; and images of other sizes."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recognition.config import Augment, Data
from recognition.data.pipeline import Pipeline
from recognition.errors import UserError
from recognition.evaluation.pairs import PairSet
from recognition.evaluation.verification import embed_pairs
from recognition.images import decode, fit, size
from tests.support import picture_kinds
from tests.support.picture_kinds import GREY, RGB, Kind, save
from tests.unit.data.test_pipeline import Images, as_levels, picture

SHOWN = picture_kinds.jpegs() | picture_kinds.pngs() | picture_kinds.others() | picture_kinds.broken_but_shown()
REFUSED = picture_kinds.refused()
TURN = picture_kinds.chunk(b"eXIf", picture_kinds.exif(6)[6:])
SIZE = 32  # the shorter side of every kind


@pytest.fixture(params=["dali", "torchvision"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return str(request.param)


@contextlib.contextmanager
def training(loader: str, encoded: Sequence[bytes], how: str, quarantine: Path | None = None) -> Iterator[Pipeline]:
    """A pipeline whose batch is all images."""
    pipeline = Pipeline(
        Images(list(encoded)),  # type: ignore[arg-type]
        Data(path=Path(), threads=2, augment=Augment(flip=0.0), loader=loader, fit=how),  # type: ignore[arg-type]
        seed=1,
        batch=len(encoded),
        rank=0,
        world=1,
        device=torch.device("cpu"),
        image_size=SIZE,
        channels_last=True,
        quarantine=quarantine,
    )
    try:
        yield pipeline
    finally:
        pipeline.close()


def trained_on(loader: str, encoded: Sequence[bytes], how: str) -> np.ndarray:
    """[n, S, S, 3]: the levels of the images in their order."""
    with training(loader, encoded, how) as pipeline:
        batch = next(pipeline)
    assert sorted(batch.samples.tolist()) == list(range(len(encoded)))
    return as_levels(batch.images)[batch.samples.argsort().numpy()]


def verification_set(encoded: Sequence[bytes]) -> PairSet:
    return PairSet(Path("set.bin"), encoded, np.arange(len(encoded) // 2) % 2 == 0)


class Pixels:
    """Embeds an image as its levels."""

    image_size = SIZE
    embedding_size = SIZE * SIZE * 3

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32)


def verified_on(encoded: Sequence[bytes], how: str) -> np.ndarray:
    """The sum of each image and its mirror image, as verification embeds them."""
    return embed_pairs(Pixels(), verification_set(encoded), 4, fit=how).reshape(-1, SIZE, SIZE, 3)


def middle(levels: np.ndarray) -> np.ndarray:
    """The square of SIZE pixels in the middle."""
    top, left = ((length - SIZE) // 2 for length in levels.shape[:2])
    return levels[top : top + SIZE, left : left + SIZE]


def distance(levels: np.ndarray, kind: Kind, *, cut: bool = False) -> float:
    """The largest difference from what has to be seen, of lossy kinds inside the blocks. cut: of the middle."""
    assert kind.shown is not None
    counts = np.ones(kind.shown.shape, bool)
    if kind.lossy:
        rows, columns = (np.arange(length) % picture_kinds.SIDE for length in kind.shown.shape[:2])
        counts[(rows < 4) | (rows > 11)] = False
        counts[:, (columns < 4) | (columns > 11)] = False
    shown = kind.shown.astype(float)
    if cut:
        shown, counts = middle(shown), middle(counts)
    assert levels.shape == shown.shape
    return float(np.abs(levels - shown)[counts].max())


def allowed(kind: Kind) -> float:
    return (2 if kind.lossy else kind.within) + 1e-3


@pytest.mark.parametrize("name", SHOWN)
def test_verification_shows_every_kind(name: str) -> None:
    assert distance(verification_set([SHOWN[name].encoded]).decode(0), SHOWN[name]) < allowed(SHOWN[name])


def test_training_shows_every_kind_as_verification_does(loader: str) -> None:
    for (name, kind), levels in zip(
        SHOWN.items(), trained_on(loader, [kind.encoded for kind in SHOWN.values()], "crop"), strict=True
    ):
        assert distance(levels, kind, cut=True) < allowed(kind), name
        differs = np.abs(levels - middle(decode(kind.encoded).astype(float))).max()
        assert differs < (2 if kind.lossy else 0) + 1e-3, name


@pytest.mark.parametrize("name", REFUSED)
def test_verification_names_what_is_not_decoded(name: str) -> None:
    with pytest.raises(UserError, match=rf"image 1 of pair 1 cannot be decoded: .*{REFUSED[name].reason}"):
        verification_set([REFUSED[name].encoded] * 2).decode(0)


def test_training_lists_what_is_not_decoded_with_the_reason(loader: str, tmp_path: Path) -> None:
    good = save(RGB, "PNG")
    encoded = [good, *(kind.encoded for kind in REFUSED.values()), good]
    with training(loader, encoded, "resize", tmp_path / "quarantine.jsonl") as pipeline:
        batch = next(pipeline)
    assert set(batch.samples.tolist()) == {0, len(encoded) - 1}
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["sample"]: line["error"] for line in listed}
    for sample, (name, kind) in enumerate(REFUSED.items(), 1):
        assert kind.reason in reasons[sample], name


def test_what_the_loader_alone_does_not_decode_is_decoded_all_the_same(loader: str, monkeypatch, tmp_path) -> None:
    stubborn = save(RGB, "WEBP", lossless=True)
    with training(loader, [save(RGB, "PNG"), stubborn], "crop", tmp_path / "quarantine.jsonl") as pipeline:
        kind, next_of = type(pipeline._loader), pipeline._loader.next_images
        monkeypatch.setattr(kind, "can_decode", lambda self, encoded: encoded != stubborn)

        def fails_once() -> torch.Tensor:
            next_of()
            raise RuntimeError("no decoder")

        pipeline._loader.next_images = fails_once  # type: ignore[method-assign]
        batch = next(pipeline)
    assert sorted(batch.samples.tolist()) == [0, 1]
    for levels in as_levels(batch.images):
        assert np.abs(levels - middle(RGB)).max() < 1e-3
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("how", ["resize", "crop"])
def test_other_sizes_become_the_same_in_training_and_in_verification(loader: str, how: str) -> None:
    noise = np.random.default_rng(0)
    shapes = [(80, 80), (33, 57), (57, 32), (16, 16), (250, 250), (31, 300), (32, 32), (101, 64)]
    images = [noise.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    images += [np.asarray(picture(1, (90, 70)))]
    encoded = [save(image, "PNG") for image in images] + [picture_kinds.png(RGB, 8, 2, TURN)]
    trained, verified = trained_on(loader, encoded, how), verified_on(encoded, how)
    assert np.abs(trained + trained[:, :, ::-1] - verified).max() < 2 + 1e-3  # of two images, a level each


@pytest.mark.parametrize("how", ["resize", "crop"])
@given(shape=st.tuples(st.integers(17, 250), st.integers(17, 250)))
def test_fitting_is_linear_interpolation_smoothed_where_it_shrinks(shape: tuple[int, int], how: str) -> None:
    levels = np.asarray(picture(3, shape[::-1]))
    side = min(shape)
    top, left = ((length - side) // 2 for length in shape)
    source = levels[top : top + side, left : left + side] if how == "crop" else levels
    expected = np.asarray(Image.fromarray(source).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    difference = np.abs(fit(levels, SIZE, how).astype(int) - expected)
    inside = difference[4:-4, 4:-4]  # at the border, Pillow weighs otherwise
    assert inside.max() <= 1
    assert difference.max() <= 4


def test_what_has_the_size_stays_and_exact_refuses_the_rest() -> None:
    levels = middle(RGB)
    for how in ("resize", "crop", "exact"):
        assert fit(levels, SIZE, how) is levels
    with pytest.raises(ValueError, match="48 x 32 pixels, not 32 x 32"):
        fit(RGB, SIZE, "exact")


def test_exact_refuses_another_size_at_the_first_meeting_and_the_ways_out_work(loader: str) -> None:
    encoded = [save(middle(RGB), "PNG"), save(RGB, "PNG")]
    refusal = r"sample 1 is 48 x 32 pixels.*data\.fit is exact.*image_size is 32: data\.fit=resize or data\.fit=crop"
    with pytest.raises(UserError, match=refusal), training(loader, encoded, "exact") as pipeline:
        next(pipeline)
    with pytest.raises(UserError, match=r"image 2 of pair 1 is 48 x 32 pixels.*data\.fit=resize or data\.fit=crop"):
        verified_on(encoded, "exact")
    for way in ("resize", "crop"):
        assert len(trained_on(loader, encoded, way)) == len(verified_on(encoded, way)) == 2
    assert len(trained_on(loader, encoded[:1] * 2, "exact")) == 2


@pytest.mark.parametrize("name", [name for name in SHOWN if "orientation" not in name and "EXIF" not in name])
def test_the_header_alone_gives_the_size(name: str) -> None:
    assert size(SHOWN[name].encoded) == GREY.shape
