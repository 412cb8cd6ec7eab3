"""The two functions that go over the class weights, in plain PyTorch, a chunk of classes at a time.

`statistics` serves the forward pass and `backward` the backward pass, which computes the logits anew. Logits exist for
one chunk only, so memory does not grow with B x C. In the formulas, B is the gathered batch, n the rows that take part
on this rank, D the embedding size, and

    z_ij = s x_i . w_j / |w_j|     with unit-length x_i, or, for the textbook softmax,
    z_ij = x_i . w_j + b_j.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recognition.head.row_optimizer import Part, Rows

_LARGEST_EXPONENT = 60.0

Sink = Callable[[Part, Tensor, Tensor | None], None]
"""What takes the gradients of some rows: (part, gradient [n, D], bias gradient [n] or None)"""


@dataclass(frozen=True)
class Logits:
    """How logits come from embeddings and rows."""

    scale: float | None
    """s; None is the textbook softmax, whose logits have no bound."""
    dtype: torch.dtype
    """Type of the matrix products' operands; they are summed in float32."""
    chunk: int
    """Rows at a time."""

    @property
    def offset(self) -> float:
        """What is subtracted from bounded logits so that exp of 1e8 of them still sums up in float32."""
        return max((self.scale or 0) - _LARGEST_EXPONENT, 0.0)


@dataclass(frozen=True)
class Taking:
    """The rows that take part, and where among them each sample's target is.

    `rows`: their positions [n] on this rank, ascending, or None for all. `columns` [B]: the target's place among
    them, -1 where another rank holds it.
    """

    rows: Tensor | None
    columns: Tensor

    @staticmethod
    def of(labels: Tensor, shard: range, rows: Tensor | None = None) -> "Taking":
        """`labels` [B] against the classes of this rank; `rows` has to contain those that are among them."""
        own = (labels >= shard.start) & (labels < shard.stop)
        local = labels - shard.start
        return Taking(rows, torch.where(own, local if rows is None else torch.searchsorted(rows, local), -1))

    def count(self, rows: Rows) -> int:
        """How many rows take part, n."""
        return len(rows.weight) if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class Statistics:
    """This rank's share of what the loss needs.

    `negatives` [B]: sum over its classes other than the target of exp(z - shift). `shift` [B]: the fixed offset, or
    this rank's largest negative logit (-inf without any) where logits have no bound. `inverse_norms` [n]: 1 / |w|,
    where rows are normalised.
    """

    negatives: Tensor
    shift: Tensor
    inverse_norms: Tensor


def statistics(rows: Rows, taking: Taking, x: Tensor, logits: Logits) -> Statistics:
    """Sum exp(z) over this rank's classes, each sample's target left out. `x` [B, D] of type `logits.dtype`."""
    bounded = logits.scale is not None
    shift = x.new_full((len(x),), logits.offset if bounded else -torch.inf, dtype=torch.float32)
    negatives = torch.zeros_like(shift)
    inverse_norms = x.new_empty(taking.count(rows) if bounded else 0, dtype=torch.float32)
    for start, part in _parts(rows, taking, logits.chunk):
        weight = rows.weight[part]
        z = _product(x, weight.to(x.dtype).T)
        if logits.scale is not None:
            inverse_norm = _inverse_norm(weight)
            inverse_norms[start : start + len(weight)] = inverse_norm
            z *= logits.scale * inverse_norm
        if rows.bias is not None:
            z += rows.bias[part]
        _put(z, taking.columns - start, torch.full_like(shift, -torch.inf))
        if not bounded:
            highest = torch.maximum(shift, z.amax(1))
            negatives *= rescaling(shift, highest)
            shift = highest
        negatives += z.sub_(finite_shift(shift)[:, None]).exp_().sum(1)
    return Statistics(negatives, shift, inverse_norms)


