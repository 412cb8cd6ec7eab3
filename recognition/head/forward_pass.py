"""The forward pass of the head: sums over the negatives, collectives, and the loss on vectors [B].

With s_i the sum over sample i's negatives, all ranks', and t_i its product with its own class, the loss is

    L = mean over i of loss(s_i, t_i, norm_i),    for a softmax  softplus(log(s_i) - target_logit(t_i)).

Only s and t go over the ranks, in one all-reduce where the negatives do not depend on the targets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recognition import config
from recognition.head.backends.problem import (
    ActiveClasses,
    Backend,
    LogitOptions,
    LogitProblem,
    LossGradient,
    NegativeSums,
    NegativeTerm,
    finite_shift,
    rescaling,
)
from recognition.head.backends.products import target_products
from recognition.head.class_weights.shard import WeightShard
from recognition.head.global_batch import GlobalBatch
from recognition.head.learned_scalars import LearnedScalars
from recognition.head.losses.base import Loss, Targets
from recognition.head.losses.negatives import FilteredNegatives


@dataclass(frozen=True)
class Step:
    """A training step, or an evaluation, as far as the forward pass depends on it."""

    number: int
    margin_scale: float
    """Share of the margin, in [0, 1]."""
    learns: bool
    """Whether a backward pass may follow."""


@dataclass(frozen=True)
class ForwardState:
    """Result of a forward pass: the input of the loss, and what the backward pass needs. Vectors are of all ranks."""

    batch: GlobalBatch
    step: Step
    problem: LogitProblem
    total: Tensor
    """[B]: log of the sum of exp(z) over the negatives, -inf without any; for a logistic loss, its two sums [B, 2]."""
    lse: Tensor
    """[B]: `total`, and finite without negatives; 0 for a logistic loss."""
    target: Tensor
    """[B]: products of the embeddings and their classes' rows."""
    target_cosine: Tensor
    """[B]: cosines between the embeddings and their classes' rows."""
    cached_exp: Any
    """Exponentials of this rank's classes, for its backend."""

    @property
    def targets(self) -> Targets:
        """The targets' vectors as a loss reads them."""
        return Targets(self.target, self.batch.norm, self.step.margin_scale, self.step.number)


@dataclass(frozen=True)
class VectorGradients:
    """Gradients of the loss by its inputs."""

    total: Tensor
    """[B] or [B, 2], by `ForwardState.total`."""
    target: Tensor
    """[B]"""
    norm: Tensor
    """[B]"""
    scalars: list[Tensor]
    """Gradient by each learned scalar of the loss."""

    def times(self, factor: Tensor) -> "VectorGradients":
        """Return all gradients times a scalar."""
        scalars = [gradient * factor for gradient in self.scalars]
        return VectorGradients(self.total * factor, self.target * factor, self.norm * factor, scalars)

    def at(self, state: ForwardState) -> LossGradient:
        """Return the gradient as a backend reads it."""
        by_sum = self.total[:, 0] if state.problem.term.logistic else self.total
        return LossGradient(lse=state.lse, grad_lse=by_sum, target=state.target, grad_target=self.target)


