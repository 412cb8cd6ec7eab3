import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import chisquare

from recognition.data.order import batch_positions, permute, samples_at
from recognition.randomness import GOLDEN, keyed_hash, mix, permute_by_keys

# Samples are drawn by a hash in integers, so that what a statistic comes to is the same everywhere and every time.
EPOCHS = np.arange(100_000)


def test_splitmix64_gives_the_published_sequence() -> None:
    # The first outputs for seed 1234567 of Vigna's reference C code, as listed on Rosetta Code.
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * GOLDEN
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(seed=st.integers(0, 2**71), epoch=st.integers(0, 10**12), size=st.integers(1, 5000))
@example(seed=0, epoch=0, size=1)
@example(seed=0, epoch=1, size=4096)
@example(seed=7, epoch=1, size=99_991)
def test_every_sample_stands_somewhere_once(seed: int, epoch: int, size: int) -> None:
    assert np.array_equal(np.sort(permute(seed, epoch, size, np.arange(size))), np.arange(size))


@pytest.mark.parametrize("size", [400_000_000, 2**40 - 3, 2**40])
def test_large_sizes(size: int) -> None:
    positions = np.concatenate([np.arange(20_000), np.arange(size - 20_000, size)])
    samples = permute(1, 2, size, positions)
    assert len(np.unique(samples)) == len(samples)
    assert samples.min() >= 0
    assert samples.max() < size
    assert chisquare(np.bincount(samples * 100 // size, minlength=100)).pvalue > 1e-4


def test_the_order_never_changes() -> None:
    """Written down from this code: another order would make runs of other versions unrepeatable."""
    assert permute(0, 0, 1000, np.arange(6)).tolist() == FIRST_OF_1000
    assert permute(3, 5, 400_000_000, [0, 399_999_999]).tolist() == ENDS_OF_400_MILLION


FIRST_OF_1000 = [468, 34, 918, 210, 936, 538]
ENDS_OF_400_MILLION = [241648788, 25504504]


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    size = 5000
    orders = [permute(seed, epoch, size, np.arange(size)) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert (first == second).sum() < 10  # two random orders agree in one place on average
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(size)


def test_an_epoch_per_position() -> None:
    positions, epochs = np.arange(300), np.repeat([4, 9, 2], 100)
    expected = np.concatenate([permute(6, epoch, 300, positions[epochs == epoch]) for epoch in (4, 9, 2)])
    assert np.array_equal(permute(6, epochs, 300, positions), expected)


def test_a_size_and_a_key_per_position() -> None:
    sizes = np.repeat([1, 2, 3, 17, 1000, 2**40], [1, 2, 3, 17, 1000, 50])
    positions = np.concatenate([np.arange(count) for count in (1, 2, 3, 17, 1000, 50)])
    keys = keyed_hash(3, sizes)
    permuted = permute_by_keys(keys, sizes, positions)
    for size in np.unique(sizes):
        part = sizes == size
        alone = permute_by_keys(keys[part][:1], size, positions[part])
        assert permuted[part].tolist() == alone.tolist()
        assert len(set(alone.tolist())) == part.sum()
        assert alone.max() < size


def test_the_grid_is_the_smallest_near_square_one(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, int]] = []

    def passing(cells: np.ndarray, keys: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        grids.append((int(rows[0]), int(columns[0])))
        return np.zeros_like(cells)

    monkeypatch.setattr("recognition.randomness._feistel", passing)
    roots = [1, 2, 3, 1000, 2**26 + 1, 2**31 - 1, 2**31]
    sizes = sorted({max(1, min(root**2 + shift, 2**62)) for root in roots for shift in (-1, 0, 1)})
    for size in sizes:
        permute(0, 0, size, [0])
        rows, columns = grids.pop()
        assert rows == math.isqrt(size - 1) + 1
        assert columns == -(-size // rows)


@pytest.mark.parametrize("size", [2, 3, 10, 64, 101, 1000])
def test_a_position_is_anywhere_equally_often(size: int) -> None:
    for position in (0, size - 1):
        samples = permute(11, EPOCHS, size, np.full_like(EPOCHS, position))
        assert chisquare(np.bincount(samples, minlength=size)).pvalue > 1e-4


@pytest.mark.parametrize("size", [3, 10, 64, 101, 1000])
def test_neighbours_are_anywhere_equally_often(size: int) -> None:
    first, second = (permute(12, EPOCHS, size, np.full_like(EPOCHS, position)) for position in (0, 1))
    assert chisquare(np.bincount((second - first) % size, minlength=size)[1:]).pvalue > 1e-4


def test_neighbours_within_an_epoch_are_unrelated() -> None:
    size = 1_000_003
    samples = permute(0, 0, size, np.arange(size))
    for distance in (1, 2, 1000, 1001):  # 1001 is a row of the Feistel grid
        differences = (np.roll(samples, -distance) - samples) % size
        assert chisquare(np.bincount(differences * 200 // size, minlength=200)).pvalue > 1e-4


def test_positions_run_on_across_epochs() -> None:
    size = 37
    epochs, samples = samples_at(5, size, np.arange(3 * size))
    assert np.array_equal(epochs, np.repeat([0, 1, 2], size))
    for epoch in range(3):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(size))
        assert np.array_equal(samples[epochs == epoch], permute(5, epoch, size, np.arange(size)))


@given(batch=st.integers(0, 300), world=st.integers(1, 40), step=st.integers(0, 10**12))
def test_parts_of_the_ranks_join_to_the_global_batch(batch: int, world: int, step: int) -> None:
    parts = [batch_positions(step, batch, rank, world) for rank in range(world)]
    assert [position for part in parts for position in part] == list(range(step * batch, (step + 1) * batch))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


def test_a_position_outside_is_refused() -> None:
    for size, positions in [(10, [10]), (10, [-1]), (0, [0]), (2**62 + 1, [0])]:
        with pytest.raises(ValueError, match=r"0\.\.9|size"):
            permute(0, 0, size, positions)
    assert permute(0, 0, 10, []).tolist() == []
    with pytest.raises(ValueError, match="outside"):
        permute_by_keys(keyed_hash(0, 0), [3, 2], [2, 2])
    with pytest.raises(ValueError, match="not 0 or 3"):
        permute_by_keys(keyed_hash(0, 0), [3, 0], [0, 0])
