"""Partial FC (An et al. 2022, arXiv:2203.15565): select the classes that are active in a step.

The batch's own classes (positives) are always active; random negatives join them up to the sampling rate. Negatives
are taken in the order of a keyed permutation, so each rank finds its own active classes without communication, and
the set does not depend on the number of ranks.

The permutation orders the cells of a grid, at least as many as there are classes. Cells beyond the last class
(padding) and positives are skipped. For 5 classes on a grid of 6 cells, positive 1, and 3 classes wanted:

    place in the order     0    1         2          3    4    5
    cell                   4    5         1          0    3    2
                           yes  padding   positive   yes  no   no

Two negatives are wanted; two skipped cells lie before the second one. So the threshold is 2 + 2: negatives are the
classes with a place below 4, which is 4 and 0, and {0, 1, 4} are active.
"""

import math

import torch
from torch import Tensor

from recognition.randomness import as_signed, splitmix64

BLOCK = 1 << 18
"""Classes that go through the permutation at a time."""
_HALF_ROUNDS = 6
_NOWHERE = 1 << 62
"""Place of a repeated label, beyond all others."""
_MULTIPLIER = 0x2545F4914F6CDD1D
"""Multiplier of xorshift64* (Vigna 2016)."""


def sample_rows(labels: Tensor, classes: int, rate: float, seed: int, step: int, rows: range) -> Tensor:
    """Return the active classes of `step` among `rows`, the classes of a rank, as ascending positions in it, int64.

    `labels` [B]: int64, of the whole gathered batch. Over all ranks, the active classes are the batch's and as many
    random others as make `int(rate * classes)` in all.
    """
    keys = _round_keys(seed, step)
    wanted = int(rate * classes)
    labels = labels.sort().values
    first = torch.ones_like(labels, dtype=torch.bool)
    first[1:] = labels[1:] != labels[:-1]

    high, low = _grid(classes)
    padding = torch.arange(classes, high * low, device=labels.device)
    positives = _places(labels, classes, keys).masked_fill(~first, _NOWHERE)
    skipped = torch.cat([positives, _places(padding, classes, keys)]).sort().values
    negatives = (wanted - first.sum()).clamp(min=0)
    # The k-th skipped place has skipped[k] - k places before it that are not: it is below the threshold if all of them
    # are taken, and more are wanted.
    below = (skipped - torch.arange(len(skipped), device=labels.device) < negatives).sum()
    threshold = negatives + below

    # One entry more than there are rows, for the classes of other ranks.
    active = torch.empty(len(rows) + 1, dtype=torch.bool, device=labels.device)
    last = wanted + len(skipped)
    if last < len(rows):
        # Fewer places may be below the threshold than this rank has rows: invert the permutation for these places.
        active.zero_()
        for start in range(0, last, BLOCK):
            places = torch.arange(start, min(start + BLOCK, last), device=labels.device)
            drawn = _classes(places, classes, keys)
            active.index_fill_(0, _own(drawn, rows, places < threshold), True)
    else:
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK]
            numbers = torch.arange(block.start, block.stop, device=labels.device)
            active[start : start + len(block)] = _places(numbers, classes, keys) < threshold
    active.index_fill_(0, _own(labels, rows), True)
    if len(rows) == classes and wanted >= len(labels):
        # All classes are here, so their number is known, and the host need not wait for a GPU to count them.
        return torch.nonzero_static(active[:-1], size=wanted).squeeze(1)
    return active[:-1].nonzero().squeeze(1)


def _own(classes: Tensor, rows: range, where: Tensor | None = None) -> Tensor:
    """Return the positions of `classes` in `rows`; len(rows) for those that are not there or where `where` is false."""
    own = (classes >= rows.start) & (classes < rows.stop)
    return torch.where(own if where is None else own & where, classes - rows.start, len(rows))


def _grid(classes: int) -> tuple[int, int]:
    """Return height and width of a nearly square grid of at least `classes` cells, and fewer than one row more."""
    low = math.isqrt(classes - 1) + 1
    return -(-classes // low), low


def _places(numbers: Tensor, classes: int, keys: list[tuple[int, int]]) -> Tensor:
    """Permute cells of the grid by a keyed generalised Feistel network (Black and Rogaway 2002).

    Each half-round adds a hash of one coordinate to the other, modulo its extent, so it can be inverted.
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
    """Invert `_places`: undo the half-rounds, the last one first."""
    high_size, low_size = _grid(classes)
    high, low = places // low_size, places % low_size
    for round_, key in reversed(list(enumerate(keys))):
        if round_ % 2:
            low = _add_modulo(low, low_size - _hash(high, key, low_size), low_size)
        else:
            high = _add_modulo(high, high_size - _hash(low, key, high_size), high_size)
    return high * low_size + low


def _hash(numbers: Tensor, key: tuple[int, int], size: int) -> Tensor:
    """Hash numbers below 2^31 to [0, size): multiply and add, fold, multiply, and scale the top bits."""
    mixed = (numbers * key[0]).add_(key[1])
    mixed ^= mixed >> 29
    mixed *= _MULTIPLIER
    mixed = (mixed >> 32) & 0x7FFFFFFF
    return mixed.mul_(size) >> 31


def _add_modulo(numbers: Tensor, addend: Tensor, size: int) -> Tensor:
    addend += numbers
    return addend.sub_((addend >= size) * size)


def _round_keys(seed: int, step: int) -> list[tuple[int, int]]:
    """Return an odd multiplier and an addend for each half-round, signed 64-bit numbers."""
    state = splitmix64(splitmix64(seed) ^ step)
    words = []
    for _ in range(2 * _HALF_ROUNDS):
        state = splitmix64(state)
        words.append(as_signed(state))
    return [(multiplier | 1, addend) for multiplier, addend in zip(words[::2], words[1::2], strict=True)]
