"""The two passes over the class weights in plain PyTorch, on any device.

The backward pass computes the logits anew; where the loss allows it, `pytorch_cached` keeps exponentials instead, as
many as there is room for. The symbols are those of `problem`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends import pytorch_cached
from recognition.head.backends.problem import (
    Chunk,
    LogitProblem,
    LossGradient,
    NegativeSums,
    OnEmbeddings,
    OnRows,
    finite_shift,
    rescaling,
)
from recognition.head.backends.products import logits, products, put_at
from recognition.head.backends.pytorch_cached import CachedExponentials
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.losses.negatives import AffineNegatives


class PyTorchBackend:
    """Implementation of `Backend` by tensor operations."""

    updates_weights = False
    hold_back = 0

    def __init__(self) -> None:
        self._spare: list[Tensor] = []
        """Memory of earlier steps for reuse: on a CPU, mapping new memory takes longer than filling it."""

    def negative_sums(self, problem: LogitProblem, *, keep: bool) -> NegativeSums:
        """Sum chunk by chunk, with an online softmax if the logits have no known bound."""
        if keep and pytorch_cached.possible(problem):
            return pytorch_cached.negative_sums(problem, self._spare)
        x, term = problem.x, problem.term
        fixed = term.logistic or term.offset is not None
        shift = x.new_full((len(x),), term.offset or 0.0 if fixed else -torch.inf, dtype=torch.float32)
        sums = x.new_zeros(len(x), 2 if term.logistic else 1, dtype=torch.float32)
        for chunk in problem.chunks(problem.options.chunk):
            places = problem.targets_in(chunk)
            z = logits(problem, chunk.rows, problem.weights.operand(chunk.rows, problem.options.dtype), places)
            put_at(z, places, -torch.inf)
            if term.logistic:
                sums[:, 0] += F.softplus(z).sum(1)
                sums[:, 1] += torch.sigmoid(z).sum(1)
                continue
            if not fixed:
                max_logit = torch.maximum(shift, z.amax(1))
                sums *= rescaling(shift, max_logit)[:, None]
                shift = max_logit
            if not fixed or term.offset:
                z.sub_(finite_shift(shift)[:, None])
            sums[:, 0] += z.exp_().sum(1)
        return NegativeSums(sums, shift)

    def chunk_size(self, problem: LogitProblem) -> int:
        """Return `options.chunk`."""
        return problem.options.chunk

    def chunk_gradient(
        self, problem: LogitProblem, chunk: Chunk, loss: LossGradient, *, rows_wanted: bool
    ) -> tuple[RowGradient, Tensor]:
        """Compute the chunk's logits anew, and their gradient, in the steps of `kernels.logit_gradient_kernel`."""
        weights, options, term = problem.weights, problem.options, problem.term
        part, places = chunk.rows, problem.targets_in(chunk)
        if rows_wanted:
            weight, operand = weights.read_with_operand(part, options.dtype)
        else:
            weight, operand = None, weights.operand(part, options.dtype)
        product, nearest = products(problem, part, operand, places), None
        cosine = product
        if options.centers == 1:
            put_at(product, places, loss.target)
        else:
            cosine, nearest = product.view(len(problem.x), chunk.count, -1).max(2)
        a = term.negatives.logits(cosine, term.hard_boundary)
        if term.logistic:
            a.sigmoid_()
        else:
            a.sub_(loss.lse[:, None]).exp_()
        if isinstance(term.negatives, AffineNegatives):
            a.mul_((loss.grad_lse * term.negatives.scale)[:, None])
        else:
            a.mul_(loss.grad_lse[:, None])
            a.mul_(term.negatives.derivative(cosine, term.hard_boundary))
        put_at(a, places, loss.grad_target)
        if nearest is not None:
            a = a.new_zeros(*a.shape, options.centers).scatter_(2, nearest[..., None], a[..., None]).flatten(1)
        bias = radial = None
        if options.unit_rows:
            inverse_norm = weights.inverse_norm[part]
            if rows_wanted:
                radial = product.mul_(a).sum(0).mul_(inverse_norm.square())
            a *= inverse_norm
        else:
            bias = a.sum(0)
        return RowGradient(a.to(problem.x.dtype), problem.x, radial, bias, weight), operand

    def cached_gradient(
        self,
        problem: LogitProblem,
        cached_exp: CachedExponentials,
        loss: LossGradient,
        on_rows: OnRows | None,
        on_embeddings: OnEmbeddings | None,
    ) -> Tensor:
        """Compute the gradients without the products for the logits and for the gradient by the embeddings."""
        return pytorch_cached.gradient(problem, cached_exp, loss, on_rows, on_embeddings, self._spare)
