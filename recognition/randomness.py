"""Stateless randomness: hashes and permutations as functions of a key, so that each value is computed on its own.

The order of images, augmentation, sampled classes and initial class weights are keyed by the run's seed in this way; no
generator's state is ever saved.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Odd integer nearest to 2^64 / golden ratio, the increment of SplitMix64."""

MURMUR3_MULTIPLIERS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
"""Multipliers of the 64-bit finaliser of MurmurHash3, fmix64 (Appleby), a bijection of 64-bit words that avalanches:
twice x ^= x >> 33 and x *= multiplier, then x ^= x >> 33."""

_WORD = (1 << 64) - 1
_ROUNDS = 12  # even, as each round swaps rows and columns


def splitmix64(number: int) -> int:
    """Hash a number to 64 bits by one step of SplitMix64 (Steele, Lea and Flood 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _WORD
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _WORD
    return number ^ (number >> 31)


def as_signed(word: int) -> int:
    """Return the int64 number with the bits of a 64-bit word."""
    return (word ^ 1 << 63) - (1 << 63)


def mix(words: Words) -> Words:
    """Apply the output function of SplitMix64, a bijection of 64-bit words that avalanches.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    `words` is an array of any shape but (), for which NumPy would warn of the intended overflow.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keyed_hash(seed: int, *words: ArrayLike) -> Words:
    """Hash `seed` (modulo 2^64) with integers or arrays of integers, which broadcast, to 64-bit words, at least 1-D."""
    state = mix(np.array([seed % 2**64], np.uint64) + GOLDEN)
    for word in words:
        state = mix((state ^ np.atleast_1d(word).astype(np.uint64)) + GOLDEN)
    return state


def permute_by_keys(keys: Words, sizes: ArrayLike, positions: ArrayLike) -> Integers:
    """Map each of `positions` [n] by the random permutation of 0..size-1 that its key selects.

    `keys` and `sizes` have n elements, or one for all positions. The permutation is a Feistel network on the smallest
    near-square grid a x b with at least `size` cells, and cycle walking for the cells beyond `size` (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"). Fewer than a of the a b cells are beyond it, so nearly all positions
    need one pass.
    Raises ValueError for a position outside 0..size-1 or a size outside 1..2^62.
    """
    cells = np.atleast_1d(np.asarray(positions, np.int64)).astype(np.uint64)
    limits = np.atleast_1d(np.asarray(sizes, np.int64))
    if limits.size and not 1 <= limits.min() <= limits.max() <= 2**62:
        raise ValueError(f"a permutation has a size in 1..2^62, not {limits.min()} or {limits.max()}")
    ends = limits.astype(np.uint64)
    if np.any(cells >= ends):  # a negative position wrapped around to a large one
        raise ValueError(f"a position is outside 0..{limits.max() - 1}")
    rows = _root(ends - np.uint64(1)) + np.uint64(1)
    columns = (ends + rows - np.uint64(1)) // rows
    keys, ends, rows, columns = (np.broadcast_to(each, cells.shape) for each in (keys, ends, rows, columns))
    walking = np.arange(cells.size)
    while walking.size:
        cells[walking] = _feistel(cells[walking], keys[walking], rows[walking], columns[walking])
        walking = walking[cells[walking] >= ends[walking]]
    return cells.astype(np.int64)


def _root(squares: Words) -> Words:
    """Return the square roots, rounded down to integers, of numbers up to 2^62."""
    roots = np.sqrt(squares.astype(np.float64)).astype(np.uint64)
    return roots - (roots * roots > squares)  # float64 may round up to a whole number, never down from one


def _feistel(cells: Words, keys: Words, rows: Words, columns: Words) -> Words:
    """Apply the network once: in turn, shift the row by a hash of the column and the column by a hash of the row."""
    moved, fixed = cells // columns, cells % columns
    length, other = rows, columns
    for _ in range(_ROUNDS):
        keys = keys + GOLDEN
        # The upper half of a hash, scaled to 0..length-1 by a multiplication instead of a division.
        moved = moved + ((mix(keys + fixed) >> np.uint64(32)) * length >> np.uint64(32))
        moved = np.where(moved >= length, moved - length, moved)
        moved, fixed, length, other = fixed, moved, other, length
    return moved * columns + fixed
