"""Stochastic rounding to bfloat16: up or down at random, so that the expected value is the number itself.

bfloat16 is the upper half of float32's 32 bits. Of a number x between two neighbouring bfloat16 numbers, the lower half
over 2^16 is f in [0, 1), its distance from the neighbour towards zero in units of their spacing. Adding a uniform
u in 0 .. 2^16 - 1 to the bits and dropping the lower half carries into the upper half with probability f, so

    E[round(x)] = (1 - f) (neighbour towards zero) + f (neighbour away from zero) = x.

Updates far below the spacing thus accumulate in the mean (Gupta et al. 2015, arXiv:1502.02551). There is no generator
with a state: u is a hash of seed, step, purpose, row and element, equal whichever rank holds the row.

    1. key = fmix64(row + salt), where salt = hash(seed, step, purpose) and fmix64 is the finaliser of MurmurHash3
    2. word_c = key * multiplier_c mod 2^64, then word_c += word_c >> 32, for each group c of four elements
    3. u of element 4 c + k is the k-th 16-bit quarter of word_c

Each tensor of an update has its own stream (0 for the rows, 1 and 2 for their moments), which begins `stream` words
later. `update_kernel` computes the same bits.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from recognition.randomness import MURMUR3_MULTIPLIERS, as_signed, splitmix64

_UPPER_HALF = -1 << 16
_STREAMS = 3


class RoundingKey(NamedTuple):
    """Key of the random bits of one pass over the rows."""

    seed: int
    step: int
    purpose: int
    """Distinguishes passes of the same step."""

    @property
    def salt(self) -> int:
        """Hash of the key, a signed 64-bit number that is added to the rows' numbers."""
        return as_signed(splitmix64(splitmix64(splitmix64(self.seed) ^ self.step) ^ self.purpose))


@dataclass(frozen=True)
class Noise:
    """Random bits that round some rows and their moments."""

    bits: Tensor
    """[n, D and up to three words more], uint16: u of each element, for all streams."""

    @staticmethod
    def of(numbers: Tensor, size: int, key: RoundingKey) -> "Noise":
        """Draw the bits for the rows `numbers` [n], int64, counted over all ranks, of `size` elements each."""
        keys = _fmix64(numbers + key.salt)
        # A product's lower bits are poor; the upper ones, added, make them good.
        words = keys[:, None] * word_multipliers(size, keys.device)
        words += words >> 32
        return Noise(words.view(torch.uint16))

    def round(self, values: Tensor, stream: int) -> Tensor:
        """Round `values` [n, D], float32, to bfloat16 numbers, returned as float32; bfloat16 numbers stay as they are.

        `stream`: 0 for the rows, 1 and 2 for their moments.
        """
        # On the bits of a float, "up" is away from zero, and a carry runs into the exponent as it should.
        bits = self.bits[:, 4 * stream : 4 * stream + values.shape[1]].to(torch.int32)
        return bits.add_(values.view(torch.int32)).bitwise_and_(_UPPER_HALF).view(torch.float32)


@cache
def word_multipliers(size: int, device: torch.device) -> Tensor:
    """Return the multipliers of the words of `size` elements: [size / 4 and some more], odd int64 numbers."""
    count = -(-size // 4) + _STREAMS
    return torch.tensor([as_signed(splitmix64(column) | 1) for column in range(count)], device=device)


def _fmix64(keys: Tensor) -> Tensor:
    """Hash int64 numbers, in place, by MurmurHash3's finaliser."""
    # int64 shifts keep the sign; the mask makes them those of unsigned words.
    for multiplier in MURMUR3_MULTIPLIERS:
        keys ^= (keys >> 33) & 0x7FFFFFFF
        keys *= as_signed(multiplier)
    return keys.bitwise_xor_((keys >> 33) & 0x7FFFFFFF)