def targets(rows: Rows, taking: Taking, x: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """Each sample's target logit before scale and margin [B] and its cosine [B], float32; 0 where it is not here.

    Of bounded logits the two are the same. `x` [B, D] is float32.
    """
    if taking.count(rows) == 0:
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    here = taking.columns >= 0
    places = taking.columns.clamp(0)
    if taking.rows is not None:
        places = taking.rows[places]
    weight = rows.weight[places]
    dots = (x * weight).sum(1)
    cosine = dots * _inverse_norm(weight)
    if rows.bias is None:
        cosine = torch.where(here, cosine, 0)
        return cosine, cosine
    return torch.where(here, dots + rows.bias[places], 0), torch.where(here, cosine * _inverse_norm(x), 0)


def backward(
    rows: Rows,
    taking: Taking,
    x: Tensor,
    logits: Logits,
    inverse_norms: Tensor,
    log_sum: Tensor,
    negatives_gradient: Tensor,
    target_gradient: Tensor,
    sink: Sink | None,
) -> Tensor:
    """Gradient of the loss by `x` [B, D], float32, of this rank's classes; those of the rows go to `sink`.

    `log_sum` [B]: log of the sum of exp(z) over all ranks' negatives (any finite number where there are none);
    `negatives_gradient` [B]: of the loss by it; `target_gradient` [B]: by the target's logit before scale and margin.
    With a_ij = dL/d(x_i . w_j), the gradient by w_j is the sum of a_ij x_i, less its part along w_j where w_j is
    normalised.
    """
    gradient = torch.zeros(x.shape, device=x.device)
    for start, part in _parts(rows, taking, logits.chunk):
        weight = rows.weight[part]
        product_weight = weight.to(x.dtype)
        factor = at_target = inverse_norm = weight.new_ones(())
        products = _product(x, product_weight.T)
        columns = taking.columns - start
        if logits.scale is not None:
            inverse_norm = inverse_norms[start : start + len(weight)]
            factor, at_target = logits.scale * inverse_norm, inverse_norm[columns.clamp(0, len(weight) - 1)]
        a = products * factor
        if rows.bias is not None:
            a += rows.bias[part]
        a.sub_(log_sum[:, None]).exp_().mul_(negatives_gradient[:, None]).mul_(factor)
        _put(a, columns, target_gradient * at_target)
        product_a = a.to(x.dtype)
        gradient += _product(product_a, product_weight)
        if sink is None:
            continue
        weight_gradient = _product(product_a.T, x)
        if logits.scale is not None:
            along = products.mul_(a).sum(0) * inverse_norm.square()
            weight_gradient.addcmul_(weight, along[:, None], value=-1)
        sink(part, weight_gradient, None if rows.bias is None else a.sum(0))
    return gradient


def finite_shift(shift: Tensor) -> Tensor:
    """`shift`, with 0 for the -inf of no logits at all."""
    return torch.where(shift == -torch.inf, 0, shift)


def rescaling(shift: Tensor, other: Tensor) -> Tensor:
    """What a sum of exp(z - shift) is to be multiplied by to be one of exp(z - other)."""
    return torch.exp(shift - finite_shift(other))


def _parts(rows: Rows, taking: Taking, chunk: int) -> Iterator[tuple[int, Part]]:
    """The rows that take part, `chunk` at a time: the place of the first among them, and which they are."""
    total = taking.count(rows)
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        yield start, slice(start, stop) if taking.rows is None else taking.rows[start:stop]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with float32 sums and result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # On a CPU the product of bfloat16 matrices is rounded to bfloat16, which at |z| = 64 is an error of 0.125.
    return a.float() @ b.float()


def _inverse_norm(x: Tensor) -> Tensor:
    return 1 / torch.linalg.vector_norm(x, dim=1).clamp(min=1e-12)


def _put(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """matrix[i, columns[i]] = values[i], in place, for those columns that exist."""
    here = (columns >= 0) & (columns < matrix.shape[1])
    places = torch.where(here, columns, 0)[:, None]
    matrix.scatter_(1, places, torch.where(here[:, None], values[:, None], matrix.gather(1, places)))
