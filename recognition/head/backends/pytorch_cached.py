"""Passes over the class weights that need three matrix products instead of four, by keeping exponentials.

If a logit is a bounded cosine times a scale, the gradient by x_i . w_j is E_ij = exp(z_ij - offset) / |w_j| times a
factor of sample i, which is known once the sums of all ranks are. The forward pass sums E_ij w_j over j, which is the
gradient by the embeddings up to that factor, and keeps E, from which the backward pass computes the gradient by the
rows. E of chunks for which there is no memory is computed again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recognition.head.backends.problem import (
    Chunk,
    LogitProblem,
    LossGradient,
    NegativeSums,
    OnEmbeddings,
    OnRows,
)
from recognition.head.backends.products import multiply, products, put_at
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.losses.negatives import AffineNegatives

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class CachedExponentials:
    """Result of a forward pass that the backward pass uses, over the classes other than the targets."""

    pulled: Tensor
    """[B, D] float32: sum over j of E_ij w_j."""
    exponentials: list[Tensor]
    """E [B, n] of the first chunks, as many as fit into the memory."""


def possible(problem: LogitProblem) -> bool:
    """Tell whether the logits are bounded cosines times a scale, and exponentials may be kept."""
    options, term = problem.options, problem.term
    linear = isinstance(term.negatives, AffineNegatives) and not term.logistic and term.offset is not None
    return linear and options.unit_rows and options.centers == 1 and options.workspace is not None


def negative_sums(problem: LogitProblem, spare: list[Tensor]) -> NegativeSums:
    """Sum as `PyTorchBackend.negative_sums`, and keep E. `spare`: memory for reuse, to which new buffers are added."""
    x, options = problem.x, problem.options
    cached_exp = CachedExponentials(torch.zeros(x.shape, device=x.device), [])
    sums = x.new_zeros(len(x), 1, dtype=torch.float32)
    room = options.workspace or 0
    for chunk in problem.chunks(options.chunk):
        operand = problem.weights.operand(chunk.rows, options.dtype)
        e = _exponentials(problem, chunk, operand, spare, sums)
        multiply(e, operand, cached_exp.pulled)
        room -= e.nbytes
        if room >= 0:
            cached_exp.exponentials.append(e)
        elif not e.is_cuda:
            spare.append(e)
    return NegativeSums(sums, torch.full_like(sums[:, 0], problem.term.offset or 0.0), cached_exp)


def gradient(
    problem: LogitProblem,
    cached_exp: CachedExponentials,
    loss: LossGradient,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None,
    spare: list[Tensor],
) -> Tensor:
    """Compute `chunk_loop.backward` with E times a factor of each sample as the gradient by the products."""
    weights, active, x, term = problem.weights, problem.active, problem.x, problem.term
    assert isinstance(term.negatives, AffineNegatives)
    factor = loss.grad_lse * term.negatives.scale * torch.exp((term.offset or 0.0) - loss.lse)
    grad_x = cached_exp.pulled * factor[:, None]
    of_target = torch.zeros_like(factor)
    if problem.count:
        columns = active.target_columns.clamp(0)
        own = columns if active.classes is None else active.classes[columns]
        of_target = torch.where(active.target_columns >= 0, loss.grad_target * weights.inverse_norm[own], 0)
        grad_x.addcmul_(weights.read(own), of_target[:, None])
    if on_embeddings is not None:
        on_embeddings(grad_x)
    if on_rows is None:
        return grad_x
    of_target = torch.where(factor == 0, 0, of_target / factor).to(x.dtype)
    weighted = (x * factor[:, None]).to(x.dtype)
    exponentials = cached_exp.exponentials[::-1]
    cached_exp.exponentials.clear()
    for chunk in problem.chunks(problem.options.chunk):
        weight = None
        if exponentials:
            e = exponentials.pop()
        else:
            weight, operand = weights.read_with_operand(chunk.rows, problem.options.dtype)
            e = _exponentials(problem, chunk, operand, spare)
        put_at(e, problem.targets_in(chunk), of_target)
        inverse_norm = weights.inverse_norm[chunk.rows]
        on_rows(chunk.rows, RowGradient(e, weighted, weight=weight, inverse_norm=inverse_norm))
        if not e.is_cuda:
            spare.append(e)
    return grad_x


def _exponentials(
    problem: LogitProblem, chunk: Chunk, operand: Tensor, spare: list[Tensor], sums: Tensor | None = None
) -> Tensor:
    """Return E [B, n] of a chunk, 0 for the targets, of type `options.dtype`; add sums of exp(z) to `sums` [B, 1]."""
    term, places = problem.term, problem.targets_in(chunk)
    assert isinstance(term.negatives, AffineNegatives)
    z = products(problem, chunk.rows, operand, places)
    # 2^(z log2 e), which is as exact, and takes a third of the time that torch's exp takes.
    z.mul_(term.negatives.scale * _LOG2_E)
    if term.offset:
        z.sub_(term.offset * _LOG2_E)
    z.exp2_()
    put_at(z, places, 0.0)
    if sums is not None:
        sums += z.sum(1, keepdim=True)
    # Where a former step had as much.
    former = spare.pop() if spare else z.new_empty(0, dtype=problem.x.dtype)
    fits = former.numel() >= z.numel()
    e = former.view(-1)[: z.numel()].view_as(z) if fits else torch.empty_like(z, dtype=problem.x.dtype)
    return torch.mul(z, problem.weights.inverse_norm[chunk.rows], out=e)
