"""The gradient of the loss by some of a rank's class weights: as two factors, or accumulated over backward passes.

In the formulas, r is the rows of a rank, n some of them, D the embedding size, B the gathered batch. A row w_j enters
the loss through p_ij = x_i . w_j / |w_j|, or, for the textbook softmax, through p_ij = x_i . w_j + b_j. With
g_ij = dL/dp_ij, the normalisation gives

    dp_ij/dw_j = (x_i - p_ij w_j / |w_j|) / |w_j|

    dL/dw_j = sum_i a_ij x_i - radial_j w_j,   a_ij = g_ij / |w_j|,   radial_j = (sum_i a_ij p_ij) / |w_j|.

The second term is the projection of the first one, q_j = sum_i a_ij x_i, onto w_j, since q_j . w_j is
|w_j| sum_i a_ij p_ij: radial_j = q_j . w_j / |w_j|^2. So radial_j can be computed from p or from q, and
dL/dw_j . w_j = 0: the gradient turns a row and keeps its length to first order. Without normalisation, a = g and there
is no second term.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recognition.head.class_weights.shard import RowSelection, WeightShard, assign_rows, select_rows


@dataclass(frozen=True)
class RowGradient:
    """The gradient of the loss by some rows in factors, a^T x - diag(radial) w, formed when it is needed."""

    a: Tensor
    """[B, n]: dL/d(x_i . w_j), in the type of the matrix products, float32 or bfloat16."""
    x: Tensor
    """[B, D]: the embeddings, in the type of `a`."""
    radial: Tensor | None = None
    """[n] float32: coefficients of w; None where rows are not normalised or `inverse_norm` is given instead."""
    bias: Tensor | None = None
    """[n] float32: the gradient by the bias."""
    weight: Tensor | None = None
    """[n, D] float32: the rows as `WeightShard.read` returns them, where they are at hand; the recipient may overwrite
    them."""
    inverse_norm: Tensor | None = None
    """[n] float32: 1 / |w|, given instead of `radial`, which is then computed from a^T x."""

    def dense(self, weight: Tensor) -> Tensor:
        """Return the gradient [n, D], float32, at the rows `weight` [n, D], float32."""
        gradient = self.product().float()
        radial = self._radial(gradient, weight)
        if radial is not None:
            gradient.addcmul_(weight, radial[:, None], value=-1)
        return gradient

    def add_to(self, total: Tensor, weight: Tensor, factor: float = 1.0, decay: float = 0.0) -> None:
        """Set total = factor total + gradient + decay w, in place, at the rows w; both are [n, D], float32."""
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
        """Return a^T x [n, D], summed in float32.

        On a CPU, the result for bfloat16 factors is rounded to bfloat16, a relative error below 0.4 %, which is also
        that of the factors.
        """
        if self.a.is_cuda and self.a.dtype == torch.bfloat16:
            return torch.mm(self.a.T, self.x, out_dtype=torch.float32)
        return self.a.T @ self.x

    def _radial(self, product: Tensor, weight: Tensor) -> Tensor | None:
        """Return the coefficients [n] of w, computed from `product` = a^T x where they are not given."""
        if self.inverse_norm is None:
            return self.radial
        return torch.linalg.vecdot(product, weight).mul_(self.inverse_norm.square())


class AccumulatedGradient:
    """Sum of the rows' gradients over several backward passes, for gradient accumulation.

    `weight` [r, D] and `bias` [r] or None, float32; `touched` [r] bool: the rows that took part in any of the passes.
    """

    def __init__(self, rows: WeightShard) -> None:
        self._rows = rows
        self.weight = torch.zeros(rows.weight.shape, device=rows.weight.device)
        self.bias = None if rows.bias is None else torch.zeros_like(rows.bias)
        self.touched = torch.zeros(len(rows), dtype=torch.bool, device=rows.weight.device)

    def add(self, part: RowSelection, gradient: RowGradient) -> None:
        """Add the gradient by `part` of the rows, which must not have changed since it was computed."""
        total = select_rows(self.weight, part)
        weight = self._rows.read(part) if gradient.weight is None else gradient.weight
        gradient.add_to(total, weight)
        assign_rows(self.weight, part, total)
        if self.bias is not None and gradient.bias is not None:
            assign_rows(self.bias, part, select_rows(self.bias, part) + gradient.bias)
        assign_rows(self.touched, part, torch.ones_like(select_rows(self.touched, part)))

    def clear(self) -> None:
        """Reset the sums to zero."""
        self.weight.zero_()
        if self.bias is not None:
            self.bias.zero_()
        self.touched.zero_()
