import io
import json
import pickle
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from recognition.errors import UserError
from recognition.evaluation.pairs import read_pairs
from recognition.evaluation.verification import embed_pairs, verify


def protocol(embeddings, same):
    """The 10-fold protocol word by word: a loop for every "for"."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    count = len(same)
    distances = []
    for pair in range(count):
        first, second = embeddings[2 * pair], embeddings[2 * pair + 1]
        first, second = first / np.sqrt(np.sum(first**2)), second / np.sqrt(np.sum(second**2))
        distances.append(np.sum((first - second) ** 2))
    thresholds = np.arange(0, 4, 0.01)

    def accuracy(indices, threshold):
        return sum((distances[i] < threshold) == same[i] for i in indices) / len(indices)

    sizes = [count // 10 + (fold < count % 10) for fold in range(10)]
    accuracies, chosen, start = [], [], 0
    for size in sizes:
        test = range(start, start + size)
        train = [i for i in range(count) if i not in test]
        scores = [accuracy(train, threshold) for threshold in thresholds]
        best = thresholds[scores.index(max(scores))]
        accuracies.append(accuracy(test, best))
        chosen.append(best)
        start += size
    return np.mean(accuracies), np.std(accuracies), np.mean(chosen), np.array(distances)


def random_pairs(count, seed, size=6, noise=0.8):
    generator = np.random.default_rng(seed)
    same = generator.random(count) < 0.5
    first = generator.normal(size=(count, size))
    second = np.where(
        same[:, None], first + noise * generator.normal(size=(count, size)), generator.normal(size=(count, size))
    )
    scale = generator.uniform(0.1, 30, (2 * count, 1))
    return scale * np.stack([first, second], axis=1).reshape(2 * count, size), same


@settings(max_examples=8)
@given(count=st.integers(10, 60), seed=st.integers(0, 1000))
@example(count=120, seed=4)
def test_equals_the_protocol_word_by_word(count, seed):
    embeddings, same = random_pairs(count, seed)
    same[:2] = True, False  # one kind alone is refused
    result = verify(embeddings, same)
    accuracy, std, threshold, _ = protocol(embeddings, same)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert result.accuracy_std == pytest.approx(std, abs=1e-12)
    assert result.threshold == pytest.approx(threshold, abs=1e-12)
    assert result.pairs == count


def at_distances(distances):
    """Pairs of unit vectors in the plane at these squared distances."""
    angles = np.arccos(1 - np.asarray(distances) / 2)
    pairs = [[(1, 0), (np.cos(angle), np.sin(angle))] for angle in angles]
    return np.array(pairs).reshape(-1, 2)


def test_by_hand():
    # Ten folds of one pair. Over all pairs the thresholds 0.51 to 1.00 are right nine times, as are 1.51 to 2.00.
    distances = [0.505, 2.005, 0.505, 2.005, 1.505, 1.005, 0.505, 2.005, 0.505, 2.005]
    same = np.array([True, False] * 5)
    result = verify(at_distances(distances), same)
    # So 0.51, the first, judges rightly the pairs whose loss leaves both as good, and wrongly the genuine one at 1.505.
    # Without the impostor pair at 1.005 the upper range is better, and 1.51 accepts it, wrongly.
    assert result.accuracy == pytest.approx(0.8)
    assert result.accuracy_std == pytest.approx(0.4)
    assert result.threshold == pytest.approx((9 * 0.51 + 1.51) / 10)
    # One false accept in five impostor pairs is more than 1e-1.
    assert result.tar_at_far == {"1e-1": None, "1e-2": None, "1e-3": None, "1e-4": None}


def test_threshold_is_strict_and_the_first_of_the_best():
    # Orthogonal vectors are at exactly 2, so the lowest threshold that accepts them is 2.01, the first above.
    genuine, impostor = [(1, 0), (0, 1)], [(1, 0), (-1, 0)]
    result = verify(np.array([genuine, impostor] * 10, float).reshape(-1, 2), np.array([True, False] * 10))
    assert result.threshold == pytest.approx(2.01)
    assert (result.accuracy, result.accuracy_std) == (1.0, 0.0)
    # At distance 0 all thresholds but 0 accept.
    result = verify(np.array([[(1, 0), (5, 0)], impostor] * 10, float).reshape(-1, 2), np.array([True, False] * 10))
    assert result.threshold == pytest.approx(0.01)


def test_folds_are_consecutive_pairs():
    # One fold, the third, has its two kinds exchanged: it alone is wrong.
    genuine, impostor = [(1, 0), (1, 0.1)], [(1, 0), (-1, 0.1)]
    pairs = np.array([genuine, impostor] * 20, float)
    same = np.array([True, False] * 20)
    same[8:12] = ~same[8:12]
    result = verify(pairs.reshape(-1, 2), same)
    assert result.accuracy == pytest.approx(0.9)
    assert result.accuracy_std == pytest.approx(0.3)  # of nine ones and a zero, ddof 0


@pytest.mark.parametrize("impostors", [9, 10, 99, 100, 345, 1000])
def test_tar_at_far_by_counting(impostors):
    generator = np.random.default_rng(impostors)
    distances = np.concatenate([generator.uniform(0, 3, 200), generator.uniform(0.02, 4, impostors).round(2)])
    same = np.arange(len(distances)) < 200
    result = verify(at_distances(distances), same)
    found = np.square(np.subtract(*at_distances(distances).reshape(-1, 2, 2).transpose(1, 0, 2))).sum(axis=1)
    for far, name in ((0.1, "1e-1"), (0.01, "1e-2"), (0.001, "1e-3"), (0.0001, "1e-4")):
        if impostors * far < 1 - 1e-9:
            assert result.tar_at_far[name] is None
            continue
        candidates = np.append(np.unique(found), 5.0)
        rates = [(found[~same] < threshold).mean() for threshold in candidates]
        allowed = [threshold for threshold, rate in zip(candidates, rates, strict=True) if rate <= far + 1e-12]
        assert result.tar_at_far[name] == pytest.approx((found[same] < max(allowed)).mean())


def test_far_counts_ties_as_accepted_together():
    orthogonal, equal, opposite = [(1, 0), (0, 1)], [(1, 0), (1, 0)], [(1, 0), (-1, 0)]
    # Of twenty impostor pairs two may be accepted, but at a threshold above 2 three would be.
    embeddings = np.array([*[equal, orthogonal] * 4, *[orthogonal] * 3, *[opposite] * 17], float).reshape(-1, 2)
    assert verify(embeddings, np.arange(28) < 8).tar_at_far["1e-1"] == 0.5


def test_json_keeps_the_missing_rates():
    result = verify(*random_pairs(50, 7)).to_json()
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"accuracy", "accuracy_std", "threshold", "tar_at_far", "pairs"}
    assert list(result["tar_at_far"]) == ["1e-1", "1e-2", "1e-3", "1e-4"]
    assert result["tar_at_far"]["1e-1"] is not None
    assert result["tar_at_far"]["1e-3"] is None


def test_scale_of_an_embedding_does_not_matter_and_zero_is_no_division():
    embeddings, same = random_pairs(40, 8)
    assert verify(embeddings, same) == verify(embeddings * 2.0 ** np.arange(-40, 40)[:, None], same)
    embeddings[5] = 0
    assert np.isfinite(verify(embeddings, same).accuracy)


def test_six_thousand_pairs_are_quick():
    embeddings, same = random_pairs(6000, 9, size=512)
    start = time.process_time()
    verify(embeddings.astype(np.float32), same)
    # A second or two of this process alone; every threshold for every fold anew would take minutes.
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("same", "message"),
    [
        (np.ones(20, bool), "all 20 pairs are genuine"),
        (np.zeros(20, bool), "all 20 pairs are impostor"),
        (np.arange(9) % 2 == 0, "9 pairs"),
    ],
)
def test_sets_that_cannot_be_judged(same, message):
    with pytest.raises(UserError, match=message):
        verify(np.random.default_rng(0).normal(size=(2 * len(same), 4)), same)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite(value):
    embeddings, same = random_pairs(20, 10)
    embeddings[[7, 12], 2] = value
    with pytest.raises(UserError, match="2 of 40 embeddings are not finite, the first that of image 2 of pair 4"):
        verify(embeddings, same)


class Corners:
    """Embeds an image as the value of its top left pixel, its top right pixel, and the batch's size."""

    image_size = 4
    embedding_size = 3

    def __init__(self):
        self.batches = []

    def __call__(self, images):
        assert images.dtype == np.uint8
        assert images.shape[1:] == (4, 4, 3)
        self.batches.append(len(images))
        return np.stack([images[:, 0, 0, 0], 1000.0 * images[:, 0, -1, 1], images[:, -1, 0, 2]], axis=1).astype(
            np.float32
        )


