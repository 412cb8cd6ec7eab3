"""The head: a loss over class weights that are spread over the ranks.

Per step one gather of the embeddings and one of labels and norms, one all-reduce of the statistics, one reduce-scatter
of the embeddings' gradient. What goes over the classes is in `chunks`; what a loss makes of it, in `losses`; how rows
are kept and moved, in `rows` and `row_optimizer`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from recognition import config, hardware
from recognition.distributed import shard_rows, start_reduce_scatter_rows
from recognition.head.backends import pytorch, select
from recognition.head.backends.problem import (
    ActiveClasses,
    CachedExponentials,
    LogitOptions,
    NegativeTerm,
    OnRows,
    finite_shift,
    rescaling,
    rows_of,
)
from recognition.head.class_weights.gradient import AccumulatedGradient, RowGradient
from recognition.head.class_weights.optimizer import build_row_optimizer
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.global_batch import GlobalBatch, gather_batch
from recognition.head.learned_scalars import LearnedScalars
from recognition.head.losses.auxiliary import Auxiliary
from recognition.head.losses.base import Targets
from recognition.head.losses.build import build_loss
from recognition.head.losses.negatives import FilteredNegatives
from recognition.head.sampling import sample_rows
from recognition.head.side_stream import SideStream
from recognition.head.tie import HeadGradient

# A logit of 16, rounded to bfloat16, is off by as much as those of 64 are whose operands were rounded: 0.03.
_RECOMPUTE_LOGIT, _RECOMPUTE_SCALE = 16.0, 64.0


@dataclass(frozen=True)
class HeadOutput:
    """What a forward pass gives; equal on all ranks."""

    loss: Tensor
    """Scalar: mean over the gathered batch, times `loss_weight`. Its `backward()` also updates the rows, if fused."""
    target_cosine: Tensor
    """Scalar, detached: mean cosine between the embeddings and their classes' rows."""
    finite: Tensor
    """Scalar bool on the device: whether the loss is finite. Where it is not, no row changes."""


@dataclass(frozen=True)
class _Seen:
    """What the backward pass needs of the forward pass, and what the loss is made of, [B] each but where it says so."""

    batch: GlobalBatch
    active: ActiveClasses
    negative_term: NegativeTerm
    total: Tensor
    lse: Tensor
    product: Tensor
    cosine: Tensor
    cached_exp: CachedExponentials | Tensor | None
    """Of this rank's classes, as the maker wants it."""


