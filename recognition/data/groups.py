"""The order of a training set in which K images of one identity stand together, for losses on pairs.

A group is K consecutive positions. Identity i has ceil(n_i / K) groups for its n_i images, so that each image is seen.
A round is every group of every identity once, in a keyed permutation of its own; rounds follow one another without
end. Within a round an identity's images stand in a keyed permutation, cut into its groups; the last group is filled up
from the permutation's beginning. So a round shows each image of an identity of K or more once, fewer than K of them
twice, and no image twice in a group; an identity of fewer than K images repeats them as evenly as K allows.

A round has K sum_i ceil(n_i / K) positions, N or more, while `training.epochs` and the schedules count N positions as
an epoch, as they do in the plain order: an epoch may end before the round does. The position alone says where a run is.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recognition.data.order import samples_at
from recognition.randomness import Integers, keyed_hash, permute_by_keys

Order = Callable[[ArrayLike], tuple[Integers, Integers]]
"""From positions [n] to (occasions [n], samples [n]): of one sample, no two positions have the same occasion."""

_GROUPS, _MEMBERS = 3, 4  # keep these keys apart from those of other uses of the same seed
_BLOCK = 1 << 20


def sample_order(labels: Integers, images_per_identity: int, seed: int) -> Order:
    """The order of samples with `labels` [N]. One image per identity is the plain order, whose occasions are epochs."""
    if images_per_identity == 1:
        return partial(samples_at, seed, len(labels))
    return GroupedOrder(labels, images_per_identity, seed).samples_at


class GroupedOrder:
    """Samples of identities `labels` [N] >= 0, N >= 1, in groups of `size`: a pure function of (seed, position).

    Kept are two offsets per identity, of 4 bytes each below 2^32 samples, and, unless the labels ascend, as they do in
    an index of folders, the samples by identity, of 4 bytes each: of 400 million images of 20 million identities
    0.16 GB, and 1.6 GB more where labels do not ascend. Safe to use from several threads.
    """

    def __init__(self, labels: Integers, size: int, seed: int) -> None:
        counts = np.bincount(labels)
        groups = -(-counts // size)
        kind = np.min_scalar_type(len(labels))
        self._size, self._seed = size, seed
        self._first_image, self._first_group = _offsets(counts, kind), _offsets(groups, kind)
        self._by_identity = None if _ascend(labels) else _sort(labels, self._first_image)

    @property
    def length(self) -> int:
        """Positions in a round."""
        return self._size * int(self._first_group[-1])

    def samples_at(self, positions: ArrayLike) -> tuple[Integers, Integers]:
        """Occasions and samples, each [n], at `positions` [n] >= 0; the occasions are the positions themselves."""
        positions = np.atleast_1d(np.asarray(positions, np.int64))
        rounds, places = np.divmod(positions, self.length)
        numbers, members = np.divmod(places, self._size)
        total = self.length // self._size
        groups = permute_by_keys(keyed_hash(self._seed, _GROUPS, rounds), total, numbers)
        # Numbers of another type would have NumPy convert the whole table to search it.
        wanted = groups.astype(self._first_group.dtype)
        identities = np.searchsorted(self._first_group, wanted, side="right") - 1
        first, end = (self._first_image[identities + shift].astype(np.int64) for shift in (0, 1))
        members += (groups - self._first_group[identities].astype(np.int64)) * self._size
        keys = keyed_hash(self._seed, _MEMBERS, rounds, identities)
        samples = first + permute_by_keys(keys, end - first, members % (end - first))
        if self._by_identity is not None:
            samples = self._by_identity[samples].astype(np.int64)
        return positions, samples


def _offsets(counts: Integers, kind: np.dtype) -> NDArray[np.unsignedinteger]:
    """Where each of the parts of `counts` [C] begins, and where the last one ends: [C+1]."""
    offsets = np.zeros(len(counts) + 1, kind)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _ascend(labels: Integers) -> bool:
    blocks = (labels[start : start + _BLOCK + 1] for start in range(0, len(labels), _BLOCK))
    return all(bool(np.all(block[:-1] <= block[1:])) for block in blocks)


def _sort(labels: Integers, first_image: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """The samples by identity [N], each identity's in ascending order: a counting sort, block by block.

    np.argsort would need 8 bytes per sample, and as many again while at work.
    """
    samples, ends = np.empty(len(labels), first_image.dtype), first_image[:-1].astype(np.int64)
    for start in range(0, len(labels), _BLOCK):
        block = labels[start : start + _BLOCK]
        places = np.argsort(block, kind="stable")
        identities, firsts, counts = np.unique(block[places], return_index=True, return_counts=True)
        within = np.arange(len(block)) - np.repeat(firsts, counts)
        samples[np.repeat(ends[identities], counts) + within] = start + places
        ends[identities] += counts
    return samples
