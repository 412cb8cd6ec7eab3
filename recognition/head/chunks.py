"""The two functions that go over the class weights, in plain PyTorch, a chunk of classes at a time.

`statistics` serves the forward pass and `backward` the backward pass, which computes the logits anew. Logits exist for
one chunk only, so memory does not grow with B x C. In the formulas, B is the gathered batch, n the classes that take
part on this rank, K the rows of a class, D the embedding size, and the product of sample i and class j is

    p_ij = max over k of x_i . w_jk / |w_jk|, or, for the textbook softmax, x_i . w_j + b_j,

from which `negatives` makes the logit z_ij.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.negatives import Linear, Negatives
from recognition.head.rows import Part, RowGradient, Rows

_LARGEST_EXPONENT = 64.0
_LARGEST_BOUND = 120.0
_FEW = 16  # one in so many, up to which single products are cheaper than a matrix product

Sink = Callable[[Part, RowGradient], None]
"""What takes the gradients of some rows."""
Ready = Callable[[Tensor], None]
"""What is told the gradient by the embeddings as soon as it is whole."""


@dataclass(frozen=True)
class Products:
    """How embeddings and rows are multiplied."""

    unit_rows: bool
    """Whether rows count by their direction alone; else they have a bias."""
    dtype: torch.dtype
    """Type of the matrix products' operands; they are summed in float32."""
    chunk: int
    """Classes at a time."""
    workspace: int | None = None
    """Bytes that a chunk of the kernels may take, instead of `chunk`."""
    centers: int = 1
    """K"""
    sharp: float = 0.25
    """Cosines beyond this are computed anew in float32 where a product comes rounded to bfloat16, as on a CPU. Below,
    the rounding is not larger than that of the operands."""


@dataclass(frozen=True)
class Summand:
    """What is summed over the negatives: exp(z), or, of a logistic loss, log(1 + exp(z)) and its derivative."""

    negatives: Negatives
    anchor: Tensor | None
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
class Taking:
    """The classes that take part, and where among them each sample's target is.

    `classes`: their positions [n] on this rank, ascending, or None for all. `columns` [B]: the target's place among
    them, -1 where another rank holds it.
    """

    classes: Tensor | None
    columns: Tensor

    def targets_in(self, start: int, count: int) -> Tensor | None:
        """The targets' places among `count` classes from `start` on [B]; None where the host knows of none there."""
        columns = self.columns - start
        if not columns.is_cuda and not ((columns >= 0) & (columns < count)).any():
            return None
        return columns

    @staticmethod
    def of(labels: Tensor, shard: range, classes: Tensor | None = None) -> "Taking":
        """`labels` [B] against the classes of this rank; `classes` has to contain those that are among them."""
        own = (labels >= shard.start) & (labels < shard.stop)
        local = labels - shard.start
        return Taking(classes, torch.where(own, local if classes is None else torch.searchsorted(classes, local), -1))

    def parts(self, rows: Rows, products: Products) -> Iterator[tuple[int, int, Part]]:
        """A chunk at a time: the place of its first class, how many classes, and which rows."""
        total = len(rows) // products.centers if self.classes is None else len(self.classes)
        for start in range(0, total, products.chunk):
            stop = min(start + products.chunk, total)
            if self.classes is None:
                yield start, stop - start, slice(start * products.centers, stop * products.centers)
            else:
                yield start, stop - start, rows_of(self.classes[start:stop], products.centers)


@dataclass(frozen=True)
class Statistics:
    """This rank's share of what the loss needs.

    `sums` [B, 1] or [B, 2]: over its classes other than the target, of exp(z - shift) or of a logistic loss's two
    summands. `shift` [B]: the fixed offset, or this rank's largest z (-inf without any).
    """

    sums: Tensor
    shift: Tensor
    kept: Tensor | None = None
    """What the kernels keep for `backward`."""


def statistics(rows: Rows, taking: Taking, x: Tensor, products: Products, summand: Summand) -> Statistics:
    """Sum over this rank's classes, each sample's target left out. `x` [B, D] of type `products.dtype`."""
    fixed = summand.logistic or summand.offset is not None
    shift = x.new_full((len(x),), summand.offset or 0.0 if fixed else -torch.inf, dtype=torch.float32)
    sums = x.new_zeros(len(x), 2 if summand.logistic else 1, dtype=torch.float32)
    nothing = torch.full_like(shift, -torch.inf)
    for start, count, part in taking.parts(rows, products):
        columns = taking.targets_in(start, count)
        z = _logits(rows, part, x, products, summand, columns)
        _put(z, columns, nothing)
        if summand.logistic:
            sums[:, 0] += F.softplus(z).sum(1)
            sums[:, 1] += torch.sigmoid(z).sum(1)
            continue
        if not fixed:
            highest = torch.maximum(shift, z.amax(1))
            sums *= rescaling(shift, highest)[:, None]
            shift = highest
        if not fixed or summand.offset:
            z.sub_(finite_shift(shift)[:, None])
        sums[:, 0] += z.exp_().sum(1)
    return Statistics(sums, shift)


