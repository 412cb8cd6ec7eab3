"""What the passes over the class weights are made of: which rows take part, their products, their logits.

In the formulas, B is the gathered batch, n the classes that take part on this rank, K the rows of a class, D the
embedding size, and the product of sample i and class j is

    p_ij = max over k of x_i . w_jk / |w_jk|, or, for the textbook softmax, x_i . w_j + b_j,

from which `negatives` makes the logit z_ij.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import AffineNegatives, Negatives

_LARGEST_EXPONENT = 64.0
_LARGEST_BOUND = 120.0
_FEW = 16  # one in so many, up to which single products are cheaper than a matrix product

OnRows = Callable[[RowSelection, RowGradient], None]
"""What takes the gradients of some rows."""
OnEmbeddings = Callable[[Tensor], None]
"""What is told the gradient by the embeddings as soon as it is whole."""
Places = tuple[Tensor | None, Tensor]
"""Where targets are in a matrix [B, n]: samples [t] and columns [t]; on a GPU, of whose columns the host knows nothing,
None and those of all samples [B], also outside of the matrix."""


@dataclass(frozen=True)
class LogitOptions:
    """How embeddings and rows are multiplied."""

    unit_rows: bool
    """Whether rows count by their direction alone; else they have a bias."""
    dtype: torch.dtype
    """Type of the matrix products' operands; they are summed in float32."""
    chunk: int
    """Classes at a time."""
    workspace: int | None = None
    """Bytes that may be taken for what `backward` needs of the forward pass, and by a chunk of the kernels instead of
    `chunk`; None: nothing is kept."""
    centers: int = 1
    """K"""
    recompute_above: float = 0.25
    """Cosines beyond this are computed anew in float32 where a product comes rounded to bfloat16, as on a CPU. Below,
    the rounding is not larger than that of the operands."""

    @cached_property
    def spare(self) -> list[Tensor]:
        """Memory of a former step, to be kept again: on a CPU, to have it mapped anew takes longer than to fill it."""
        return []


@dataclass(frozen=True)
class NegativeTerm:
    """What is summed over the negatives: exp(z), or, of a logistic loss, log(1 + exp(z)) and its derivative."""

    negatives: Negatives
    hard_boundary: Tensor | None
    """[B], what the negatives are held against."""
    logistic: bool
    bound: float | None
    """Largest possible z."""

    @property
    def offset(self) -> float | None:
        """What is subtracted from z so that exp of 1e8 of them still sums up in float32; None: look for the largest."""
        if self.bound is None or self.bound > _LARGEST_BOUND:
            return None
        return max(self.bound - _LARGEST_EXPONENT, 0.0)


@dataclass(frozen=True)
class ActiveClasses:
    """The classes that take part, and where among them each sample's target is.

    `classes`: their positions [n] on this rank, ascending, or None for all. `columns` [B]: the target's place among
    them, -1 where another rank holds it.
    """

    classes: Tensor | None
    columns: Tensor

    def targets_in(self, start: int, count: int) -> Places | None:
        """The targets' places among `count` classes from `start` on; None where the host knows of none there."""
        if self.columns.is_cuda:
            return None, self.columns - start
        samples, columns, known = self._ascending
        own = slice(bisect_left(known, start), bisect_left(known, start + count))
        return (samples[own], columns[own] - start) if own.start < own.stop else None

    @cached_property
    def _ascending(self) -> tuple[Tensor, Tensor, list[int]]:
        """The samples in the order of their columns, and these, also as the host's."""
        columns, samples = self.columns.sort()
        return samples, columns, columns.tolist()

    @staticmethod
    def of(labels: Tensor, shard: range, classes: Tensor | None = None) -> "ActiveClasses":
        """`labels` [B] against the classes of this rank; `classes` has to contain those that are among them."""
        own = (labels >= shard.start) & (labels < shard.stop)
        local = labels - shard.start
        return ActiveClasses(
            classes, torch.where(own, local if classes is None else torch.searchsorted(classes, local), -1)
        )

    def parts(self, rows: WeightShard, options: LogitOptions) -> Iterator[tuple[int, int, RowSelection]]:
        """A chunk at a time: the place of its first class, how many classes, and which rows."""
        total = len(rows) // options.centers if self.classes is None else len(self.classes)
        for start in range(0, total, options.chunk):
            stop = min(start + options.chunk, total)
            if self.classes is None:
                yield start, stop - start, slice(start * options.centers, stop * options.centers)
            else:
                yield start, stop - start, rows_of(self.classes[start:stop], options.centers)


