"""A rank's share of the class weights and the formats in which they are stored.

In the formulas, r is the number of rows of a rank (one per class, or K per class with K sub-centres), n that of the
rows selected, D the embedding size. A row w has D float32 numbers, stored in one of three formats:

    float32     the numbers themselves
    split       the same numbers, exactly, as two halves of 16 bits; products in bfloat16 read the upper one as it is
    bfloat16    the upper half alone, in half the memory; updates are rounded at random (`stochastic_rounding`)
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from recognition.head.class_weights.stochastic_rounding import Noise, RoundingKey
from recognition.randomness import splitmix64

RowFormat = Literal["float32", "split", "bfloat16"]
"""Storage format of rows and moments."""
RowSelection = slice | Tensor
"""Some of a rank's rows: a contiguous range, or their positions [n], int64, without repeats."""

_BLOCK = 1024
_STANDARD_DEVIATION = 0.01
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class WeightShard:
    """A rank's class weights with their inverse norms, bias and optimizer moments."""

    weight: Tensor
    """[r, D]: float32, or bfloat16 in the formats `split` (the bfloat16 number nearest to w) and `bfloat16`."""
    inverse_norm: Tensor
    """[r] float32: 1 / max(|w|, 1e-12) of the rows as stored; every `write` updates it."""
    low: Tensor | None = None
    """[r, D] int16, in the format `split` alone: the bits of w minus those of `weight`, as integers."""
    bias: Tensor | None = None
    """[r] float32, for the textbook softmax alone."""
    first: int = 0
    """Number of the first row, counted over all ranks."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """Moments and counters [r, ...] by name, as `RowOptimizer.moments` makes them."""

    @staticmethod
    def initial(
        rows: range,
        embedding_size: int,
        *,
        bias: bool,
        seed: int,
        device: torch.device,
        row_format: RowFormat = "float32",
    ) -> "WeightShard":
        """Draw the rows numbered `rows` over all ranks, elements with mean 0 and standard deviation 0.01; bias zero.

        Each block of rows has a generator of its own, so the values do not depend on the number of ranks.
        """
        weight = torch.empty(len(rows), embedding_size, device=device, dtype=_weight_type(row_format))
        built = WeightShard(
            weight,
            torch.empty(len(rows), device=device),
            torch.empty_like(weight, dtype=torch.int16) if row_format == "split" else None,
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
    def row_format(self) -> RowFormat:
        """Storage format of the rows."""
        if self.low is not None:
            return "split"
        return "float32" if self.weight.dtype == torch.float32 else "bfloat16"

    def read(self, part: RowSelection) -> Tensor:
        """Return w [n, D], float32: a view of the storage in the format `float32` for a slice, else a copy."""
        return self._to_float32(select_rows(self.weight, part), part)

    def operand(self, part: RowSelection, dtype: torch.dtype) -> Tensor:
        """Return w [n, D] as `dtype`, an operand of a matrix product that must not be changed.

        A view where `weight` has that type and `part` is a slice, else a copy.
        """
        if self.low is None or dtype == self.weight.dtype:
            return select_rows(self.weight, part).to(dtype)
        return self.read(part).to(dtype)

    def read_with_operand(self, part: RowSelection, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the results of `read` and `operand`, which may be one tensor, in one pass over the storage."""
        stored = select_rows(self.weight, part)
        values = self._to_float32(stored, part)
        return values, (stored if dtype == stored.dtype else values).to(dtype)

    def write(self, part: RowSelection, values: Tensor, noise: Noise | None, skip: Tensor | None = None) -> None:
        """Store `values` [n, D], float32 (also the view that `read` returned), and their inverse norms.

        `noise`: rounding of the format `bfloat16`, None for the nearest number; other formats do not round. `skip`:
        boolean scalar on the device; where it is true, `values` have to be the present rows, and nothing changes.
        """
        if self.low is not None:
            bits = values.view(torch.int32)
            # The lower half is signed, so the upper one is rounded to the nearest; the bit that is set breaks ties
            # upwards, to where the lower half's range ends. (It makes a NaN of infinity, in a run that is lost anyway.)
            assign_rows(self.low, part, bits)
            assign_rows(self.weight, part, bits.bitwise_or(1).view(torch.float32))
        else:
            values = assign_rounded(self.weight, part, values, noise)
        norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float32)
        inverse = norms.clamp_(min=_SMALLEST_NORM).reciprocal_()
        if skip is not None:
            inverse = torch.where(skip, select_rows(self.inverse_norm, part), inverse)
        assign_rows(self.inverse_norm, part, inverse)

    def load(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Set the rows to `weight` [r, D], rounded to nearest in the format `bfloat16`, and `bias` [r]."""
        for start in range(0, len(self), _BLOCK):
            part = slice(start, start + _BLOCK)
            self.write(part, weight[part].to(self.weight.device, torch.float32), None)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint saves: tensors [r, ...] by name, which share storage with the rows."""
        named = {"weight": self.weight, "low": self.low, "inverse_norm": self.inverse_norm, "bias": self.bias}
        return {name: tensor for name, tensor in (named | self.moments).items() if tensor is not None}

    def _to_float32(self, upper: Tensor, part: RowSelection) -> Tensor:
        """Return w [n, D], float32, given `part` of `weight`."""
        values = upper.float()
        if self.low is not None:
            values.view(torch.int32).add_(select_rows(self.low, part))
        return values

    def positions(self, part: RowSelection) -> Tensor:
        """Return the positions [n], int64, of the rows selected."""
        if isinstance(part, Tensor):
            return part
        return torch.arange(*part.indices(len(self)), device=self.weight.device)

    def noise(self, part: RowSelection, key: RoundingKey) -> Noise | None:
        """Draw the random bits that round `part`; None in a format that does not round at random."""
        if self.row_format != "bfloat16":
            return None
        return Noise.of(self.positions(part) + self.first, self.weight.shape[1], key)


def select_rows(storage: Tensor, part: RowSelection) -> Tensor:
    """Return some rows [n, ...] of `storage` [r, ...]: a view for a slice, else a copy."""
    # Several times as fast as `storage[part]` on a CPU.
    return storage.index_select(0, part) if isinstance(part, Tensor) else storage[part]


def assign_rows(storage: Tensor, part: RowSelection, values: Tensor) -> None:
    """Set some rows of `storage` [r, ...] to `values` [n, ...], which may be the view from `select_rows`."""
    if isinstance(part, Tensor):
        values = values.to(storage.dtype)
        if _copies_by_16_bytes(storage) and _copies_by_16_bytes(values):
            storage, values = storage.view(torch.complex128), values.view(torch.complex128)
        storage.index_copy_(0, part, values)
        return
    place = storage[part]
    if place.data_ptr() != values.data_ptr():
        place.copy_(values)


def assign_rounded(storage: Tensor, part: RowSelection, values: Tensor, noise: Noise | None, stream: int = 0) -> Tensor:
    """Set some rows of `storage` [r, D] to `values` [n, D], float32, and return these as stored.

    If `storage` is bfloat16, `noise` rounds at random, as its `stream`, and None rounds to nearest.
    """
    if storage.dtype != torch.float32:
        values = values.to(storage.dtype) if noise is None else noise.round(values, stream)
    assign_rows(storage, part, values)
    return values


def moment_type(row_format: RowFormat) -> torch.dtype:
    """Return the type of the moments [r, D] of rows in this format."""
    return torch.bfloat16 if row_format == "bfloat16" else torch.float32


def _copies_by_16_bytes(matrix: Tensor) -> bool:
    """Return whether rows can be copied as 16-byte numbers: on a CPU, `index_copy_` takes equally long for any type."""
    if matrix.is_cuda or matrix.ndim != 2 or matrix.stride(1) != 1:
        return False
    counts = matrix.shape[1], matrix.stride(0), matrix.storage_offset()
    return all(count * matrix.itemsize % 16 == 0 for count in counts)


def _weight_type(row_format: RowFormat) -> torch.dtype:
    return torch.float32 if row_format == "float32" else torch.bfloat16