def targets(rows: Rows, taking: Taking, x: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """Each sample's product with its own class [B] and their cosine [B], float32; 0 where the class is not here.

    With unit rows and embeddings the two are the same. `x` [B, D] is float32.
    """
    here = taking.columns >= 0
    if len(rows) == 0 or (taking.classes is not None and len(taking.classes) == 0):
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    places = taking.columns.clamp(0)
    if taking.classes is not None:
        places = taking.classes[places]
    part = rows_of(places, products.centers)
    weight = rows.read(part).view(len(x), products.centers, -1)
    dots = torch.einsum("bd,bkd->bk", x, weight)
    cosine = (dots * rows.inverse_norm[part].view_as(dots)).amax(1)
    product = cosine if rows.bias is None else dots[:, 0] + rows.bias[part]
    length = torch.linalg.vector_norm(x, dim=1).clamp(min=1e-12)
    return torch.where(here, product, 0), torch.where(here, cosine / length, 0)


def backward(
    rows: Rows,
    taking: Taking,
    x: Tensor,
    products: Products,
    summand: Summand,
    log_sum: Tensor,
    negatives_gradient: Tensor,
    target: Tensor,
    target_gradient: Tensor,
    sink: Sink | None,
    ready: Ready | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Gradient of the loss by `x` [B, D], float32, of this rank's classes; those of the rows go to `sink`.

    `log_sum` [B]: log of the sum of exp(z) over all ranks' negatives (any finite number where there are none, and for
    a logistic loss); `negatives_gradient` [B]: of the loss by it, or by the sum of log(1 + exp(z));
    `target` [B]: the targets' products, of all ranks; `target_gradient` [B]: of the loss by them; `kept`: of the
    statistics, nothing here.
    """
    gradient = torch.zeros(x.shape, device=x.device)
    linear = isinstance(summand.negatives, Linear)
    if isinstance(summand.negatives, Linear):
        negatives_gradient = negatives_gradient * summand.negatives.scale
    for start, count, part in taking.parts(rows, products):
        columns = taking.targets_in(start, count)
        if sink is None:
            weight, operand = None, rows.operand(part, products.dtype)
        else:
            weight, operand = rows.read_with_operand(part, products.dtype)
        product, nearest = _products(rows, part, operand, x, products, columns), None
        cosine = product
        if products.centers == 1:
            _put(product, columns, target)
        else:
            cosine, nearest = product.view(len(x), count, -1).max(2)
        a = summand.negatives.logits(cosine, summand.anchor)
        if summand.logistic:
            a.sigmoid_()
        else:
            a.sub_(log_sum[:, None]).exp_()
        a.mul_(negatives_gradient[:, None])
        if not linear:
            a.mul_(summand.negatives.slopes(cosine, summand.anchor))
        _put(a, columns, target_gradient)
        if nearest is not None:
            a = a.new_zeros(*a.shape, products.centers).scatter_(2, nearest[..., None], a[..., None]).flatten(1)
        bias = along = None
        if products.unit_rows:
            inverse_norm = rows.inverse_norm[part]
            if sink is not None:
                along = product.mul_(a).sum(0).mul_(inverse_norm.square())
            a *= inverse_norm
        else:
            bias = a.sum(0)
        a = a.to(x.dtype)
        gradient += multiply(a, operand)
        if sink is not None:
            sink(part, RowGradient(a, x, along, bias, weight))
    if ready is not None:
        ready(gradient)
    return gradient


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


def _products(rows: Rows, part: Part, operand: Tensor, x: Tensor, products: Products, columns: Tensor | None) -> Tensor:
    """[B, n K] of some rows, whose `operand` is [n K, D]. With K = 1 those of the targets, `columns` [B], are not
    meant to be used.
    """
    if not products.unit_rows:
        return _unrounded(x, operand.T) + (0 if rows.bias is None else rows.bias[part])
    inverse_norm = rows.inverse_norm[part]
    product = multiply(x, operand.T).mul_(inverse_norm)
    if products.centers == 1:
        # Targets are near their rows, and would be computed anew each time, for nothing.
        _put(product, columns, product.new_zeros(len(x)))
    if x.dtype != torch.float32 and not x.is_cuda and product.numel() and product.amax() > products.sharp:
        sample, row = (product > products.sharp).nonzero(as_tuple=True)
        if len(sample) > product.numel() // _FEW:
            return _unrounded(x, operand.T).mul_(inverse_norm)
        product[sample, row] = (x[sample].float() * operand[row].float()).sum(1).mul_(inverse_norm[row])
    return product


def _logits(rows: Rows, part: Part, x: Tensor, products: Products, summand: Summand, columns: Tensor | None) -> Tensor:
    """z [B, n] of some rows, but for the targets, `columns` [B]."""
    cosine = _products(rows, part, rows.operand(part, products.dtype), x, products, columns)
    if products.centers > 1:
        cosine = cosine.view(len(x), -1, products.centers).amax(2)
    negatives = summand.negatives
    if isinstance(negatives, Linear):
        # The most common case, in place.
        cosine.mul_(negatives.scale)
        return cosine.add_(negatives.bias) if summand.logistic else cosine
    return negatives.logits(cosine, summand.anchor)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product with float32 sums. The result is float32; on a CPU, that of bfloat16 matrices is rounded first."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def _unrounded(a: Tensor, b: Tensor) -> Tensor:
    """Likewise, with a result that is float32 on a CPU, too."""
    return multiply(a, b) if a.is_cuda else a.float() @ b.float()


def _put(matrix: Tensor, columns: Tensor | None, values: Tensor) -> None:
    """matrix[i, columns[i]] = values[i], in place, for those columns that exist."""
    if columns is None:
        return
    here = (columns >= 0) & (columns < matrix.shape[1])
    places = torch.where(here, columns, 0)[:, None]
    matrix.scatter_(1, places, torch.where(here[:, None], values[:, None], matrix.gather(1, places)))
