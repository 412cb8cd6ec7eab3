import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from recognition.config import Augment, Data
from recognition.data.augment import draw_parameters
from recognition.data.index import open_index
from recognition.data.order import permute, samples_at
from recognition.data.pipeline import Batch, Pipeline
from recognition.errors import UserError

SIZE = 32
NO_CHANGE = Augment(flip=0.0)
EVERYTHING = Augment(
    shift=0.1,
    zoom=0.1,
    rotate_degrees=15.0,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    gray=0.2,
    erase=0.5,
)


@dataclass
class Images:
    """Stands in for an index."""

    encoded: list[bytes]
    people: list[int] | None = None
    """Labels, where it is not every image another person's."""

    @property
    def num_images(self) -> int:
        return len(self.encoded)

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.num_images) * 10 if self.people is None else np.array(self.people)

    def read(self, sample: int) -> bytes:
        return self.encoded[sample]

    def describe(self, sample: int) -> str:
        return f"sample {sample}"


def picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Smooth random colours, which survive JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(encoded: bytes) -> np.ndarray:
    """[H, W, 3] float64 by Pillow."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(np.float64)


def as_levels(images: torch.Tensor) -> np.ndarray:
    """[b, H, W, 3] on the scale of 0..255."""
    return images.permute(0, 2, 3, 1).numpy().astype(np.float64) * 127.5 + 127.5


@pytest.fixture(scope="module")
def images() -> Images:
    return Images([encode(picture(seed), quality=95) for seed in range(23)])


Open = Callable[..., Pipeline]


@pytest.fixture(params=["dali", "torchvision"])
def loader(request: pytest.FixtureRequest) -> str:
    """Who makes the images: each test is run with both."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return str(request.param)


@pytest.fixture
def opened(loader: Literal["dali", "torchvision"]) -> Iterator[Open]:
    pipelines: list[Pipeline] = []

    def open_pipeline(images: Images, augment: Augment = NO_CHANGE, together: int = 1, **options: object) -> Pipeline:
        settings = {
            "seed": 1,
            "batch": 8,
            "rank": 0,
            "world": 1,
            "device": torch.device("cpu"),
            "image_size": SIZE,
            "channels_last": True,
        }
        data = Data(path=Path(), threads=1, augment=augment, images_per_identity=together, loader=loader)
        pipelines.append(Pipeline(images, data, **(settings | options)))  # type: ignore[arg-type]
        return pipelines[-1]

    yield open_pipeline
    for pipeline in pipelines:
        pipeline.close()


def take(pipeline: Pipeline, steps: int) -> list[Batch]:
    return [next(pipeline) for _ in range(steps)]


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.samples, second.samples)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize("channels_last", [True, False])
def test_pixels_labels_and_layout(images: Images, opened: Open, channels_last: bool) -> None:
    for step, batch in enumerate(take(opened(images, channels_last=channels_last), 4)):
        _, samples = samples_at(1, 23, np.arange(8 * step, 8 * step + 8))
        assert batch.samples.tolist() == samples.tolist()
        assert batch.labels.tolist() == (samples * 10).tolist()
        assert batch.labels.dtype == batch.samples.dtype == torch.int64
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (8, 3, SIZE, SIZE)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        expected = np.stack([pixels(images.read(sample)) for sample in samples])
        difference = np.abs(as_levels(batch.images) - expected)
        assert difference.max() <= 2  # two versions of libjpeg-turbo
        assert difference.mean() < 0.1
        levels = as_levels(batch.images)
        assert np.abs(levels - levels.round()).max() < 1e-4


def test_real_faces_equal_pillows(shared_data: Path, tmp_path: Path, opened: Open) -> None:
    index = open_index(shared_data / "lfw-split", tmp_path)
    batch = next(opened(index, batch=32, image_size=112))
    expected = np.stack([pixels(index.read(sample)) for sample in batch.samples.tolist()])
    assert np.abs(as_levels(batch.images) - expected).mean() < 0.1
    assert batch.labels.tolist() == index.labels[batch.samples.numpy()].tolist()


