"""A rank's rows of the class weights: how they are kept.

In the formulas, r is the rows of a rank (K for each class that has K sub-centres), n some of them, D the embedding
size, B the gathered batch. Rows are float32 numbers w in one of three formats:

    float32     as they are
    split       exactly the same numbers in two halves; products in bfloat16 read the upper one without a conversion
    bfloat16    the upper half is all there is; an update is rounded at random, so that what is too small to show in
                one step shows in the mean of many (Gupta et al. 2015, arXiv:1502.02551)
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from recognition.randomness import splitmix64

RowFormat = Literal["float32", "split", "bfloat16"]
"""How rows are kept."""
Part = slice | Tensor
"""Some of a rank's rows: a run of them, or their positions [n], int64, each once."""

_BLOCK = 1024
_STANDARD_DEVIATION = 0.01
_SMALLEST_NORM = 1e-12
_UPPER = -1 << 16
_STREAMS = 3


@dataclass(frozen=True)
class Noise:
    """Random bits for rounding some rows: a function of (seed, step, row, element), whichever rank holds the row.

    `bits` [n, D and some more]: uint16.
    """

    bits: Tensor

    @staticmethod
    def of(numbers: Tensor, size: int, seed: int, step: int, purpose: int) -> "Noise":
        """For rows `numbers` [n], int64, their places among all ranks' rows, of `size` elements.

        `purpose` tells roundings of the same step apart.
        """
        keys = numbers + salt(seed, step, purpose)
        # The finaliser of MurmurHash3 (Appleby): neighbouring rows and steps share nothing.
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            keys ^= (keys >> 33) & 0x7FFFFFFF
            keys *= _signed(multiplier)
        keys ^= (keys >> 33) & 0x7FFFFFFF
        # Four elements to a word. A product's lower bits are poor; the upper ones, added, make them good.
        words = keys[:, None] * multipliers(size, keys.device)
        words += words >> 32
        return Noise(words.view(torch.uint16))

    def round(self, values: Tensor, stream: int) -> Tensor:
        """`values` [n, D] float32, each rounded up or down to a bfloat16 number, which is its mean; as float32.

        `stream` tells the tensors of an update apart. What is a bfloat16 number stays as it is.
        """
        # On the bits of a float, "up" is away from zero, and a carry runs into the exponent as it should.
        bits = self.bits[:, 4 * stream : 4 * stream + values.shape[1]].to(torch.int32)
        return bits.add_(values.view(torch.int32)).bitwise_and_(_UPPER).view(torch.float32)


