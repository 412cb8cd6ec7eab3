"""Products of embeddings and class weights in PyTorch: matrix products, cosines, logits, and the targets' products.

The symbols are those of `problem`.
"""

import torch
from torch import Tensor

from recognition.head.backends.problem import ActiveClasses, LogitOptions, LogitProblem, Places, rows_of
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import AffineNegatives

_FEW = 16  # share of a matrix's elements, 1 in this number, up to which dot products are cheaper than a matrix product


def target_products(
    weights: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions
) -> tuple[Tensor, Tensor]:
    """Return each sample's product with its own class [B] and their cosine [B], float32; 0 for other ranks' classes.

    With unit rows and embeddings, product and cosine are equal. `x` [B, D] is float32.
    """
    here = active.target_columns >= 0
    if len(weights) == 0 or (active.classes is not None and len(active.classes) == 0):
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    places = active.target_columns.clamp(0)
    if active.classes is not None:
        places = active.classes[places]
    part = rows_of(places, options.centers)
    weight = weights.read(part).view(len(x), options.centers, -1)
    dots = torch.einsum("bd,bkd->bk", x, weight)
    cosine = (dots * weights.inverse_norm[part].view_as(dots)).amax(1)
    product = cosine if weights.bias is None else dots[:, 0] + weights.bias[part]
    length = torch.linalg.vector_norm(x, dim=1).clamp(min=1e-12)
    return torch.where(here, product, 0), torch.where(here, cosine / length, 0)


def logits(problem: LogitProblem, part: RowSelection, operand: Tensor, places: Places | None) -> Tensor:
    """Return the logits z [B, n] of some rows, invalid at the targets; the arguments are those of `products`."""
    options, term = problem.options, problem.term
    cosine = products(problem, part, operand, places)
    if options.centers > 1:
        cosine = cosine.view(len(problem.x), -1, options.centers).amax(2)
    negatives = term.negatives
    if isinstance(negatives, AffineNegatives):
        # The most common case, in place.
        cosine.mul_(negatives.scale)
        return cosine.add_(negatives.bias) if term.logistic else cosine
    return negatives.logits(cosine, term.hard_boundary)


def products(problem: LogitProblem, part: RowSelection, operand: Tensor, places: Places | None) -> Tensor:
    """Return the products [B, n K] with the rows `part`, whose `operand` is [n K, D].

    With K = 1 those of the targets, `places`, are not meant to be used.
    """
    weights, x, options = problem.weights, problem.x, problem.options
    if not options.unit_rows:
        return _unrounded(x, operand.T) + (0 if weights.bias is None else weights.bias[part])
    inverse_norm = weights.inverse_norm[part]
    product = multiply(x, operand.T).mul_(inverse_norm)
    if options.centers == 1:
        # Targets have large cosines, so they would be computed again each time, although they are not used.
        put_at(product, places, 0.0)
    if x.dtype != torch.float32 and not x.is_cuda and product.numel() and product.amax() > options.recompute_above:
        sample, row = (product > options.recompute_above).nonzero(as_tuple=True)
        if len(sample) > product.numel() // _FEW:
            return _unrounded(x, operand.T).mul_(inverse_norm)
        product[sample, row] = (x[sample].float() * operand[row].float()).sum(1).mul_(inverse_norm[row])
    return product


def multiply(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """Return a matrix product with float32 sums, added to `total`, if there is one, in place.

    The result is float32; on a CPU, that of bfloat16 matrices is rounded first.
    """
    if total is not None:
        return total.addmm_(a, b) if a.dtype == torch.float32 else total.add_(multiply(a, b))
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def put_at(matrix: Tensor, places: Places | None, values: Tensor | float) -> None:
    """Set matrix[i, j] = values[i], `values` [B] or a number, in place at the (i, j) of `places` inside the matrix."""
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


def _unrounded(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product in float32, which is not rounded to bfloat16, not even on a CPU."""
    return multiply(a, b) if a.is_cuda else a.float() @ b.float()