def test_other_formats_and_sizes(opened: Open) -> None:
    gray, color = picture(0).convert("L"), picture(1)
    large, wide = picture(2, (100, 100)), picture(3, (80, 40))
    sources = [
        encode(gray),
        encode(gray, "PNG"),
        encode(color, "PNG"),
        encode(color.convert("RGBA"), "PNG"),
        encode(color, "BMP"),
        encode(color, "WEBP", lossless=True),
        encode(color, "JPEG", progressive=True),
        encode(large, "PNG"),
        encode(wide, "PNG"),
        encode(picture(4, (20, 20)), "PNG"),
    ]
    batch = next(opened(Images(sources), batch=len(sources)))
    for sample, ours in zip(batch.samples.tolist(), as_levels(batch.images), strict=True):
        image = Image.open(io.BytesIO(sources[sample])).convert("RGB")
        expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float64)
        assert np.abs(ours - expected).mean() < 1, sample
        assert np.abs(ours - expected).max() <= 3, sample


def test_flips_are_mirror_images(images: Images, opened: Open) -> None:
    plain, flipped = next(opened(images, batch=23)), next(opened(images, Augment(), batch=23))
    flips = draw_parameters(Augment(), 1, np.zeros(23, np.int64), plain.samples.numpy(), SIZE).flip
    assert flips is not None
    assert 0 < flips.sum() < 23
    for flip, before, after in zip(flips, plain.images, flipped.images, strict=True):
        assert torch.equal(after, before.flip(-1) if flip else before)


def test_geometry_is_that_of_grid_sample(images: Images, opened: Open) -> None:
    augment = Augment(flip=0.0, shift=0.1, zoom=0.1, rotate_degrees=20.0)
    plain, warped = next(opened(images, batch=23)), next(opened(images, augment, batch=23))
    matrix = draw_parameters(augment, 1, np.zeros(23, np.int64), plain.samples.numpy(), SIZE).matrix
    assert matrix is not None
    # grid_sample's points run from -1 to 1 between the outer edges of the image.
    to_pixels = np.array([[SIZE / 2, 0, SIZE / 2], [0, SIZE / 2, SIZE / 2], [0, 0, 1]])
    theta = (np.linalg.inv(to_pixels) @ np.concatenate([matrix, np.tile([[[0, 0, 1]]], (23, 1, 1))], 1) @ to_pixels)[
        :, :2
    ]
    grid = torch.nn.functional.affine_grid(torch.from_numpy(theta), [23, 3, SIZE, SIZE], align_corners=False)
    expected = torch.nn.functional.grid_sample(plain.images.double(), grid, padding_mode="border", align_corners=False)
    assert (expected - warped.images).abs().max() < 2 / 127.5


def test_colors_are_those_of_the_matrix(images: Images, opened: Open) -> None:
    augment = Augment(flip=0.0, brightness=0.5, contrast=0.5, saturation=0.5, gray=0.3)
    plain, changed = next(opened(images, batch=23)), next(opened(images, augment, batch=23))
    color = draw_parameters(augment, 1, np.zeros(23, np.int64), plain.samples.numpy(), SIZE).color
    assert color is not None
    expected = np.einsum("nij,nhwj->nhwi", color[:, :, :3].astype(np.float64), as_levels(plain.images))
    expected = (expected + color[:, None, None, :, 3]).clip(0, 255)
    assert (expected == 255).any()  # clamping is tried
    assert np.abs(as_levels(changed.images) - expected).max() < 0.51


def test_rectangles_are_painted_gray(images: Images, opened: Open) -> None:
    augment = Augment(flip=0.0, erase=0.5)
    plain, erased = next(opened(images, batch=23)), next(opened(images, augment, batch=23))
    numbers = draw_parameters(augment, 1, np.zeros(23, np.int64), plain.samples.numpy(), SIZE)
    assert numbers.erase_anchor is not None
    assert numbers.erase_shape is not None
    expected = plain.images.clone()
    for image, (top, left), (height, width) in zip(
        expected, numbers.erase_anchor.astype(int), numbers.erase_shape.astype(int), strict=True
    ):
        image[:, top : top + height, left : left + width] = 0
    assert not torch.equal(expected, plain.images)
    assert (expected - erased.images).abs().max() < 0.6 / 127.5


