"""A rank's rows of the class weights with their optimizer's state, and how a gradient changes them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from recognition.head.sampling import mix

_BLOCK = 1024
_STANDARD_DEVIATION = 0.01

Part = slice | Tensor
"""Some of a rank's rows: a run of them, or their positions [n], int64, each once."""


@dataclass(frozen=True)
class Rows:
    """Rows of the class weights [c, D] and of the bias [c], each with its momentum, float32.

    Only the textbook softmax has a bias.
    """

    weight: Tensor
    momentum: Tensor
    bias: Tensor | None = None
    bias_momentum: Tensor | None = None

    @staticmethod
    def initial(rows: range, embedding_size: int, *, bias: bool, seed: int, device: torch.device) -> "Rows":
        """The class weights' rows `rows` drawn from N(0, 0.01), whichever rank holds them; the rest is zero.

        Blocks of rows have a generator each, so no two classes start alike and the number of ranks does not matter.
        """
        weight = torch.empty(len(rows), embedding_size, device=device)
        generator = torch.Generator(device)
        for block in range(rows.start // _BLOCK, -(-rows.stop // _BLOCK) if rows else 0):
            # The CPU's generator reads 32 bits of its seed: consecutive ones never coincide in them.
            generator.manual_seed((mix(seed) + block) % (1 << 63))
            drawn = torch.empty(_BLOCK, embedding_size, device=device)
            drawn.normal_(std=_STANDARD_DEVIATION, generator=generator)
            first, last = max(rows.start, block * _BLOCK), min(rows.stop, (block + 1) * _BLOCK)
            weight[first - rows.start : last - rows.start] = drawn[first - block * _BLOCK : last - block * _BLOCK]
        vectors = (weight.new_zeros(len(rows)), weight.new_zeros(len(rows))) if bias else (None, None)
        return Rows(weight, torch.zeros_like(weight), *vectors)


@dataclass(frozen=True)
class RowSGD:
    """SGD with momentum on some rows, as `torch.optim.SGD`; rows that are not named are not read either.

    The bias does not decay.
    """

    momentum: float
    weight_decay: float

    def update(
        self, rows: Rows, part: Part, gradient: Tensor, bias_gradient: Tensor | None, lr: float, skip: Tensor
    ) -> None:
        """Update `part` of `rows` in place by `gradient` [n, D] and `bias_gradient` [n].

        `skip`: float32 scalar on the rows' device; where it is 1, nothing changes, and the host need not know.
        """
        self._apply(rows.weight, rows.momentum, part, gradient, self.weight_decay, lr, skip)
        if rows.bias is not None and rows.bias_momentum is not None and bias_gradient is not None:
            self._apply(rows.bias, rows.bias_momentum, part, bias_gradient, 0.0, lr, skip)

    def _apply(
        self, values: Tensor, momenta: Tensor, part: Part, gradient: Tensor, decay: float, lr: float, skip: Tensor
    ) -> None:
        some_values, some_momenta = values[part], momenta[part]
        if not len(some_values):
            return
        sgd(
            [some_values],
            [gradient],
            [some_momenta],
            fused=True,
            found_inf=skip,
            weight_decay=decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if isinstance(part, Tensor):
            values.index_copy_(0, part, some_values)
            momenta.index_copy_(0, part, some_momenta)


class RowGradient:
    """A gradient of all rows, summed over backward passes and applied once: what gradient accumulation needs.

    `weight` [c, D], `bias` [c] or None; `taken` [c]: the rows that took part in any of the passes.
    """

    def __init__(self, rows: Rows) -> None:
        self.weight = torch.zeros_like(rows.weight)
        self.bias = None if rows.bias is None else torch.zeros_like(rows.bias)
        self.taken = torch.zeros(len(rows.weight), dtype=torch.bool, device=rows.weight.device)

    def add(self, part: Part, gradient: Tensor, bias_gradient: Tensor | None) -> None:
        """Add the gradient of `part` of the rows."""
        self.weight[part] += gradient
        if self.bias is not None and bias_gradient is not None:
            self.bias[part] += bias_gradient
        self.taken[part] = True

    def clear(self) -> None:
        """Start anew."""
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()
        self.taken.zero_()
