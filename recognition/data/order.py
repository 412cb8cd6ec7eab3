"""The order of samples: one keyed permutation per epoch, in which each position is computed on its own.

Nothing is shuffled and nothing is stored: the order of 400 million images takes no memory, each position is found in
constant time, and a resumed run needs only its step.
"""

import numpy as np
from numpy.typing import ArrayLike

from recognition.randomness import Integers, keyed_hash, permute_by_keys

_ORDER = 1  # keeps these keys apart from those of other uses of the same seed


def permute(seed: int, epoch: ArrayLike, size: int, positions: ArrayLike) -> Integers:
    """Map `positions` [n] in 0..size-1 through the permutation of 0..size-1 that (seed, epoch) keys; int64 [n].

    `epoch` is one number for all positions, or one for each [n]. Raises ValueError as `permute_by_keys` does.
    """
    return permute_by_keys(keyed_hash(seed, _ORDER, epoch), size, positions)


def samples_at(seed: int, size: int, positions: ArrayLike) -> tuple[Integers, Integers]:
    """Return the epochs and the samples, int64 [n] each, at `positions` [n] of a run: an epoch has `size` positions."""
    positions = np.atleast_1d(np.asarray(positions, np.int64))  # positions: [n]
    epochs = positions // size  # epochs: [n]
    return epochs, permute(seed, epochs, size, positions % size)


def batch_positions(step: int, batch: int, rank: int, world: int) -> range:
    """Return this rank's share of the positions [step * batch, (step + 1) * batch) of a global batch.

    The shares differ by one position at most, the larger ones belong to the first ranks, and in rank order they make
    up the global batch.
    """
    share, larger = divmod(batch, world)
    start = step * batch + rank * share + min(rank, larger)
    return range(start, start + share + (rank < larger))