@pytest.mark.parametrize("augment", [Augment(), EVERYTHING])
def test_a_step_is_the_same_whenever_and_on_however_many_ranks(images: Images, opened: Open, augment: Augment) -> None:
    whole = take(opened(images, augment), 7)  # two epochs and a bit
    for start in (1, 2, 5):
        assert_same(next(opened(images, augment, start_step=start)), whole[start])
    for world in (2, 3):
        parts = [take(opened(images, augment, rank=rank, world=world), 4) for rank in range(world)]
        for step in range(4):
            joined = [
                torch.cat([getattr(part[step], name) for part in parts]) for name in ("images", "labels", "samples")
            ]
            assert_same(Batch(*joined), whole[step])
    assert_same(take(opened(images, augment, channels_last=False), 3)[2], whole[2])


def test_images_of_an_identity_stand_together_on_however_many_ranks(images: Images, opened: Open) -> None:
    people = np.repeat([0, 1, 2, 3, 4], [9, 2, 7, 1, 4])
    mixed = Images(images.encoded, np.random.default_rng(0).permutation(people).tolist())
    labels, steps = torch.tensor(mixed.people), 8  # more than two rounds of (3 + 1 + 3 + 1 + 2) groups of 3
    whole = take(opened(mixed, EVERYTHING, 3, batch=12), steps)
    for batch in whole:
        assert torch.equal(batch.labels, labels[batch.samples])
        assert torch.equal(batch.labels, batch.labels[::3].repeat_interleave(3))
        assert len(batch.images.flatten(1).unique(dim=0)) == 12
    assert any(len(batch.samples.unique()) < 12 for batch in whole)  # images that stand twice in a batch were tried
    assert torch.cat([batch.samples for batch in whole]).unique().tolist() == list(range(23))
    for start in (1, 5):
        assert_same(next(opened(mixed, EVERYTHING, 3, batch=12, start_step=start)), whole[start])
    for world in (2, 4, 5):  # of 5 ranks most have a part of a group
        parts = [take(opened(mixed, EVERYTHING, 3, batch=12, rank=rank, world=world), 5) for rank in range(world)]
        for step in range(5):
            joined = [
                torch.cat([getattr(part[step], name) for part in parts]) for name in ("images", "labels", "samples")
            ]
            assert_same(Batch(*joined), whole[step])


def test_an_epoch_has_every_sample_once_and_changes_them_anew(images: Images, opened: Open) -> None:
    batches = take(opened(images, EVERYTHING, batch=23), 2)
    for epoch, batch in enumerate(batches):
        assert batch.samples.tolist() == permute(1, epoch, 23, np.arange(23)).tolist()
    first, second = (batch.images[batch.samples == 0] for batch in batches)
    assert not torch.equal(first, second)


def test_a_batch_stays_what_it_was(images: Images, opened: Open) -> None:
    pipeline = opened(images, EVERYTHING)
    batches = take(pipeline, 6)
    copies = [batch.images.clone() for batch in batches]
    take(pipeline, 6)
    pipeline.close()
    for batch, copy in zip(batches, copies, strict=True):
        assert torch.equal(batch.images, copy)


def operators(pipeline: Pipeline) -> set[str]:
    """Of DALI's graph."""
    next(pipeline)
    loader: Any = pipeline._loader
    return {name.decode() for name in re.findall(rb"__([A-Z][A-Za-z]+)_\d", loader._graph.serialize())}


@pytest.mark.parametrize("loader", ["dali"], indirect=True)
def test_what_is_switched_off_is_not_in_the_graph(images: Images, opened: Open) -> None:
    # Split and Merge send the images of another size, and no others, through Resize.
    always = {"ExternalSource", "Image", "Split", "Resize", "Merge", "CropMirrorNormalize"}
    assert operators(opened(images)) == always
    assert operators(opened(images, Augment())) == always
    assert operators(opened(images, Augment(zoom=0.1))) == always | {"WarpAffine"}
    assert operators(opened(images, Augment(gray=0.1))) == always | {"CoordTransform"}
    assert operators(opened(images, Augment(erase=0.1))) == always | {"Erase"}


