import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from recognition.data import groups
from recognition.data.groups import GroupedOrder, sample_order
from recognition.data.order import samples_at

COUNTS = [7, 1, 12, 4, 3, 30, 2, 5, 4, 1]
SHUFFLED = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
ASCENDING = np.sort(SHUFFLED)


def in_groups(found: GroupedOrder, size: int, rounds: range) -> np.ndarray:
    """Samples of whole rounds, [rounds, groups, size]."""
    positions = np.arange(rounds.start * found.length, rounds.stop * found.length)
    return found.samples_at(positions)[1].reshape(len(rounds), -1, size)


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=12), size=st.integers(2, 9), seed=st.integers(0, 2**64))
@example(counts=COUNTS, size=40, seed=4)
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_round_shows_each_identity_its_groups_and_each_image_as_evenly_as_can_be(
    counts: list[int], size: int, seed: int, shuffled: bool
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels) if shuffled else labels
    found = GroupedOrder(labels, size, seed)
    numbers = [-(-count // size) for count in counts]
    assert found.length == size * sum(numbers)
    for samples in in_groups(found, size, range(2)):
        people = labels[samples]
        assert (people == people[:, :1]).all()
        assert np.bincount(people[:, 0]).tolist() == numbers
        seen = np.bincount(samples.ravel(), minlength=len(labels))
        for person, (count, number) in enumerate(zip(counts, numbers, strict=True)):
            times = seen[labels == person]
            assert times.sum() == number * size
            assert times.max() - times.min() <= 1
            assert times.min() >= 1
            for group in samples[people[:, 0] == person]:
                assert len(set(group.tolist())) == min(count, size)


def test_labels_that_do_not_ascend_change_only_which_samples_an_identity_has() -> None:
    by_identity = np.argsort(SHUFFLED, kind="stable")
    ascending, shuffled = (in_groups(GroupedOrder(labels, 4, 0), 4, range(2)) for labels in (ASCENDING, SHUFFLED))
    assert np.array_equal(by_identity[ascending], shuffled)


@pytest.mark.parametrize("block", [1, 2, 7, 68, 69, 70])
def test_labels_are_sorted_block_by_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = in_groups(GroupedOrder(SHUFFLED, 4, 0), 4, range(2))
    monkeypatch.setattr(groups, "_BLOCK", block)
    assert np.array_equal(in_groups(GroupedOrder(SHUFFLED, 4, 0), 4, range(2)), expected)
    # One inversion, wherever it lies between the blocks.
    for place in range(1, 20):
        labels = np.array([0] * place + [1] + [0] * (20 - place) + [1])
        assert (np.diff(labels[in_groups(GroupedOrder(labels, 2, 0), 2, range(1))], axis=-1) == 0).all()


@pytest.mark.parametrize("count", [100, 1000, 70_000])
def test_tables_of_any_width(count: int) -> None:
    """Offsets and samples are kept in as few bytes as they need: 1, 2 and 4 here."""
    labels = np.arange(count) // 10 * 3  # labels without images are no matter
    for each in (labels, labels[::-1]):
        found = GroupedOrder(each, 5, 0)
        samples = in_groups(found, 5, range(1))[0]
        assert np.array_equal(np.sort(samples.ravel()), np.arange(count))
        assert (each[samples] == each[samples][:, :1]).all()


def test_a_position_is_the_same_whenever_it_is_asked_for() -> None:
    found = GroupedOrder(SHUFFLED, 3, seed=9)
    positions = np.arange(4 * found.length)
    _, whole = found.samples_at(positions)
    asked = np.random.default_rng(1).permutation(positions)
    assert np.array_equal(GroupedOrder(SHUFFLED, 3, seed=9).samples_at(asked)[1], whole[asked])
    assert [int(found.samples_at(position)[1][0]) for position in range(50)] == whole[:50].tolist()
    assert found.samples_at([])[1].tolist() == []


def test_one_image_per_identity_is_the_plain_order() -> None:
    positions = np.arange(200)
    for ours, plain in zip(
        sample_order(SHUFFLED, 1, 5)(positions), samples_at(5, len(SHUFFLED), positions), strict=True
    ):
        assert np.array_equal(ours, plain)
    grouped, expected = sample_order(SHUFFLED, 4, 5)(positions), GroupedOrder(SHUFFLED, 4, 5).samples_at(positions)
    assert np.array_equal(grouped, expected)


def test_no_sample_has_an_occasion_twice() -> None:
    for size in (1, 4):
        occasions, samples = sample_order(SHUFFLED, size, 0)(np.arange(1000))
        assert len(set(zip(occasions.tolist(), samples.tolist(), strict=True))) == 1000


def test_the_order_never_changes() -> None:
    """Written down from this code: another order would make runs of other versions unrepeatable."""
    assert GroupedOrder(ASCENDING, 4, 3).samples_at(np.arange(100, 112))[1].tolist() == SOME_POSITIONS
    labels = np.arange(1_000_000) // 7
    assert GroupedOrder(labels, 2, 0).samples_at([0, 1, 10**12])[1].tolist() == SOME_OF_A_MILLION


SOME_POSITIONS = [54, 50, 40, 37, 47, 55, 35, 31, 62, 61, 60, 59]
SOME_OF_A_MILLION = [11158, 11164, 284404]


def test_groups_stand_anywhere_equally_often() -> None:
    # By a hash in integers: what the statistic comes to is the same everywhere and every time.
    size = 4
    found = GroupedOrder(ASCENDING, size, 1)
    orders = in_groups(found, size, range(4000))
    people = ASCENDING[orders[:, :, 0]]
    numbers = np.array([-(-count // size) for count in COUNTS])
    for place in (0, 1, people.shape[1] - 1):
        counted = np.bincount(people[:, place], minlength=len(COUNTS))
        assert chisquare(counted, numbers / numbers.sum() * len(people)).pvalue > 1e-4


def test_an_identitys_images_fall_into_groups_at_random() -> None:
    """Five images by twos: any pair as likely to stand together, any image to be shown twice."""
    found = GroupedOrder(np.repeat([0, 1], 5), 2, 2)
    rounds = 4000
    samples = in_groups(found, 2, range(rounds))
    pairs = Counter(tuple(sorted(pair)) for pair in samples.reshape(-1, 2).tolist())
    possible = [pair for first in (0, 5) for pair in itertools.combinations(range(first, first + 5), 2)]
    assert sorted(pairs) == possible
    assert chisquare([pairs[pair] for pair in possible]).pvalue > 1e-4
    seen = np.stack([np.bincount(each.ravel(), minlength=10) for each in samples])
    assert chisquare((seen == 2).sum(0)).pvalue > 1e-4
    # Neither the other identity's choice nor the round before says which image it is.
    twice = np.stack([seen[:, :5].argmax(1), seen[:, 5:].argmax(1)])
    for one, other in [(twice[0], twice[1]), (twice[0, 1:], twice[0, :-1])]:
        table = np.bincount(one * 5 + other, minlength=25).reshape(5, 5)
        assert chi2_contingency(table).pvalue > 1e-4


def test_seeds_give_unrelated_orders() -> None:
    labels = np.arange(5000) // 10
    first, second = (GroupedOrder(labels, 5, seed).samples_at(np.arange(5000))[1] for seed in (0, 1))
    assert (first == second).sum() < 12
    assert (first // 10 == second // 10)[::5].sum() < 12