@pytest.fixture
def pairs(tmp_path):
    images = []
    for value in range(10):
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[0, 0], pixels[0, -1], pixels[-1, 0] = value, 10 + value, 20 + value
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        images.append(stream.getvalue())
    (tmp_path / "set.bin").write_bytes(pickle.dumps((images, [True, False] * 2 + [True])))
    return read_pairs(tmp_path / "set.bin")


def test_embeddings_are_the_sum_over_the_image_and_its_mirror_image(pairs):
    embedder = Corners()
    embeddings = embed_pairs(embedder, pairs, batch=4)
    assert embeddings.dtype == np.float32
    expected = [[value + 10 + value, 1000 * (value + 10 + value), 20 + value] for value in range(10)]
    np.testing.assert_array_equal(embeddings, expected)
    assert embedder.batches == [4, 4, 4, 4, 2, 2]


def test_parts_join_to_the_whole(pairs):
    whole = embed_pairs(Corners(), pairs, batch=64)
    parts = [embed_pairs(Corners(), pairs, 2, part) for part in (range(3), range(3, 3), range(3, 10))]
    assert [len(part) for part in parts] == [3, 0, 7]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_image_of_another_size_is_an_error_where_sizes_are_to_be_exact(pairs):
    embedder = Corners()
    embedder.image_size = 5
    with pytest.raises(UserError, match=r"image 1 of pair 3 is 4 x 4 pixels, not 5 x 5, .* data\.fit=crop"):
        embed_pairs(embedder, pairs, 2, range(4, 6), fit="exact")


def test_a_set_with_genuine_pairs_only(shared_data):
    pairs = read_pairs(shared_data / "formats" / "small_lfw.bin")
    with pytest.raises(UserError, match="all 10 pairs are genuine"):
        verify(np.ones((20, 3)), pairs.same)


def test_scores_are_the_cosines_of_both_kinds_and_stay_out_of_json():
    embeddings, same = random_pairs(30, 11)
    embeddings[0] = 0
    genuine, impostors = (result := verify(embeddings, same)).scores
    expected = []
    for first, second in zip(embeddings[::2], embeddings[1::2], strict=True):
        length = np.sqrt(first @ first) * np.sqrt(second @ second)
        expected.append(first @ second / length if length else 0.0)
    np.testing.assert_allclose(genuine, np.array(expected)[same])
    np.testing.assert_allclose(impostors, np.array(expected)[~same])
    assert "scores" not in result.to_json()
