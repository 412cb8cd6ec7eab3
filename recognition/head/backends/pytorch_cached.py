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
    Kept,
    Places,
    Products,
    Ready,
    Sink,
    Statistics,
    Summand,
    Taking,
    multiply,
    products_of,
    put_at,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import Part, Rows
from recognition.head.losses.negatives import Linear

_LOG2_E = math.log2(math.e)


def possible(products: Products, summand: Summand) -> bool:
    """Whether the loss is one of those, and something may be kept."""
    linear = isinstance(summand.negatives, Linear) and not summand.logistic and summand.offset is not None
    return linear and products.unit_rows and products.centers == 1 and products.workspace is not None


def statistics(rows: Rows, taking: Taking, x: Tensor, products: Products, summand: Summand) -> Statistics:
    """As `chunks.statistics`."""
    kept = Kept(torch.zeros(x.shape, device=x.device), [])
    sums = x.new_zeros(len(x), 1, dtype=torch.float32)
    room = products.workspace or 0
    for start, count, part in taking.parts(rows, products):
        operand = rows.operand(part, products.dtype)
        e = _exponentials(rows, part, operand, x, products, summand, taking.targets_in(start, count), sums)
        multiply(e, operand, kept.pulled)
        room -= e.nbytes
        if room >= 0:
            kept.exponentials.append(e)
        elif not e.is_cuda:
            products.spare.append(e)
    return Statistics(sums, torch.full_like(sums[:, 0], summand.offset or 0.0), kept)


def backward(
    rows: Rows,
    taking: Taking,
    x: Tensor,
    products: Products,
    summand: Summand,
    kept: Kept,
    factor: Tensor,
    target_gradient: Tensor,
    sink: Sink | None,
    ready: Ready | None,
) -> Tensor:
    """As `chunks.backward`. `factor` [B]: what E is to be multiplied by."""
    gradient = kept.pulled * factor[:, None]
    of_target = torch.zeros_like(factor)
    if len(rows) and (taking.classes is None or len(taking.classes)):
        columns = taking.columns.clamp(0)
        own = columns if taking.classes is None else taking.classes[columns]
        of_target = torch.where(taking.columns >= 0, target_gradient * rows.inverse_norm[own], 0)
        gradient.addcmul_(rows.read(own), of_target[:, None])
    if ready is not None:
        ready(gradient)
    if sink is None:
        return gradient
    of_target = torch.where(factor == 0, 0, of_target / factor).to(x.dtype)
    weighted = (x * factor[:, None]).to(x.dtype)
    exponentials = kept.exponentials[::-1]
    kept.exponentials.clear()
    for start, count, part in taking.parts(rows, products):
        places, weight = taking.targets_in(start, count), None
        if exponentials:
            e = exponentials.pop()
        else:
            weight, operand = rows.read_with_operand(part, products.dtype)
            e = _exponentials(rows, part, operand, x, products, summand, places)
        put_at(e, places, of_target)
        sink(part, RowGradient(e, weighted, weight=weight, inverse_norm=rows.inverse_norm[part]))
        if not e.is_cuda:
            products.spare.append(e)
    return gradient


def _exponentials(
    rows: Rows,
    part: Part,
    operand: Tensor,
    x: Tensor,
    products: Products,
    summand: Summand,
    places: Places | None,
    sums: Tensor | None = None,
) -> Tensor:
    """E [B, n] of some rows, 0 for the targets, of type `products.dtype`; sums of exp(z) are added to `sums` [B, 1]."""
    assert isinstance(summand.negatives, Linear)
    z = products_of(rows, part, operand, x, products, places)
    # 2^(z log2 e), which is as exact, and takes a third of the time that torch's exp takes.
    z.mul_(summand.negatives.scale * _LOG2_E)
    if summand.offset:
        z.sub_(summand.offset * _LOG2_E)
    z.exp2_()
    put_at(z, places, 0.0)
    if sums is not None:
        sums += z.sum(1, keepdim=True)
    # Where a former step had as much.
    spare = products.spare.pop() if products.spare else z.new_empty(0, dtype=x.dtype)
    e = spare.view(-1)[: z.numel()].view_as(z) if spare.numel() >= z.numel() else torch.empty_like(z, dtype=x.dtype)
    return torch.mul(z, rows.inverse_norm[part], out=e)