@dataclass(frozen=True)
class WeightShard:
    """A rank's rows, with what the optimizer keeps of each. Every `write` keeps `inverse_norm` in step with the rows.

    `moments`: the row optimizer's tensors [r, ...] by name, which `RowOptimizer.moments` makes.
    """

    weight: Tensor
    """[r, D]: float32; bfloat16 where the format is `split`, the nearest to w, or `bfloat16`."""
    inverse_norm: Tensor
    """[r] float32: 1 / |w| of the rows as they are kept, |w| at least 1e-12."""
    low: Tensor | None = None
    """[r, D] int16, `split` alone: the bits of w, less those of the upper half."""
    bias: Tensor | None = None
    """[r] float32; only the textbook softmax has one."""
    first: int = 0
    """The place of the first row among all ranks' rows."""
    moments: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def initial(
        rows: range, embedding_size: int, *, bias: bool, seed: int, device: torch.device, state: RowFormat = "float32"
    ) -> "WeightShard":
        """The rows `rows`, of all, drawn from N(0, 0.01), whichever rank holds them; the bias is zero.

        Blocks of rows have a generator each, so no two rows start alike and the number of ranks does not matter.
        """
        weight = torch.empty(len(rows), embedding_size, device=device, dtype=_weight_type(state))
        built = WeightShard(
            weight,
            torch.empty(len(rows), device=device),
            torch.empty_like(weight, dtype=torch.int16) if state == "split" else None,
            torch.zeros(len(rows), device=device) if bias else None,
            rows.start,
        )
        generator = torch.Generator(device)
        for block in range(rows.start // _BLOCK, -(-rows.stop // _BLOCK) if rows else 0):
            # The CPU's generator reads 32 bits of its seed: consecutive ones never coincide in them.
            generator.manual_seed((splitmix64(seed) + block) % (1 << 63))
            drawn = torch.empty(_BLOCK, embedding_size, device=device)
            drawn.normal_(std=_STANDARD_DEVIATION, generator=generator)
            begin, end = max(rows.start, block * _BLOCK), min(rows.stop, (block + 1) * _BLOCK)
            part = slice(begin - rows.start, end - rows.start)
            built.write(part, drawn[begin - block * _BLOCK : end - block * _BLOCK], None)
        return built

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def state(self) -> RowFormat:
        """How the rows are kept."""
        if self.low is not None:
            return "split"
        return "float32" if self.weight.dtype == torch.float32 else "bfloat16"

    def read(self, part: Part) -> Tensor:
        """w [n, D], float32. A view of the storage where the format is `float32` and `part` a slice, else a copy."""
        return self._whole(take(self.weight, part), part)

    def operand(self, part: Part, dtype: torch.dtype) -> Tensor:
        """w [n, D] as `dtype`, to be multiplied, not changed; a view where the storage has it and `part` is a slice."""
        if self.low is None or dtype == self.weight.dtype:
            return take(self.weight, part).to(dtype)
        return self.read(part).to(dtype)

    def read_with_operand(self, part: Part, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both `read` and `operand`, which may be one tensor, in one pass over the storage."""
        stored = take(self.weight, part)
        values = self._whole(stored, part)
        return values, (stored if dtype == stored.dtype else values).to(dtype)

    def write(self, part: Part, values: Tensor, noise: Noise | None, skip: Tensor | None = None) -> None:
        """Store `values` [n, D], float32, also the view that `read` gave.

        `noise`: how the format `bfloat16` rounds, None means to the nearest; the others do not round. `skip`: boolean
        scalar on the device; where it is true, `values` are the rows as they are, and nothing changes.
        """
        if self.low is not None:
            bits = values.view(torch.int32)
            # The lower half is signed, so the upper one is rounded to the nearest; the bit that is set breaks ties
            # upwards, to where the lower half's range ends. (It makes a NaN of infinity, in a run that is lost anyway.)
            put(self.low, part, bits)
            put(self.weight, part, bits.bitwise_or(1).view(torch.float32))
        else:
            values = store(self.weight, part, values, noise)
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float32)
        inverse = norms.clamp_(min=_SMALLEST_NORM).reciprocal_()
        if skip is not None:
            inverse = torch.where(skip, take(self.inverse_norm, part), inverse)
        put(self.inverse_norm, part, inverse)

    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the rows to `weight` [r, D], rounded to the nearest, and `bias` [r]; the moments stay."""
        for start in range(0, len(self), _BLOCK):
            part = slice(start, start + _BLOCK)
            self.write(part, weight[part].to(self.weight.device, torch.float32), None)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name, [r, ...] each. They share the rows' storage."""
        named = {"weight": self.weight, "low": self.low, "inverse_norm": self.inverse_norm, "bias": self.bias}
        return {name: tensor for name, tensor in (named | self.moments).items() if tensor is not None}

    def _whole(self, upper: Tensor, part: Part) -> Tensor:
        """w [n, D], float32, of `part` of `weight`."""
        values = upper.float()
        if self.low is not None:
            values.view(torch.int32).add_(take(self.low, part))
        return values

    def positions(self, part: Part) -> Tensor:
        """`part` as positions [n], int64."""
        if isinstance(part, Tensor):
            return part
        return torch.arange(*part.indices(len(self)), device=self.weight.device)

    def noise(self, part: Part, seed: int, step: int, purpose: int) -> Noise | None:
        """What rounds `part` in `step`; None in a format that does not round at random."""
        if self.state != "bfloat16":
            return None
        return Noise.of(self.positions(part) + self.first, self.weight.shape[1], seed, step, purpose)


def take(storage: Tensor, part: Part) -> Tensor:
    """`part` of `storage` [r, ...]: a view where it is a slice, else a copy."""
    # Several times as fast as `storage[part]` on a CPU.
    return storage.index_select(0, part) if isinstance(part, Tensor) else storage[part]


def put(storage: Tensor, part: Part, values: Tensor) -> None:
    """Put `values` [n, ...] in the place of `part` of `storage`, also the view that `take` gave."""
    if isinstance(part, Tensor):
        values = values.to(storage.dtype)
        if _wide(storage) and _wide(values):
            storage, values = storage.view(torch.complex128), values.view(torch.complex128)
        storage.index_copy_(0, part, values)
        return
    place = storage[part]
    if place.data_ptr() != values.data_ptr():
        place.copy_(values)


def store(storage: Tensor, part: Part, values: Tensor, noise: Noise | None, stream: int = 0) -> Tensor:
    """Put `values` [n, D], float32, and return them as they are stored; `noise` rounds where `storage` has to."""
    if storage.dtype != torch.float32:
        values = values.to(storage.dtype) if noise is None else noise.round(values, stream)
    put(storage, part, values)
    return values


def moment_type(state: RowFormat) -> torch.dtype:
    """Type of the moments [r, D] beside rows of this format."""
    return torch.bfloat16 if state == "bfloat16" else torch.float32


def _wide(matrix: Tensor) -> bool:
    """Whether it can be copied 16 bytes at a time: on a CPU, `index_copy_` takes as long for a number of any size."""
    if matrix.is_cuda or matrix.ndim != 2 or matrix.stride(1) != 1:
        return False
    counts = matrix.shape[1], matrix.stride(0), matrix.storage_offset()
    return all(count * matrix.itemsize % 16 == 0 for count in counts)


def _weight_type(state: RowFormat) -> torch.dtype:
    return torch.float32 if state == "float32" else torch.bfloat16


def salt(seed: int, step: int, purpose: int) -> int:
    """What tells the noise of one step from another's, added to the rows' numbers: 64 bits, signed."""
    return _signed(splitmix64(splitmix64(splitmix64(seed) ^ step) ^ purpose))


@cache
def multipliers(size: int, device: torch.device) -> Tensor:
    """Of the noise of rows of `size` elements: [size / 4 and some more] odd int64 numbers, of no pattern."""
    count = -(-size // 4) + _STREAMS
    return torch.tensor([_signed(splitmix64(column) | 1) for column in range(count)], device=device)


def _signed(word: int) -> int:
    """A 64-bit word, read as signed."""
    return (word ^ 1 << 63) - (1 << 63)
