import io
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recognition import config, distributed
from recognition.errors import UserError
from recognition.evaluation.verification import verify
from recognition.training import verifying

COORDINATOR: Any = SimpleNamespace(
    ranks=SimpleNamespace(rank=0, world=1, head_device=torch.device("cpu")), on_each=lambda what, work: work()
)


def encoded(value, size=6):
    stream = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def settings(tmp_path):
    """Settings of a run with two sets of one stem and a list whose images lie elsewhere, one of them missing."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "set.bin").write_bytes(
            pickle.dumps(([encoded(image) for image in range(40)], [True] * 10 + [False] * 10))
        )
    (tmp_path / "images").mkdir()
    for image in range(23):
        (tmp_path / f"images/{image}.JPG").write_bytes(encoded(image, 9))
    (tmp_path / "list.csv").write_text("".join(f"{pair}.jpg,{pair + 12}.jpg,{pair % 2}\n" for pair in range(12)))
    (tmp_path / "run.toml").write_text(
        f'[data]\npath = "{tmp_path}"\n[backbone]\nimage_size = 32\n[evaluation]\n'
        f'image_folder = "{tmp_path / "images"}"\n'
        f'pairs = ["{tmp_path}/a/set.bin", "{tmp_path}/b/set.bin", "{tmp_path}/list.csv"]\n'
    )

    def load(*overrides):
        return config.load(tmp_path / "run.toml", overrides)

    return load


def test_settings_of_a_run_reach_its_sets(settings):
    with pytest.raises(UserError, match=r"list\.csv: 1 of 24 images cannot be used"):
        verifying.open_on_ranks(settings(), COORDINATOR)
    sets = verifying.open_on_ranks(settings("evaluation.missing_images=skip"), COORDINATOR)
    assert [pairs.name for pairs in sets] == ["a/set", "b/set", "list"]
    assert [len(pairs) for pairs in sets] == [20, 20, 11]
    assert any("folds" in doubt for doubt in sets[0].warnings)
    sets = verifying.open_on_ranks(settings("evaluation.missing_images=skip", "evaluation.folds=even"), COORDINATOR)
    assert not any("folds" in doubt for doubt in sets[0].warnings)
    with pytest.raises(UserError, match="40 images are not 32 x 32"):
        verifying.open_on_ranks(settings("data.fit=exact"), COORDINATOR)
    with pytest.raises(UserError, match=r"evaluation\.image_folder: no such file or folder"):
        settings("evaluation.image_folder=/none")


def test_machines_that_see_other_images_are_told(settings, monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, [*value[:2], 10]])
    with pytest.raises(UserError, match="list has 11 pairs on rank 0 and 10 on rank 1"):
        verifying.open_on_ranks(settings("evaluation.missing_images=skip"), COORDINATOR)


class Channels:
    """Embeds an image as its channels' means."""

    image_size, embedding_size = 6, 3

    def __call__(self, images):
        return images.mean(axis=(1, 2)).astype(np.float32)


def test_a_verification_gives_the_numbers_and_the_scores(settings, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_rows", lambda rows, sizes: rows)
    pairs = verifying.open_on_ranks(settings("evaluation.missing_images=skip", "backbone.image_size=32"), COORDINATOR)[
        0
    ]
    result = verifying.verify_on_ranks(Channels(), pairs, COORDINATOR, 7, "resize")
    means = np.array([2 * pairs.decode(image).mean(axis=(0, 1)) for image in range(40)])
    assert result == verify(means.astype(np.float32), pairs.same)
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(result.scores[0], (unit[0:20:2] * unit[1:20:2]).sum(axis=1), rtol=1e-5)