@dataclass(frozen=True)
class ForwardPass:
    """The forward pass of a head with this loss."""

    loss: Loss
    backend: Backend
    weights: WeightShard
    options: LogitOptions
    filter: config.Filter | None
    group: dist.ProcessGroup

    def __call__(self, batch: GlobalBatch, active: ActiveClasses, step: Step) -> ForwardState:
        """Sum over this rank's classes and reduce over the ranks. A loss that `observe`s does so if `step.learns`."""
        if self.loss.targets_first:
            return self._targets_then_negatives(batch, active, step)
        if self.loss.sums_twice and step.learns:
            # AdaCos: the first sums decide the scale with which the second are taken.
            first = self._negatives_and_targets(batch, active, step, keep=False)
            self.loss.observe_lse(first.total, first.target_cosine)
        state = self._negatives_and_targets(batch, active, step, keep=step.learns)
        if step.learns:
            self.loss.observe(state.target_cosine, batch.norm)
        return state

    def _targets_then_negatives(self, batch: GlobalBatch, active: ActiveClasses, step: Step) -> ForwardState:
        """Run the pass with two all-reduces, as the negatives depend on the targets of all ranks."""
        local = self._local_targets(batch, active)
        product, cosine = _product_and_cosine(all_reduce_together(self.group, targets=local)["targets"])
        if step.learns:
            self.loss.observe(cosine, batch.norm)
        targets = Targets(product, batch.norm, step.margin_scale, step.number)
        problem = self._problem(batch, active, step, self.loss.hard_boundary(targets))
        sums = self._sums(problem, keep=step.learns)
        reduced = all_reduce_together(self.group, sums=sums.sums)
        return self._state(batch, step, problem, sums, reduced["sums"], product, cosine)

    def _negatives_and_targets(
        self, batch: GlobalBatch, active: ActiveClasses, step: Step, *, keep: bool
    ) -> ForwardState:
        """Run the pass with one all-reduce for targets and sums together."""
        local = self._local_targets(batch, active)
        problem = self._problem(batch, active, step, None)
        sums = self._sums(problem, keep=keep)
        reduced = all_reduce_together(self.group, sums=sums.sums, targets=local)
        product, cosine = _product_and_cosine(reduced["targets"])
        return self._state(batch, step, problem, sums, reduced["sums"], product, cosine)

    def _local_targets(self, batch: GlobalBatch, active: ActiveClasses) -> Tensor:
        """Return products and cosines of the targets that are here, 0 for others: [B, 2], or [B, 1] if both agree."""
        both = target_products(self.weights, active, batch.x.float(), self.options)
        alike = self.loss.unit_embeddings and self.loss.unit_rows
        return torch.stack(both[:1] if alike else both, dim=1)

    def _problem(
        self, batch: GlobalBatch, active: ActiveClasses, step: Step, hard_boundary: Tensor | None
    ) -> LogitProblem:
        negatives = self.loss.negatives(step.margin_scale)
        if self.filter is not None:
            negatives = FilteredNegatives(negatives, self.filter.threshold, self.filter.zero)
        term = NegativeTerm(negatives, hard_boundary, self.loss.logistic, self.loss.bound)
        return LogitProblem(self.weights, active, batch.x, self.options, term)

    def _sums(self, problem: LogitProblem, *, keep: bool) -> NegativeSums:
        """Return this rank's sums, with the shift of all ranks."""
        local = self.backend.negative_sums(problem, keep=keep)
        if problem.term.logistic or problem.term.offset is not None:
            return local
        shift = local.shift.clone()
        dist.all_reduce(shift, dist.ReduceOp.MAX, group=self.group)
        return NegativeSums(local.sums * rescaling(local.shift, shift)[:, None], finite_shift(shift))

    def _state(
        self,
        batch: GlobalBatch,
        step: Step,
        problem: LogitProblem,
        local: NegativeSums,
        sums: Tensor,
        target: Tensor,
        target_cosine: Tensor,
    ) -> ForwardState:
        """Return the state from the sums of all ranks, [B, 1] or [B, 2]."""
        if self.loss.logistic:
            total, lse = sums, torch.zeros_like(target)
        else:
            total = sums[:, 0].log() + local.shift
            lse = torch.where(sums[:, 0] == 0, local.shift, total)
        return ForwardState(batch, step, problem, total, lse, target, target_cosine, local.cached_exp)


def loss_on_vectors(
    loss: Loss, scalars: LearnedScalars, state: ForwardState, weight: float
) -> tuple[Tensor, VectorGradients | None]:
    """Return the mean loss times `weight`, a scalar, and its gradients if the step learns; equal on all ranks."""
    targets, learns = state.targets, state.step.learns
    inputs = [state.total.detach(), targets.product.detach(), targets.norm.detach(), *scalars.values]
    with torch.set_grad_enabled(learns):
        for tensor in inputs if learns else []:
            tensor.requires_grad_()
        each = loss(inputs[0], Targets(inputs[1], inputs[2], targets.margin_scale, targets.step))
        mean = each.mean() * weight
    if not learns:
        return mean, None
    by_sums, by_target, by_norm, *by_scalars = torch.autograd.grad(
        mean, inputs, allow_unused=True, materialize_grads=True
    )
    for scalar in scalars.values:
        scalar.requires_grad_(False)
    return mean.detach(), VectorGradients(by_sums, by_target, by_norm, by_scalars)


def all_reduce_together(group: dist.ProcessGroup, **tensors: Tensor) -> dict[str, Tensor]:
    """Return the sums of each tensor [B, k] over the ranks, by name, in one collective."""
    reduced = torch.cat(list(tensors.values()), dim=1)
    dist.all_reduce(reduced, group=group)
    parts = reduced.split([tensor.shape[1] for tensor in tensors.values()], dim=1)
    return dict(zip(tensors, parts, strict=True))


def _product_and_cosine(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return products [B] and cosines [B] from [B, 2], or from [B, 1] twice."""
    return targets[:, 0], targets[:, -1]