@dataclass(frozen=True)
class CachedExponentials:
    """What a forward pass of `cached_exp` leaves for the backward pass, of the classes other than the targets."""

    pulled: Tensor
    """[B, D] float32: sum over j of E_ij w_j."""
    exponentials: list[Tensor]
    """E [B, n] of each of the first chunks, as many as there is room for."""


@dataclass(frozen=True)
class NegativeSums:
    """This rank's share of what the loss needs.

    `sums` [B, 1] or [B, 2]: over its classes other than the target, of exp(z - shift) or of a logistic loss's two
    summands. `shift` [B]: the fixed offset, or this rank's largest z (-inf without any).
    """

    sums: Tensor
    shift: Tensor
    cached_exp: CachedExponentials | Tensor | None = None
    """For `backward`; of the kernels, a tensor."""


def rows_of(classes: Tensor, centers: int) -> Tensor:
    """The positions of the rows of `classes` [n]: [n K]."""
    if centers == 1:
        return classes
    return (classes[:, None] * centers + torch.arange(centers, device=classes.device)).flatten()


def finite_shift(shift: Tensor) -> Tensor:
    """`shift`, with 0 for the -inf of no logits at all."""
    return torch.where(shift == -torch.inf, 0, shift)


def rescaling(shift: Tensor, other: Tensor) -> Tensor:
    """What a sum of exp(z - shift) is to be multiplied by to be one of exp(z - other)."""
    return torch.exp(shift - finite_shift(other))


def similarities(
    rows: WeightShard, part: RowSelection, operand: Tensor, x: Tensor, options: LogitOptions, places: Places | None
) -> Tensor:
    """[B, n K] of some rows, whose `operand` is [n K, D]. With K = 1 those of the targets, `places`, are not
    meant to be used.
    """
    if not options.unit_rows:
        return _unrounded(x, operand.T) + (0 if rows.bias is None else rows.bias[part])
    inverse_norm = rows.inverse_norm[part]
    product = multiply(x, operand.T).mul_(inverse_norm)
    if options.centers == 1:
        # Targets are near their rows, and would be computed anew each time, for nothing.
        put_at(product, places, 0.0)
    if x.dtype != torch.float32 and not x.is_cuda and product.numel() and product.amax() > options.recompute_above:
        sample, row = (product > options.recompute_above).nonzero(as_tuple=True)
        if len(sample) > product.numel() // _FEW:
            return _unrounded(x, operand.T).mul_(inverse_norm)
        product[sample, row] = (x[sample].float() * operand[row].float()).sum(1).mul_(inverse_norm[row])
    return product


def logits(
    rows: WeightShard,
    part: RowSelection,
    operand: Tensor,
    x: Tensor,
    options: LogitOptions,
    negative_term: NegativeTerm,
    places: Places | None,
) -> Tensor:
    """z [B, n] of some rows, but for the targets."""
    cosine = similarities(rows, part, operand, x, options, places)
    if options.centers > 1:
        cosine = cosine.view(len(x), -1, options.centers).amax(2)
    negatives = negative_term.negatives
    if isinstance(negatives, AffineNegatives):
        # The most common case, in place.
        cosine.mul_(negatives.scale)
        return cosine.add_(negatives.bias) if negative_term.logistic else cosine
    return negatives.logits(cosine, negative_term.hard_boundary)


def multiply(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """Matrix product with float32 sums, added to `total`, if there is one, in place. The result is float32; on a CPU,
    that of bfloat16 matrices is rounded first.
    """
    if total is not None:
        return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(multiply(a, b))
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def _unrounded(a: Tensor, b: Tensor) -> Tensor:
    """Likewise, with a result that is float32 on a CPU, too."""
    return multiply(a, b) if a.is_cuda else a.float() @ b.float()


def put_at(matrix: Tensor, places: Places | None, values: Tensor | float) -> None:
    """matrix[i, j] = values[i] or the one value, in place, at the places (i, j) that exist. `values` [B]."""
    if places is None:
        return
    samples, columns = places
    if samples is not None:
        matrix[samples, columns] = values[samples] if isinstance(values, Tensor) else values
        return
    here = (columns >= 0) & (columns < matrix.shape[1])
    columns = torch.where(here, columns, 0)[:, None]
    new = values[:, None] if isinstance(values, Tensor) else values
    matrix.scatter_(1, columns, torch.where(here[:, None], new, matrix.gather(1, columns)))
