"""P x K (PK) sampling: K images of one identity side by side, P = B / K identities in a batch, for losses on pairs.

A group is K consecutive positions that show one identity. Identity i has ceil(n_i / K) groups for its n_i images, so
that each image is seen. A round is every group of every identity once, in a keyed permutation; rounds follow one
another without end. Within a round the images of an identity are permuted, too, and cut into its groups; the last
group is filled up from the beginning of the permutation. Hence a round shows an image of an identity with K images or
more once, fewer than K of them twice, and no image twice in a group; an identity with fewer than K images repeats them
as evenly as K allows.

A round has K sum_i ceil(n_i / K) positions, which is N or more, while `training.epochs` and the schedules count N
positions as an epoch, as without groups: an epoch may end before the round does. The position alone says where a run
is.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recognition.data.order import samples_at
from recognition.randomness import Integers, keyed_hash, permute_by_keys

Order = Callable[[ArrayLike], tuple[Integers, Integers]]
"""Function from positions [n] to (occasions [n], samples [n]). An occasion is unique among the positions of a sample,
which keys its augmentation: the epoch in the plain order, the position in groups."""

_GROUPS, _MEMBERS = 3, 4  # keep these keys apart from those of other uses of the same seed
_BLOCK = 1 << 20


def sample_order(labels: Integers, images_per_identity: int, seed: int) -> Order:
    """Return the order of samples with `labels` [N]; with one image per identity, the plain order of `samples_at`."""
    if images_per_identity == 1:
        return partial(samples_at, seed, len(labels))
    return GroupedOrder(labels, images_per_identity, seed).samples_at


class GroupedOrder:
    """Order of samples with identities `labels` [N] >= 0, N >= 1, in groups of `size`; a function of (seed, position).

    Memory, with fewer than 2^32 samples: 8 bytes per identity, and 4 bytes per sample unless the labels ascend, as they
    do in an index of folders. 400 million images of 20 million identities take 0.16 GB, or 1.76 GB where the labels do
    not ascend. Safe to use from several threads.
    """

    def __init__(self, labels: Integers, size: int, seed: int) -> None:
        counts = np.bincount(labels)  # counts: [C]
        groups = -(-counts // size)  # groups: [C]
        kind = np.min_scalar_type(len(labels))
        self._size, self._seed = size, seed
        self._first_image, self._first_group = _offsets(counts, kind), _offsets(groups, kind)
        self._by_identity = None if _ascend(labels) else _sort(labels, self._first_image)

    @property
    def length(self) -> int:
        """Number of positions in a round."""
        return self._size * int(self._first_group[-1])

    def samples_at(self, positions: ArrayLike) -> tuple[Integers, Integers]:
        """Return occasions and samples, int64 [n] each, at `positions` [n] >= 0; the occasions are the positions."""
        positions = np.atleast_1d(np.asarray(positions, np.int64))  # positions: [n]
        rounds, offsets = np.divmod(positions, self.length)  # rounds, offsets within them: [n]
        slots, members = np.divmod(offsets, self._size)  # slots of a round, members of their groups: [n]
        total = self.length // self._size
        groups = permute_by_keys(keyed_hash(self._seed, _GROUPS, rounds), total, slots)  # groups: [n]
        # Were the type another than the table's, NumPy would convert the whole table in order to search it.
        wanted = groups.astype(self._first_group.dtype)
        identities = np.searchsorted(self._first_group, wanted, side="right") - 1  # identities: [n]
        first, end = (self._first_image[identities + shift].astype(np.int64) for shift in (0, 1))  # first, end: [n]
        # Members of all groups of the identity, counted on; those beyond its images begin again.
        members += (groups - self._first_group[identities].astype(np.int64)) * self._size
        keys = keyed_hash(self._seed, _MEMBERS, rounds, identities)  # keys: [n]
        samples = first + permute_by_keys(keys, end - first, members % (end - first))  # samples: [n]
        if self._by_identity is not None:
            samples = self._by_identity[samples].astype(np.int64)
        return positions, samples


def _offsets(counts: Integers, kind: np.dtype) -> NDArray[np.unsignedinteger]:
    """Return where each part begins, and where the last one ends, [C+1], from the parts' sizes `counts` [C]."""
    offsets = np.zeros(len(counts) + 1, kind)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _ascend(labels: Integers) -> bool:
    """Tell whether `labels` [N] ascend, by blocks, so that no temporary array is as long as they are."""
    blocks = (labels[start : start + _BLOCK + 1] for start in range(0, len(labels), _BLOCK))
    return all(bool(np.all(block[:-1] <= block[1:])) for block in blocks)


def _sort(labels: Integers, first_image: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Return the samples sorted by identity, [N], ascending within each, by a counting sort over blocks.

    np.argsort would take 8 bytes per sample, and as many again while it sorts.
    """
    samples, ends = np.empty(len(labels), first_image.dtype), first_image[:-1].astype(np.int64)
    for start in range(0, len(labels), _BLOCK):
        block = labels[start : start + _BLOCK]  # block: [m]
        by_identity = np.argsort(block, kind="stable")  # by_identity: [m]
        # identities, firsts, counts: [k], the identities in this block
        identities, firsts, counts = np.unique(block[by_identity], return_index=True, return_counts=True)
        within = np.arange(len(block)) - np.repeat(firsts, counts)  # within: [m], place within the identity
        samples[np.repeat(ends[identities], counts) + within] = start + by_identity
        ends[identities] += counts
    return samples
