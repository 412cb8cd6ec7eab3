import pytest
import torch

from recognition.head.sampling import sample_rows


def sampled(labels: list[int], classes: int, rate: float, step: int = 0, seed: int = 0, world: int = 1) -> set[int]:
    size = -(-classes // world)
    found: list[int] = []
    for start in range(0, size * world, size):
        shard = range(min(start, classes), min(start + size, classes))
        rows = sample_rows(torch.tensor(labels), classes, rate, seed, step, shard).tolist()
        assert rows == sorted(set(rows))
        assert not rows or (rows[0] >= 0 and rows[-1] < len(shard))
        found += [shard.start + row for row in rows]
    return set(found)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 97, 1000, 10007])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.99])
def test_positives_always_and_as_many_as_the_rate_allows(classes: int, rate: float) -> None:
    labels = [0, classes - 1, classes // 2, classes // 2]
    for step in range(3):
        rows = sampled(labels, classes, rate, step)
        assert set(labels) <= rows
        assert len(rows) == max(int(rate * classes), len(set(labels)))


def test_more_positives_than_the_rate_allows_and_more_than_classes() -> None:
    assert sampled(list(range(50)), 100, 0.2) == set(range(50))
    assert sampled([1, 1, 1, 0, 2] * 30, 3, 0.5) == {0, 1, 2}


@pytest.mark.parametrize("world", [2, 3, 4, 64])
@pytest.mark.parametrize("classes", [5, 1000, 9973])
def test_the_set_does_not_depend_on_the_number_of_ranks(classes: int, world: int) -> None:
    labels = [0, 3, classes - 1]
    assert sampled(labels, classes, 0.3, world=world) == sampled(labels, classes, 0.3)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled([5], 1000, 0.3)
    monkeypatch.setattr("recognition.head.sampling.BLOCK", 7)
    assert sampled([5], 1000, 0.3) == whole


def test_keyed_by_seed_and_step() -> None:
    draws = {frozenset(sampled([1], 1000, 0.1, step, seed)) for step in range(10) for seed in range(10)}
    assert len(draws) == 100
    assert sampled([1], 1000, 0.1, 7, 3) == sampled([1], 1000, 0.1, 7, 3)


def test_every_class_is_as_likely_and_pairs_are_independent() -> None:
    classes, rate, draws = 100, 0.2, 600
    taken = torch.zeros(draws, classes, dtype=torch.float64)
    for step in range(draws):
        taken[step, sample_rows(torch.tensor([0]), classes, rate, 11, step, range(classes))] = 1
    taken = taken[:, 1:]
    share = 19 / 99
    # Standard deviations: sqrt(p (1 - p) / draws) of a share, about 1 / sqrt(draws) of a correlation.
    assert (taken.mean(0) - share).abs().max() < 4.5 * (share * (1 - share) / draws) ** 0.5
    correlation = torch.corrcoef(taken.T) + 1 / 98
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 * draws**-0.5
    # Chi-square over classes: its mean is 99 - 1, less what sampling without replacement takes away.
    chi_square = ((taken.sum(0) - draws * share) ** 2 / (draws * share * (1 - share))).sum()
    assert 55 < chi_square < 150