class ShardedSoftmax(nn.Module):
    """A loss over C classes, whose rows are sharded over the ranks of a group (Megatron-like).

    `rows` holds this rank's rows and their optimizer's state; `state()` is the same as sharded tensors, with the
    scalars that the loss keeps. With `update_in_backward`, `loss.backward()` updates the rows; otherwise it adds
    to `accumulated`, which
    `apply_gradient` applies. A process group has to exist, a group of one included. The module has no parameters: no
    optimizer but its own changes the rows, and DistributedDataParallel is to wrap the backbone alone.
    """

    def __init__(
        self,
        settings: config.Head,
        num_classes: int,
        embedding_size: int,
        *,
        seed: int,
        device: torch.device,
        optimizer: config.Optimizer | None = None,
        ranks_group: dist.ProcessGroup | None = None,
        update_in_backward: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1 or embedding_size < 1:
            raise config.UserError(f"a head of {num_classes} classes with embeddings of {embedding_size} numbers")
        group = ranks_group or dist.group.WORLD
        if group is None:
            raise RuntimeError("the head needs a process group, also in a single process: call distributed.start first")
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.shard = shard_rows(num_classes, self.world, self.rank)
        self.seed, self.sample_rate, self.filter = seed, settings.sample_rate, settings.filter
        self.loss = build_loss(settings.loss, num_classes, seed=seed, device=device)
        self._backend = select.select_backend(settings.kernels, device)
        self.options = LogitOptions(
            unit_rows=self.loss.unit_rows,
            dtype=hardware.product_type(settings.precision, device),
            chunk=settings.chunk or hardware.head_chunk(device.type),
            workspace=None if settings.chunk else settings.workspace_mib << 20,
            centers=settings.subcenters,
            recompute_above=min(
                _RECOMPUTE_LOGIT / (self.loss.scale or _RECOMPUTE_SCALE), _RECOMPUTE_LOGIT / _RECOMPUTE_SCALE
            ),
        )
        optimizer_config = settings.optimizer or optimizer or config.SGD()
        self.optimizer = build_row_optimizer(optimizer_config, settings.untouched, seed=seed)
        self.optimizer.kernels = self._backend.kernels
        centers = self.options.centers
        self.rows = WeightShard.initial(
            range(self.shard.start * centers, self.shard.stop * centers),
            embedding_size,
            bias=not self.loss.unit_rows,
            seed=seed,
            device=device,
            row_format=settings.state,
        )
        self.rows.moments.update(
            self.optimizer.moments(
                len(self.rows), embedding_size, bias=not self.loss.unit_rows, device=device, row_format=settings.state
            )
        )
        self.scalars = LearnedScalars({name: self.loss.state[name] for name in self.loss.learned}, optimizer_config)
        self.auxiliary = Auxiliary(settings, self.shard, embedding_size, device, group)
        self.accumulated = None if update_in_backward else AccumulatedGradient(self.rows)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self._updates = 0
        self._state_before: dict[str, Tensor] = {}
        self._side_stream = SideStream(device)

    def state(self) -> dict[str, Tensor]:
        """The whole state: tensors placed `Shard(0)` over the group, by classes, and scalars that all ranks have alike.

        They share storage with the head's own: loading into them loads the head, from any number of ranks.
        """
        self._side_stream.wait()
        self.optimizer.flush(self.rows)
        local = self.rows.tensors() | self.auxiliary.tensors()
        mesh = DeviceMesh.from_group(self.group, self.rows.weight.device.type)
        state: dict[str, Tensor] = {}
        for name, tensor in local.items():
            # The rows of a class stay together, whatever the number of ranks.
            by_class = tensor.view(len(self.shard), -1, *tensor.shape[1:]) if self.options.centers > 1 else tensor
            state[name] = DTensor.from_local(
                by_class,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([self.num_classes, *by_class.shape[1:]]),
                stride=by_class.stride(),
            )
        return state | {f"loss.{name}": tensor for name, tensor in self.loss.state.items()} | self.scalars.tensors()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        lr: float,
        step: int,
        margin_scale: float = 1.0,
        sizes: Sequence[int] | None = None,
        update: bool = True,
        loss_weight: float = 1.0,
        loss_scale: Tensor | float = 1.0,
    ) -> HeadOutput:
        """Loss of `embeddings` [b, D], not normalised, with `labels` [b] (int64, in [0, C)). All ranks call together.

        `lr`: learning rate of the rows; `step` keys the sampled classes; `margin_scale` in [0, 1]: share of the margin;
        `sizes`: b of every rank, None when they are equal; `update`: whether `backward` changes the head at all;
        `loss_scale`: what the loss is multiplied by before `backward` (a GradScaler's scale), which the rows' own
        update is freed of.
        The embeddings get the gradient of the loss times the number of ranks, so that the mean over the ranks that
        DistributedDataParallel takes is the gradient. In eval mode, or without gradients, only the loss is computed,
        over all classes, and nothing changes.
        Raises UserError when a label is out of range; on a GPU, where asking would make the host wait, CUDA's assert.
        """
        if embeddings.shape != (len(labels), self.embedding_size):
            expected = (len(labels), self.embedding_size)
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}, not {expected}, for {len(labels)} labels")
        learns = self.training and torch.is_grad_enabled()
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings.float()
            if learns and not x.requires_grad:
                x = x.detach().requires_grad_()
            norm = torch.linalg.vector_norm(x, dim=1)
            unit = x / norm.clamp(min=1e-12)[:, None]
            seen_x = unit if self.loss.unit_embeddings else x
            before = {name: value.clone() for name, value in self.loss.state.items()}
            with torch.no_grad():
                batch = gather_batch(
                    seen_x.to(self.options.dtype), labels, norm, sizes, classes=self.num_classes, group=self.group
                )
                seen = self._look(batch, margin_scale, step, learns)
            loss, gradients = self._vectors(seen, margin_scale, step, loss_weight, differentiate=learns)
            extra = self.auxiliary(x, unit, batch.labels, batch.x, batch.norm, batch.sizes) * loss_weight
        whole = loss + extra.detach()
        finite = whole.isfinite()
        if learns:
            self.loss.restore(before, ~finite)
            if self.accumulated is not None:
                self._state_before = self._state_before or before
            updates = self._updates

            def backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
                if updates != self._updates:
                    raise RuntimeError(
                        "the head's rows changed between this forward pass and its backward pass: "
                        "run backward before the next update, or build the head with update_in_backward=False"
                    )
                skip = ~(finite & gradient.isfinite())
                grad_x, grad_norm = self._backward(seen, gradients, gradient / loss_scale, lr, step, skip, update)
                return grad_x * loss_scale, grad_norm * loss_scale

            whole = HeadGradient.apply(seen_x, norm, loss, backward) + extra
        return HeadOutput(whole, seen.cosine.mean(), finite)

    def apply_gradient(self, lr: float, finite: Tensor | None = None, *, step: int = 0, scale: float = 1.0) -> None:
        """Update the rows by `scale` times what the backward passes added up, and start anew. For
        `update_in_backward=False`.

        Where any of their losses, or `finite` (scalar bool, on the device), was not finite, nothing changes, and the
        loss's state is again what it was before them. Only rows that took part in one of the passes change.
        """
        if self.accumulated is None:
            raise RuntimeError("a fused head applies its gradient in backward; build it with update_in_backward=False")
        self._side_stream.wait()
        total = self.accumulated
        skip = (self._nonfinite if finite is None else self._nonfinite | ~finite).float()
        self.optimizer.begin(self.rows, step, lr, skip)
        touched = total.touched.nonzero().squeeze(1) if self.sample_rate < 1 else None
        count = len(self.rows) if touched is None else len(touched)
        for start in range(0, count, self.options.chunk):
            span = slice(start, min(start + self.options.chunk, count))
            part = span if touched is None else touched[span]
            bias = None if total.bias is None else total.bias[part] * scale
            self.optimizer.update(self.rows, part, total.weight[part] * scale, lr, skip, step, bias)
        self.scalars.apply(lr, skip, scale)
        self.auxiliary.apply(skip)
        self.loss.restore(self._state_before, skip.bool())
        self._state_before = {}
        total.clear()
        self._nonfinite.zero_()
        self._updates += 1

    def _look(self, batch: GlobalBatch, margin_scale: float, step: int, learns: bool) -> _Seen:
        """Go over this rank's classes, and learn from the other ranks what is to be known of theirs."""
        self._side_stream.wait()
        classes = None
        if learns and self.sample_rate < 1:
            classes = sample_rows(batch.labels, self.num_classes, self.sample_rate, self.seed, step, self.shard)
            self.optimizer.catch_up(self.rows, rows_of(classes, self.options.centers), step)
        elif not learns:
            self.optimizer.flush(self.rows)
        active = ActiveClasses.of(batch.labels, self.shard, classes)
        loss, unit = self.loss, self.loss.unit_embeddings and self.loss.unit_rows
        own = list(pytorch.targets(self.rows, active, batch.x.float(), self.options)[: 1 if unit else 2])
        known = torch.stack(own, dim=1)
        if loss.targets_first:
            dist.all_reduce(known, group=self.group)
            if learns:
                loss.observe(known[:, -1], batch.norm)
        for again in (False, True) if loss.sums_twice and learns else (True,):
            seen_targets = Targets(known[:, 0], batch.norm, margin_scale, step)
            negative_term = self._summand(seen_targets, margin_scale)
            sums, shift, cached_exp = self._sum(active, batch.x, negative_term, keep=learns and again)
            columns = [sums] if loss.targets_first else [sums, torch.stack(own, dim=1)]
            reduced = torch.cat(columns, dim=1)
            dist.all_reduce(reduced, group=self.group)
            sums = reduced[:, : sums.shape[1]]
            if not loss.targets_first:
                known = reduced[:, sums.shape[1] :]
            total = sums if loss.logistic else sums[:, 0].log() + shift
            if not again:
                loss.observe_lse(total, known[:, -1])
        if learns and not loss.targets_first:
            loss.observe(known[:, -1], batch.norm)
        product, cosine = known[:, 0], known[:, -1]
        lse = torch.zeros_like(product) if loss.logistic else torch.where(sums[:, 0] == 0, shift, total)
        return _Seen(batch, active, negative_term, total, lse, product, cosine, cached_exp)

    def _summand(self, targets: Targets, margin_scale: float) -> NegativeTerm:
        negatives, bound = self.loss.negatives(margin_scale), self.loss.bound
        if self.filter is not None:
            negatives = FilteredNegatives(negatives, self.filter.threshold, self.filter.zero)
        hard_boundary = self.loss.hard_boundary(targets) if self.loss.targets_first else None
        return NegativeTerm(negatives, hard_boundary, self.loss.logistic, bound)

    def _sum(
        self, active: ActiveClasses, x: Tensor, negative_term: NegativeTerm, *, keep: bool
    ) -> tuple[Tensor, Tensor, CachedExponentials | Tensor | None]:
        """This rank's sums over its negatives, shifted as all ranks' are, the shift [B], and what is kept."""
        options = self.options if keep else replace(self.options, workspace=None)
        own = self._backend.negative_sums(self.rows, active, x, options, negative_term)
        if negative_term.logistic or negative_term.offset is not None:
            return own.sums, own.shift, own.cached_exp
        shift = own.shift.clone()
        dist.all_reduce(shift, dist.ReduceOp.MAX, group=self.group)
        return own.sums * rescaling(own.shift, shift)[:, None], finite_shift(shift), None

    def _vectors(
        self, seen: _Seen, margin_scale: float, step: int, loss_weight: float, *, differentiate: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and its gradients by the sum over the negatives, by the targets' products, by the norms (of [B]
        each), and by each learned scalar."""
        inputs = [seen.total.detach(), seen.product.detach(), seen.batch.norm.detach(), *self.scalars.values]
        with torch.set_grad_enabled(differentiate):
            if differentiate:
                for tensor in inputs:
                    tensor.requires_grad_()
            each = self.loss(inputs[0], Targets(inputs[1], inputs[2], margin_scale, step))
            loss = each.mean() * loss_weight
        if not differentiate:
            return loss, []
        found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for scalar in self.scalars.values:
            scalar.requires_grad_(False)
        return loss.detach(), list(found)

    def _backward(
        self, seen: _Seen, gradients: list[Tensor], factor: Tensor, lr: float, step: int, skip: Tensor, update: bool
    ) -> tuple[Tensor, Tensor]:
        grad_lse, grad_target, grad_norm, *grad_scalars = (gradient * factor for gradient in gradients)
        batch = seen.batch
        pending: list[Callable[[], Tensor]] = []

        def on_embeddings(grad_x: Tensor) -> None:
            pending.append(start_reduce_scatter_rows(grad_x, batch.sizes, self.group))

        on_rows = None
        if update:
            self.auxiliary.add(batch.x, batch.labels, batch.norm)
            on_rows = self._sink(lr, step, skip.float(), grad_scalars, pending)
        self._backend.backward(
            self.rows,
            seen.active,
            batch.x,
            self.options,
            seen.negative_term,
            seen.lse,
            grad_lse[:, 0] if self.loss.logistic else grad_lse,
            seen.product,
            grad_target,
            on_rows,
            on_embeddings,
            seen.cached_exp,
        )
        return pending[0]() * self.world, grad_norm[batch.of(self.rank)] * self.world

    def _sink(self, lr: float, step: int, skip: Tensor, grad_scalars: list[Tensor], pending: list[Any]) -> OnRows:
        """What becomes of the gradients. Once the embeddings' is `pending`, the rest has time beside the backbone's
        backward pass.
        """
        self.scalars.add(grad_scalars)
        if self.accumulated is not None:
            self._nonfinite |= skip.bool()
            return self.accumulated.add
        self._updates += 1
        self.scalars.apply(lr, skip)
        self.auxiliary.apply(skip)
        self.optimizer.begin(self.rows, step, lr, skip)

        def apply(part: RowSelection, gradient: RowGradient) -> None:
            if not pending:
                self.optimizer.update(self.rows, part, gradient, lr, skip, step)
                return
            read = gradient.a, gradient.x, gradient.radial, gradient.bias, skip
            with self._side_stream.use(*read, part if isinstance(part, Tensor) else None):
                self.optimizer.update(self.rows, part, gradient, lr, skip, step)

        return apply


def build_head(
    settings: config.Head,
    num_classes: int,
    embedding_size: int,
    *,
    seed: int,
    optimizer: config.Optimizer | None = None,
    ranks_group: dist.ProcessGroup | None = None,
    device: torch.device | str,
    update_in_backward: bool = True,
) -> ShardedSoftmax:
    """The head that `settings` describe, with this rank's share of freshly drawn rows on `device`.

    `optimizer`: what moves the rows where `settings` do not say. `ranks_group`: the ranks that share the rows; None
    means all.
    """
    return ShardedSoftmax(
        settings,
        num_classes,
        embedding_size,
        seed=seed,
        device=torch.device(device),
        optimizer=optimizer,
        ranks_group=ranks_group,
        update_in_backward=update_in_backward,
    )
