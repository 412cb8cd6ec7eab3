"""Which sample stands at which position: one keyed permutation per epoch, computed where it is asked for.

Nothing is stored and nothing is shuffled: the order of 400 million images takes no memory, any position is found
at once, and a run that resumes needs to know only its step.
"""

import numpy as np
from numpy.typing import ArrayLike

from recognition.randomness import Integers, keyed_hash, permute_by_keys

_ORDER = 1  # keeps these keys apart from those of other uses of the same seed


def permute(seed: int, epoch: ArrayLike, size: int, positions: ArrayLike) -> Integers:
    """Where `positions` [n], each in 0..size-1, stand in the permutation of 0..size-1 keyed by (seed, epoch).

    `epoch` is one number or one per position [n]. Raises ValueError as `permute_by_keys` does.
    """
    return permute_by_keys(keyed_hash(seed, _ORDER, epoch), size, positions)


def samples_at(seed: int, size: int, positions: ArrayLike) -> tuple[Integers, Integers]:
    """Epochs and samples, each [n], at `positions` [n], which run on across the epochs of `size` samples each."""
    positions = np.atleast_1d(np.asarray(positions, np.int64))
    epochs = positions // size
    return epochs, permute(seed, epochs, size, positions % size)


def batch_positions(step: int, batch: int, rank: int, world: int) -> range:
    """This rank's part of the positions [step * batch, (step + 1) * batch) of a step's global batch.

    The parts are as even as they can be, the larger ones first, and in rank order they join to the global batch.
    """
    share, larger = divmod(batch, world)
    start = step * batch + rank * share + min(rank, larger)
    return range(start, start + share + (rank < larger))
