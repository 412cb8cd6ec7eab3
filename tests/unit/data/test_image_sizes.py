"""Images of other sizes than the model's: counted, and said once."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from recognition.config import Augment, Data
from recognition.data.image_sizes import SizeCounter, describe_sizes
from recognition.data.index import Index, open_index
from recognition.data.pipeline import Pipeline

SHAPES = [(16, 16), (16, 16), (20, 20), (24, 12), (20, 20), (16, 16)]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    for number, shape in enumerate(SHAPES):
        buffer = BytesIO()
        Image.new("RGB", shape).save(buffer, "PNG")
        (tmp_path / "faces" / f"p{number}").mkdir(parents=True)
        (tmp_path / "faces" / f"p{number}" / "1.png").write_bytes(buffer.getvalue())
    return open_index(tmp_path / "faces")


def opened(index: Index, **options: object) -> Pipeline:
    settings = {"seed": 1, "rank": 0, "world": 1, "batch": 6, "image_size": 16, "channels_last": True}
    data = Data(path=index.path, threads=1, augment=Augment(flip=0.0), loader="torchvision", prefetch=1)
    return Pipeline(index, data, device=torch.device("cpu"), **(settings | options))  # type: ignore[arg-type]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("stop", ["after an epoch", "before"])
def test_other_sizes_are_said_when_met_and_counted_once(
    index: Index, caplog: pytest.LogCaptureFixture, stop: str
) -> None:
    pipeline = opened(index)
    if stop == "after an epoch":
        next(pipeline)
        assert len(warnings(caplog)) == 2
        next(pipeline)
    pipeline.close()
    pipeline.close()
    met, counted = warnings(caplog)
    assert "those that are not 16 x 16 are scaled to it" in met
    done, rest = counted.split(" images read were not 16 x 16 (")
    others, total = map(int, done.split(" of "))
    assert total % 6 == 0 and others == total // 2
    assert rest.startswith(f"20 x 20: {total // 3}, 24 x 12: {total // 6}): they are scaled")


def test_one_rank_speaks_and_nothing_is_said_of_the_wanted_size(index: Index, caplog: pytest.LogCaptureFixture) -> None:
    opened(index, rank=1, world=2).close()
    sizes = SizeCounter(16, "crop")
    sizes.add(16, 16)
    assert sizes.report() == ""
    assert not warnings(caplog)
    sizes.add(16, 17)
    assert sizes.report() == (
        "1 of 2 images read were not 16 x 16 (17 x 16: 1): they are cut to their middle square "
        'and scaled to it (data.fit = "crop")'
    )
    assert len(warnings(caplog)) == 1


def test_counting_from_threads(caplog: pytest.LogCaptureFixture) -> None:
    sizes = SizeCounter(112, "resize")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: sizes.add(100 + number % 10, 112), range(4000)))
    assert sizes.report().startswith("4,000 of 4,000 images read were not 112 x 112 (")
    assert " and 5 other sizes" in sizes.report()
    assert len(warnings(caplog)) == 1


def test_sizes_are_listed_as_width_x_height() -> None:
    assert describe_sizes(Counter({(2, 1): 3000, (4, 4): 1})) == "1 x 2: 3,000, 4 x 4: 1"
