"""The gradient of the loss by some of a rank's class weights: not yet formed, or added up over backward passes.

In the formulas, r is the rows of a rank, n some of them, D the embedding size, B the gathered batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recognition.head.class_weights.shard import Part, WeightShard, put, take


@dataclass(frozen=True)
class RowGradient:
    """The gradient of the loss by some rows, not yet formed: a^T x - diag(along) w."""

    a: Tensor
    """[B, n]: of the loss by x_i . w_j, in the type of the matrix products, float32 or bfloat16."""
    x: Tensor
    """[B, D]: the embeddings, likewise."""
    radial: Tensor | None = None
    """[n] float32: sum over i of a_ij cos_ij / |w_j|, the part along w_j; None where rows are not normalised."""
    bias: Tensor | None = None
    """[n] float32: by the bias."""
    weight: Tensor | None = None
    """[n, D] float32: the rows as `WeightShard.read` gives them, where they are at hand; the taker may overwrite
    them."""
    inverse_norm: Tensor | None = None
    """[n] float32: 1 / |w| of these rows, where `radial` is what makes the gradient orthogonal to them and is not
    given.
    """

    def dense(self, weight: Tensor) -> Tensor:
        """The gradient [n, D], float32, at the rows `weight` [n, D], float32."""
        gradient = self.product().float()
        radial = self._radial(gradient, weight)
        if radial is not None:
            gradient.addcmul_(weight, radial[:, None], value=-1)
        return gradient

    def add_to(self, total: Tensor, weight: Tensor, factor: float = 1.0, decay: float = 0.0) -> None:
        """total = factor total + gradient + decay w, in place, at the rows w; both are [n, D], float32."""
        if self.inverse_norm is None and self.a.dtype == torch.float32:
            total.addmm_(self.a.T, self.x, beta=factor)
            radial = self.radial
        else:
            product = self.product().float()
            torch.add(product, total, alpha=factor, out=total)
            radial = self._radial(product, weight)
        if radial is not None:
            total.addcmul_(weight, (decay - radial)[:, None])
        elif decay:
            total.add_(weight, alpha=decay)

    def product(self) -> Tensor:
        """a^T x [n, D], summed in float32. On a CPU the sum of bfloat16 products comes out as bfloat16: a relative
        error below 0.4 %, no more than that of the numbers that are multiplied.
        """
        if self.a.is_cuda and self.a.dtype == torch.bfloat16:
            return torch.mm(self.a.T, self.x, out_dtype=torch.float32)
        return self.a.T @ self.x

    def _radial(self, product: Tensor, weight: Tensor) -> Tensor | None:
        """`radial` [n], from `product` where it is not given."""
        if self.inverse_norm is None:
            return self.radial
        return torch.linalg.vecdot(product, weight).mul_(self.inverse_norm.square())


class AccumulatedGradient:
    """A gradient of all rows, summed over backward passes and applied once: what gradient accumulation needs.

    `weight` [r, D] and `bias` [r] or None, float32; `touched` [r] bool: the rows that took part in any of the passes.
    """

    def __init__(self, rows: WeightShard) -> None:
        self._rows = rows
        self.weight = torch.zeros(rows.weight.shape, device=rows.weight.device)
        self.bias = None if rows.bias is None else torch.zeros_like(rows.bias)
        self.touched = torch.zeros(len(rows), dtype=torch.bool, device=rows.weight.device)

    def add(self, part: Part, gradient: RowGradient) -> None:
        """Add the gradient of `part` of the rows, which are as they were when it was taken."""
        total = take(self.weight, part)
        weight = self._rows.read(part) if gradient.weight is None else gradient.weight
        gradient.add_to(total, weight)
        put(self.weight, part, total)
        if self.bias is not None and gradient.bias is not None:
            put(self.bias, part, take(self.bias, part) + gradient.bias)
        put(self.touched, part, torch.ones_like(take(self.touched, part)))

    def clear(self) -> None:
        """Start anew."""
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()
        self.touched.zero_()
