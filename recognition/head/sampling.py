"""Partial FC (An et al. 2022, arXiv 2203.15565): which rows take part in a step.

The classes of the batch always do; random others join them up to the rate. They are the first of a keyed permutation
of all classes, so every rank finds its own rows of the same set by itself, however many ranks there are.
"""

import math

import torch
from torch import Tensor

from recognition.randomness import splitmix64

_ROUNDS = 6
BLOCK = 1 << 18
_NEVER = 1 << 62
_MULTIPLIER = 0x2545F4914F6CDD1D


def sample_rows(labels: Tensor, classes: int, rate: float, seed: int, step: int, rows: range) -> Tensor:
    """The classes that take part in `step`, of those in `rows`.

    `labels` [B]: int64, of the whole gathered batch. Returns their positions in `rows`, ascending, int64. Over all
    ranks they are the batch's classes and as many random others as make `int(rate * classes)` in all.
    """
    keys = _round_keys(seed, step)
    wanted = int(rate * classes)
    labels = labels.sort().values
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = labels[1:] != labels[:-1]

    # A rank's place in the permuted order decides. The order is one of `places >= classes` numbers; the few that are
    # no class, and the batch's own classes, are passed over: the threshold moves up by one for each that lies below.
    high, low = _grid(classes)
    padding = torch.arange(classes, high * low, device=labels.device)
    skipped = torch.cat([_places(labels, classes, keys).masked_fill(~first, _NEVER), _places(padding, classes, keys)])
    skipped = skipped.sort().values
    negatives = (wanted - first.sum()).clamp(min=0)
    below = (skipped - torch.arange(len(skipped), device=labels.device) < negatives).sum()
    threshold = negatives + below

    # One place more than there are rows takes the classes that live elsewhere.
    taken = torch.empty(len(rows) + 1, dtype=torch.bool, device=labels.device)
    last = wanted + len(skipped)
    if last < len(rows):
        # The first of the order are fewer than this rank's rows: find which classes they are.
        taken.zero_()
        for start in range(0, last, BLOCK):
            places = torch.arange(start, min(start + BLOCK, last), device=labels.device)
            drawn = _classes(places, classes, keys)
            taken.index_fill_(0, _own(drawn, rows, places < threshold), True)
    else:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            numbers = torch.arange(block.start, block.stop, device=labels.device)
            taken[start : start + len(block)] = _places(numbers, classes, keys) < threshold
    taken.index_fill_(0, _own(labels, rows), True)
    if len(rows) == classes and wanted >= len(labels):
        # All of them are here, and how many there are is known: a GPU's host need not wait to be told.
        return torch.nonzero_static(taken[:-1], size=wanted).squeeze(1)
    return taken[:-1].nonzero().squeeze(1)


def _own(classes: Tensor, rows: range, where: Tensor | None = None) -> Tensor:
    """Positions of `classes` in `rows`; one beyond the last for those that are not there, or where `where` says no."""
    own = (classes >= rows.start) & (classes < rows.stop)
    return torch.where(own if where is None else own & where, classes - rows.start, len(rows))


def _grid(classes: int) -> tuple[int, int]:
    """A rectangle of at least `classes` cells, and fewer than one column more."""
    low = math.isqrt(classes - 1) + 1
    return -(-classes // low), low


def _places(numbers: Tensor, classes: int, keys: list[tuple[int, int]]) -> Tensor:
    """A keyed permutation of the grid's cells: a generalised Feistel network (Black and Rogaway 2002).

    Each half-round adds a hash of one coordinate to the other, modulo its extent, so it can be undone.
    """
    high_size, low_size = _grid(classes)
    high, low = numbers // low_size, numbers % low_size
    for round_, key in enumerate(keys):
        if round_ % 2:
            low = _add_modulo(low, _hash(high, key, low_size), low_size)
        else:
            high = _add_modulo(high, _hash(low, key, high_size), high_size)
    return high * low_size + low


def _classes(places: Tensor, classes: int, keys: list[tuple[int, int]]) -> Tensor:
    """What `_places` maps to these places: the half-rounds are undone, the last one first."""
    high_size, low_size = _grid(classes)
    high, low = places // low_size, places % low_size
    for round_, key in reversed(list(enumerate(keys))):
        if round_ % 2:
            low = _add_modulo(low, low_size - _hash(high, key, low_size), low_size)
        else:
            high = _add_modulo(high, high_size - _hash(low, key, high_size), high_size)
    return high * low_size + low


def _hash(numbers: Tensor, key: tuple[int, int], size: int) -> Tensor:
    """Numbers below 2^31 to numbers in [0, size): multiply and add, fold, multiply, and scale the top bits."""
    mixed = (numbers * key[0]).add_(key[1])
    mixed ^= mixed >> 29
    mixed *= _MULTIPLIER
    mixed = (mixed >> 32) & 0x7FFFFFFF
    return mixed.mul_(size) >> 31


def _add_modulo(numbers: Tensor, addend: Tensor, size: int) -> Tensor:
    addend += numbers
    return addend.sub_((addend >= size) * size)


def _round_keys(seed: int, step: int) -> list[tuple[int, int]]:
    """A multiplier (odd) and an addend for each half-round, 64-bit words read as signed."""
    state = splitmix64(splitmix64(seed) ^ step)
    words = []
    for _ in range(2 * _ROUNDS):
        state = splitmix64(state)
        words.append((state ^ 1 << 63) - (1 << 63))
    return [(multiplier | 1, addend) for multiplier, addend in zip(words[::2], words[1::2], strict=True)]
