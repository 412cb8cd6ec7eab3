"""The two functions that go over the class weights, in plain PyTorch, a chunk of classes at a time.

`negative_sums` serves the forward pass and `backward` the backward pass, which computes the logits anew; where the loss
allows it, `cached_exp` serves both. Logits exist for one chunk only, so memory does not grow with B x C; what is
kept of them
is bounded. The letters in the formulas are those of `options`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends import pytorch_cached as keeping
from recognition.head.backends.problem import (
    ActiveClasses,
    CachedExponentials,
    LogitOptions,
    NegativeSums,
    NegativeTerm,
    OnEmbeddings,
    OnRows,
    finite_shift,
    logits,
    multiply,
    put_at,
    rescaling,
    rows_of,
    similarities,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import WeightShard
from recognition.head.losses.negatives import AffineNegatives


def negative_sums(
    rows: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions, negative_term: NegativeTerm
) -> NegativeSums:
    """Sum over this rank's classes, each sample's target left out. `x` [B, D] of type `options.dtype`."""
    if keeping.possible(options, negative_term):
        return keeping.negative_sums(rows, active, x, options, negative_term)
    fixed = negative_term.logistic or negative_term.offset is not None
    shift = x.new_full((len(x),), negative_term.offset or 0.0 if fixed else -torch.inf, dtype=torch.float32)
    sums = x.new_zeros(len(x), 2 if negative_term.logistic else 1, dtype=torch.float32)
    for start, count, part in active.parts(rows, options):
        places = active.targets_in(start, count)
        z = logits(rows, part, rows.operand(part, options.dtype), x, options, negative_term, places)
        put_at(z, places, -torch.inf)
        if negative_term.logistic:
            sums[:, 0] += F.softplus(z).sum(1)
            sums[:, 1] += torch.sigmoid(z).sum(1)
            continue
        if not fixed:
            max_logit = torch.maximum(shift, z.amax(1))
            sums *= rescaling(shift, max_logit)[:, None]
            shift = max_logit
        if not fixed or negative_term.offset:
            z.sub_(finite_shift(shift)[:, None])
        sums[:, 0] += z.exp_().sum(1)
    return NegativeSums(sums, shift)


def targets(rows: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions) -> tuple[Tensor, Tensor]:
    """Each sample's product with its own class [B] and their cosine [B], float32; 0 where the class is not here.

    With unit rows and embeddings the two are the same. `x` [B, D] is float32.
    """
    here = active.columns >= 0
    if len(rows) == 0 or (active.classes is not None and len(active.classes) == 0):
        return x.new_zeros(len(x)), x.new_zeros(len(x))
    places = active.columns.clamp(0)
    if active.classes is not None:
        places = active.classes[places]
    part = rows_of(places, options.centers)
    weight = rows.read(part).view(len(x), options.centers, -1)
    dots = torch.einsum("bd,bkd->bk", x, weight)
    cosine = (dots * rows.inverse_norm[part].view_as(dots)).amax(1)
    product = cosine if rows.bias is None else dots[:, 0] + rows.bias[part]
    length = torch.linalg.vector_norm(x, dim=1).clamp(min=1e-12)
    return torch.where(here, product, 0), torch.where(here, cosine / length, 0)


def backward(
    rows: WeightShard,
    active: ActiveClasses,
    x: Tensor,
    options: LogitOptions,
    negative_term: NegativeTerm,
    lse: Tensor,
    grad_lse: Tensor,
    target: Tensor,
    grad_target: Tensor,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None = None,
    cached_exp: CachedExponentials | None = None,
) -> Tensor:
    """Gradient of the loss by `x` [B, D], float32, of this rank's classes; those of the rows go to `on_rows`.

    `lse` [B]: log of the sum of exp(z) over all ranks' negatives (any finite number where there are none, and for
    a logistic loss); `grad_lse` [B]: of the loss by it, or by the sum of log(1 + exp(z));
    `target` [B]: the targets' products, of all ranks; `grad_target` [B]: of the loss by them; `cached_exp`: of the
    statistics.
    """
    linear = isinstance(negative_term.negatives, AffineNegatives)
    if isinstance(negative_term.negatives, AffineNegatives):
        grad_lse = grad_lse * negative_term.negatives.scale
    if cached_exp is not None:
        factor = grad_lse * torch.exp((negative_term.offset or 0.0) - lse)
        return keeping.backward(
            rows, active, x, options, negative_term, cached_exp, factor, grad_target, on_rows, on_embeddings
        )
    gradient = torch.zeros(x.shape, device=x.device)
    for start, count, part in active.parts(rows, options):
        places = active.targets_in(start, count)
        if on_rows is None:
            weight, operand = None, rows.operand(part, options.dtype)
        else:
            weight, operand = rows.read_with_operand(part, options.dtype)
        product, nearest = similarities(rows, part, operand, x, options, places), None
        cosine = product
        if options.centers == 1:
            put_at(product, places, target)
        else:
            cosine, nearest = product.view(len(x), count, -1).max(2)
        a = negative_term.negatives.logits(cosine, negative_term.hard_boundary)
        if negative_term.logistic:
            a.sigmoid_()
        else:
            a.sub_(lse[:, None]).exp_()
        a.mul_(grad_lse[:, None])
        if not linear:
            a.mul_(negative_term.negatives.derivative(cosine, negative_term.hard_boundary))
        put_at(a, places, grad_target)
        if nearest is not None:
            a = a.new_zeros(*a.shape, options.centers).scatter_(2, nearest[..., None], a[..., None]).flatten(1)
        bias = radial = None
        if options.unit_rows:
            inverse_norm = rows.inverse_norm[part]
            if on_rows is not None:
                radial = product.mul_(a).sum(0).mul_(inverse_norm.square())
            a *= inverse_norm
        else:
            bias = a.sum(0)
        a = a.to(x.dtype)
        multiply(a, operand, gradient)
        if on_rows is not None:
            on_rows(part, RowGradient(a, x, radial, bias, weight))
    if on_embeddings is not None:
        on_embeddings(gradient)
    return gradient
