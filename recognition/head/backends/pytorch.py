"""The two functions that go over the class weights, in plain PyTorch, a chunk of classes at a time.

`statistics` serves the forward pass and `backward` the backward pass, which computes the logits anew; where the loss
allows it, `kept` serves both. Logits exist for one chunk only, so memory does not grow with B x C; what is kept of them
is bounded. The letters in the formulas are those of `products`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends import pytorch_cached as keeping
from recognition.head.backends.problem import (
    Kept,
    Products,
    Ready,
    Sink,
    Statistics,
    Summand,
    Taking,
    finite_shift,
    logits,
    multiply,
    products_of,
    put_at,
    rescaling,
    rows_of,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import Rows
from recognition.head.losses.negatives import Linear


def statistics(rows: Rows, taking: Taking, x: Tensor, products: Products, summand: Summand) -> Statistics:
    """Sum over this rank's classes, each sample's target left out. `x` [B, D] of type `products.dtype`."""
    if keeping.possible(products, summand):
        return keeping.statistics(rows, taking, x, products, summand)
    fixed = summand.logistic or summand.offset is not None
    shift = x.new_full((len(x),), summand.offset or 0.0 if fixed else -torch.inf, dtype=torch.float32)
    sums = x.new_zeros(len(x), 2 if summand.logistic else 1, dtype=torch.float32)
    for start, count, part in taking.parts(rows, products):
        places = taking.targets_in(start, count)
        z = logits(rows, part, rows.operand(part, products.dtype), x, products, summand, places)
        put_at(z, places, -torch.inf)
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
    kept: Kept | None = None,
) -> Tensor:
    """Gradient of the loss by `x` [B, D], float32, of this rank's classes; those of the rows go to `sink`.

    `log_sum` [B]: log of the sum of exp(z) over all ranks' negatives (any finite number where there are none, and for
    a logistic loss); `negatives_gradient` [B]: of the loss by it, or by the sum of log(1 + exp(z));
    `target` [B]: the targets' products, of all ranks; `target_gradient` [B]: of the loss by them; `kept`: of the
    statistics.
    """
    linear = isinstance(summand.negatives, Linear)
    if isinstance(summand.negatives, Linear):
        negatives_gradient = negatives_gradient * summand.negatives.scale
    if kept is not None:
        factor = negatives_gradient * torch.exp((summand.offset or 0.0) - log_sum)
        return keeping.backward(rows, taking, x, products, summand, kept, factor, target_gradient, sink, ready)
    gradient = torch.zeros(x.shape, device=x.device)
    for start, count, part in taking.parts(rows, products):
        places = taking.targets_in(start, count)
        if sink is None:
            weight, operand = None, rows.operand(part, products.dtype)
        else:
            weight, operand = rows.read_with_operand(part, products.dtype)
        product, nearest = products_of(rows, part, operand, x, products, places), None
        cosine = product
        if products.centers == 1:
            put_at(product, places, target)
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
        put_at(a, places, target_gradient)
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
        multiply(a, operand, gradient)
        if sink is not None:
            sink(part, RowGradient(a, x, along, bias, weight))
    if ready is not None:
        ready(gradient)
    return gradient
