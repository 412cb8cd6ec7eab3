import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recognition.errors import UserError
from recognition.evaluation.folds import fold_warnings, is_uneven, spread_evenly
from recognition.evaluation.verification_sets import distinct_names, open_sets


def encoded(value, size=(8, 8), form="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(stream, form)
    return stream.getvalue()


def write(path, same, change=()):
    """A `.bin` of images that all differ, some of them changed."""
    images = [encoded(number) for number in range(2 * len(same))]
    for image, content in dict(change).items():
        images[image] = content
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps((images, list(same))))
    return path


TURNS = [True, False] * 10


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/lfw.bin", "a/cfp.bin"], ["lfw", "cfp"]),
        (["a/lfw.bin", "b/lfw.bin", "a/cfp.bin"], ["a/lfw", "b/lfw", "cfp"]),
        (["a/lfw.bin", "a/lfw.txt"], ["lfw.bin", "lfw.txt"]),
        (["a/lfw.bin", "b/lfw.bin", "b/lfw.txt"], ["a/lfw", "b/lfw.bin", "lfw.txt"]),
        (["x/a/lfw.bin", "y/a/lfw.bin"], ["x/a/lfw", "y/a/lfw"]),
        (["lfw", "lfw.bin"], ["/sets/lfw", "lfw.bin"]),
        (["a\udce9/l\n.bin", "b/l\n.bin"], ["a\\udce9/l\\n", "b/l\\n"]),
    ],
)
def test_every_set_has_a_name_of_its_own(paths, names):
    assert distinct_names([Path("/sets") / path for path in paths]) == names


def test_results_of_sets_of_one_stem_stay_apart(tmp_path):
    paths = [write(tmp_path / folder / "lfw.bin", TURNS) for folder in ("a", "b")]
    assert [pairs.name for pairs in open_sets(paths, 8)] == ["a/lfw", "b/lfw"]
    (tmp_path / "c").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"a/lfw\.bin is given twice"):
        open_sets([*paths, tmp_path / "c" / "lfw.bin"], 8)


JPEG = encoded(3, form="JPEG")
FAULTS = {
    3: b"",
    8: b"<html><body>no image</body></html>",
    9: encoded(1)[:60],
    21: JPEG[: len(JPEG) // 2],
    30: encoded(2, form="BMP")[:-20],
}


def test_every_image_is_looked_at_before_training(tmp_path):
    path = write(tmp_path / "set.bin", TURNS, FAULTS)
    with pytest.raises(UserError) as caught:
        open_sets([path], 8)
    text = str(caught.value)
    assert "set.bin: 5 of 40 images cannot be used" in text and "and 2 more" in text
    assert "image 2 of pair 2: there is no image" in text
    assert "image 1 of pair 5: " in text and "image 2 of pair 5: " in text
    assert "0x" not in text
    (pairs,) = open_sets([path], 8, missing="skip")
    kept = [pair for pair in range(20) if not {2 * pair, 2 * pair + 1} & set(FAULTS)]
    assert pairs.images == [encoded(image) for pair in kept for image in (2 * pair, 2 * pair + 1)]
    assert pairs.same.tolist() == [TURNS[pair] for pair in kept]
    assert any("4 of 20 pairs left out, for 5 of 40 images" in doubt for doubt in pairs.warnings)
    assert "image 1 of pair 3" in pairs.describe(2 * kept.index(2))


def test_too_few_pairs_left_are_refused_with_the_reason(tmp_path):
    path = write(tmp_path / "set.bin", TURNS[:12], {0: b"", 4: b"", 9: b""})
    with pytest.raises(UserError, match=r"set\.bin: 9 pairs, but 10-fold .*3 of 12 pairs left out"):
        open_sets([path], 8, missing="skip")
    none = write(tmp_path / "none.bin", [False] * 10 + [True], {20: None})
    with pytest.raises(UserError, match=r"all 10 pairs are impostor.*1 of 11 pairs left out"):
        open_sets([none], 8, missing="skip")


def test_images_of_another_size_are_counted(tmp_path):
    path = write(tmp_path / "set.bin", TURNS, {1: encoded(1, (9, 7)), 2: encoded(2, (9, 7)), 5: encoded(4, (4, 4))})
    for fit, said in (("resize", "scaled"), ("crop", "their middle")):
        (pairs,) = open_sets([path], 8, fit=fit)
        (doubt,) = pairs.warnings
        assert "3 images are not 8 x 8 pixels (2 of 9 x 7, 1 of 4 x 4)" in doubt and said in doubt
    with pytest.raises(UserError, match=r"3 images are not 8 x 8 .*data\.fit"):
        open_sets([path], 8, fit="exact")
    assert not open_sets([write(tmp_path / "set.bin", TURNS)], 8, fit="exact")[0].warnings


def test_an_order_that_spoils_the_folds_is_warned_of_and_can_be_mended(tmp_path):
    path = write(tmp_path / "set.bin", [True] * 20 + [False] * 20)
    (pairs,) = open_sets([path], 8)
    assert pairs.same.tolist() == [True] * 20 + [False] * 20
    assert "4, 4, 4, 4, 4, 0, 0, 0, 0, 0 genuine pairs" in pairs.warnings[0]
    assert "evaluation.folds=even" in pairs.warnings[0] and "--folds even" in pairs.warnings[0]
    (even,) = open_sets([path], 8, folds="even")
    assert even.same.tolist() == [True, False] * 20 and not even.warnings
    assert even.images[:4] == [encoded(0), encoded(1), encoded(40), encoded(41)]
    assert "image 1 of pair 21" in even.describe(2)


def test_what_is_uneven():
    generator = np.random.default_rng(0)
    assert not any(is_uneven(generator.permutation([True, False] * 300)) for _ in range(20))
    assert not is_uneven(np.tile([True] * 300 + [False] * 300, 10))
    assert is_uneven(np.arange(300) < 38)
    assert all(is_uneven(np.arange(count) < count // 2) for count in (20, 24, 40, 400))
    # A fold of one pair is of one kind in any order.
    assert not is_uneven(np.arange(10) < 5)
    one_bad = np.tile([True, False], 100)
    one_bad[100:120] = np.arange(20) < 10
    assert not is_uneven(one_bad)
    one_bad[100:140] = np.arange(40) < 20
    assert is_uneven(one_bad)
    assert "only 10.0% of its pairs are genuine" in fold_warnings(np.arange(500) % 10 == 0)[0]
    assert "accuracy of 85.0% already" in fold_warnings(np.arange(500) % 20 > 2)[0]
    assert fold_warnings(np.arange(600) % 2 == 0) == []


@given(genuine=st.integers(0, 300), impostors=st.integers(10, 300), seed=st.integers(0, 99))
def test_spreading_gives_each_fold_its_share(genuine: int, impostors: int, seed: int) -> None:
    same = np.random.default_rng(seed).permutation(np.arange(genuine + impostors) < genuine)
    order = spread_evenly(same)
    assert sorted(order) == list(range(len(same)))
    for kind in (True, False):
        assert np.all(np.diff(order[same[order] == kind]) > 0)
    for fold in np.array_split(same[order], 10):
        assert abs(fold.sum() - same.mean() * len(fold)) <= 1
    assert not is_uneven(same[order])
