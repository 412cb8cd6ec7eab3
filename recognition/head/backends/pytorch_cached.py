"""The passes over the class weights where three of the four matrix products may do.

Where a logit is a cosine times a scale, and bounded, the gradient by x_i . w_j is E_ij = exp(z_ij) / |w_j|, less the
offset in the exponent, times a factor of the sample, which is known once all ranks have summed. So the forward pass
adds up the rows, each times E_ij, which is the gradient by the embeddings but for the factor, and keeps E, which gives
that by the rows. E of what finds no room is computed anew.
"""

import math

import torch
from torch import Tensor

from recognition.head.backends.problem import (
    ActiveClasses,
    CachedExponentials,
    LogitOptions,
    NegativeSums,
    NegativeTerm,
    OnEmbeddings,
    OnRows,
    Places,
    multiply,
    put_at,
    similarities,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import AffineNegatives

_LOG2_E = math.log2(math.e)


def possible(options: LogitOptions, negative_term: NegativeTerm) -> bool:
    """Whether the loss is one of those, and something may be kept."""
    linear = (
        isinstance(negative_term.negatives, AffineNegatives)
        and not negative_term.logistic
        and negative_term.offset is not None
    )
    return linear and options.unit_rows and options.centers == 1 and options.workspace is not None


def negative_sums(
    rows: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions, negative_term: NegativeTerm
) -> NegativeSums:
    """As `chunks.negative_sums`."""
    cached_exp = CachedExponentials(torch.zeros(x.shape, device=x.device), [])
    sums = x.new_zeros(len(x), 1, dtype=torch.float32)
    room = options.workspace or 0
    for start, count, part in active.parts(rows, options):
        operand = rows.operand(part, options.dtype)
        e = _exponentials(rows, part, operand, x, options, negative_term, active.targets_in(start, count), sums)
        multiply(e, operand, cached_exp.pulled)
        room -= e.nbytes
        if room >= 0:
            cached_exp.exponentials.append(e)
        elif not e.is_cuda:
            options.spare.append(e)
    return NegativeSums(sums, torch.full_like(sums[:, 0], negative_term.offset or 0.0), cached_exp)


def backward(
    rows: WeightShard,
    active: ActiveClasses,
    x: Tensor,
    options: LogitOptions,
    negative_term: NegativeTerm,
    cached_exp: CachedExponentials,
    factor: Tensor,
    grad_target: Tensor,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None,
) -> Tensor:
    """As `chunks.backward`. `factor` [B]: what E is to be multiplied by."""
    gradient = cached_exp.pulled * factor[:, None]
    of_target = torch.zeros_like(factor)
    if len(rows) and (active.classes is None or len(active.classes)):
        columns = active.columns.clamp(0)
        own = columns if active.classes is None else active.classes[columns]
        of_target = torch.where(active.columns >= 0, grad_target * rows.inverse_norm[own], 0)
        gradient.addcmul_(rows.read(own), of_target[:, None])
    if on_embeddings is not None:
        on_embeddings(gradient)
    if on_rows is None:
        return gradient
    of_target = torch.where(factor == 0, 0, of_target / factor).to(x.dtype)
    weighted = (x * factor[:, None]).to(x.dtype)
    exponentials = cached_exp.exponentials[::-1]
    cached_exp.exponentials.clear()
    for start, count, part in active.parts(rows, options):
        places, weight = active.targets_in(start, count), None
        if exponentials:
            e = exponentials.pop()
        else:
            weight, operand = rows.read_with_operand(part, options.dtype)
            e = _exponentials(rows, part, operand, x, options, negative_term, places)
        put_at(e, places, of_target)
        on_rows(part, RowGradient(e, weighted, weight=weight, inverse_norm=rows.inverse_norm[part]))
        if not e.is_cuda:
            options.spare.append(e)
    return gradient


def _exponentials(
    rows: WeightShard,
    part: RowSelection,
    operand: Tensor,
    x: Tensor,
    options: LogitOptions,
    negative_term: NegativeTerm,
    places: Places | None,
    sums: Tensor | None = None,
) -> Tensor:
    """E [B, n] of some rows, 0 for the targets, of type `options.dtype`; sums of exp(z) are added to `sums` [B, 1]."""
    assert isinstance(negative_term.negatives, AffineNegatives)
    z = similarities(rows, part, operand, x, options, places)
    # 2^(z log2 e), which is as exact, and takes a third of the time that torch's exp takes.
    z.mul_(negative_term.negatives.scale * _LOG2_E)
    if negative_term.offset:
        z.sub_(negative_term.offset * _LOG2_E)
    z.exp2_()
    put_at(z, places, 0.0)
    if sums is not None:
        sums += z.sum(1, keepdim=True)
    # Where a former step had as much.
    spare = options.spare.pop() if options.spare else z.new_empty(0, dtype=x.dtype)
    e = spare.view(-1)[: z.numel()].view_as(z) if spare.numel() >= z.numel() else torch.empty_like(z, dtype=x.dtype)
    return torch.mul(z, rows.inverse_norm[part], out=e)