def png(width: int, height: int) -> bytes:
    whole = encode(picture(0), "PNG")
    return whole[:16] + width.to_bytes(4) + height.to_bytes(4) + whole[24:]


def spoiled(images: Images) -> dict[int, bytes]:
    """Bad images, by their samples: 7, 8 and 9 in a row, and the last one, after which comes the first."""
    flipped = bytearray(encode(picture(0), "PNG"))
    flipped[-30] ^= 255  # its end is there, so only decoding tells
    half_a_webp = encode(picture(0), "WEBP", quality=90)
    return {
        2: b"garbage" * 30,
        4: b"",
        7: images.encoded[7][:-40],
        8: bytes(flipped),
        9: half_a_webp[: len(half_a_webp) // 2],
        12: png(16000, 16000),
        22: bytes(flipped),
    }


def test_bad_images_are_replaced_by_the_next_that_decode(images: Images, opened: Open, tmp_path: Path) -> None:
    bad = spoiled(images)
    broken = Images([bad.get(sample, encoded) for sample, encoded in enumerate(images.encoded)])
    replaced = {2: 3, 4: 5, 7: 10, 8: 10, 9: 10, 12: 13, 22: 0}
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    found = take(opened(broken, EVERYTHING, quarantine=quarantine), 6)
    clean = take(opened(images, EVERYTHING), 6)
    for ours, reference in zip(found, clean, strict=True):
        assert ours.samples.tolist() == [replaced.get(sample, sample) for sample in reference.samples.tolist()]
        assert torch.equal(ours.labels, ours.samples * 10)
        good = torch.tensor([sample not in bad for sample in reference.samples.tolist()])
        assert torch.equal(ours.images[good], reference.images[good])
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == sorted(bad)
    for line in lines:
        assert line["where"] == f"sample {line['sample']}"
        assert line["label"] == line["sample"] * 10
        assert line["error"]
    # What is found on the way, and by whom, changes nothing.
    assert_same(next(opened(broken, EVERYTHING, start_step=4)), found[4])
    parts = [take(opened(broken, EVERYTHING, rank=rank, world=3), 6) for rank in range(3)]
    for step in range(6):
        assert torch.equal(torch.cat([part[step].images for part in parts]), found[step].images)


def test_a_replacement_is_changed_as_itself(images: Images, opened: Open) -> None:
    broken = Images([*images.encoded[:5], b"", *images.encoded[6:]])
    batch = next(opened(broken, EVERYTHING, batch=23))
    twice = batch.images[batch.samples == 6]
    assert len(twice) == 2
    assert torch.equal(twice[0], twice[1])


def test_too_many_bad_images_end_the_run(opened: Open, tmp_path: Path, images: Images) -> None:
    broken = Images([images.encoded[0]] + [b"no image"] * 300)
    with pytest.raises(UserError, match=r"10\d of 301 images .*quarantine.jsonl"):
        take(opened(broken, batch=64, quarantine=tmp_path / "quarantine.jsonl"), 10)
    with pytest.raises(UserError, match="3 of 3 images"):
        opened(Images([b"no image"] * 3), batch=2)


def test_a_failure_that_is_no_images_fault_is_not_hidden(images: Images, opened: Open, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    quarantine = tmp_path / "quarantine.jsonl"
    pipeline = opened(images, quarantine=quarantine)
    next(pipeline)
    pipeline._loader.next_images = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(pipeline)
    assert not quarantine.exists()


def test_errors_of_reading_pass_through(images: Images, opened: Open) -> None:
    class Unreadable(Images):
        def read(self, sample: int) -> bytes:
            raise UserError("train.rec: Input/output error")

    with pytest.raises(UserError, match="Input/output error"):
        opened(Unreadable(images.encoded))


def test_a_rank_without_an_image_is_refused(images: Images, opened: Open) -> None:
    with pytest.raises(UserError, match="a batch of 2 leaves some of 3 ranks"):
        opened(images, batch=2, world=3)
