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
from recognition.head.backends.problem import Kept, Products, Sink, Summand, Taking, finite_shift, rescaling, rows_of
from recognition.head.class_weights.gradient import RowGradient, RowSum
from recognition.head.class_weights.optimizer import build_row_optimizer
from recognition.head.class_weights.shard import Part, Rows
from recognition.head.global_batch import Gathered, gather
from recognition.head.learned_scalars import Scalars
from recognition.head.losses.auxiliary import Auxiliary
from recognition.head.losses.base import Targets
from recognition.head.losses.build import build_loss
from recognition.head.losses.negatives import Filtered
from recognition.head.sampling import sample_rows
from recognition.head.side_stream import Aside
from recognition.head.tie import Tie

# A logit of 16, rounded to bfloat16, is off by as much as those of 64 are whose operands were rounded: 0.03.
_SHARP_LOGIT, _SHARP_SCALE = 16.0, 64.0


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

    batch: Gathered
    taking: Taking
    summand: Summand
    total: Tensor
    log_sum: Tensor
    product: Tensor
    cosine: Tensor
    kept: Kept | Tensor | None
    """Of this rank's classes, as the maker wants it."""


class ShardedSoftmax(nn.Module):
    """A loss over C classes, whose rows are sharded over the ranks of a group (Megatron-like).

    `rows` holds this rank's rows and their optimizer's state; `state()` is the same as sharded tensors, with the
    scalars that the loss keeps. With `fused`, `loss.backward()` updates the rows; otherwise it adds to `row_sum`, which
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
        fused: bool = True,
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
        self._maker = select.choose(settings.kernels, device)
        self.products = Products(
            unit_rows=self.loss.unit_rows,
            dtype=hardware.product_type(settings.precision, device),
            chunk=settings.chunk or hardware.head_chunk(device.type),
            workspace=None if settings.chunk else settings.workspace_mib << 20,
            centers=settings.subcenters,
            sharp=min(_SHARP_LOGIT / (self.loss.scale or _SHARP_SCALE), _SHARP_LOGIT / _SHARP_SCALE),
        )
        moves = settings.optimizer or optimizer or config.SGD()
        self.optimizer = build_row_optimizer(moves, settings.untouched, seed=seed)
        self.optimizer.kernels = self._maker.kernels
        centers = self.products.centers
        self.rows = Rows.initial(
            range(self.shard.start * centers, self.shard.stop * centers),
            embedding_size,
            bias=not self.loss.unit_rows,
            seed=seed,
            device=device,
            state=settings.state,
        )
        self.rows.moments.update(
            self.optimizer.moments(
                len(self.rows), embedding_size, bias=not self.loss.unit_rows, device=device, state=settings.state
            )
        )
        self.scalars = Scalars({name: self.loss.state[name] for name in self.loss.learned}, moves)
        self.auxiliary = Auxiliary(settings, self.shard, embedding_size, device, group)
        self.row_sum = None if fused else RowSum(self.rows)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self._updates = 0
        self._state_before: dict[str, Tensor] = {}
        self._aside = Aside(device)

    def state(self) -> dict[str, Tensor]:
        """The whole state: tensors placed `Shard(0)` over the group, by classes, and scalars that all ranks have alike.

        They share storage with the head's own: loading into them loads the head, from any number of ranks.
        """
        self._aside.join()
        self.optimizer.settle(self.rows)
        local = self.rows.tensors() | self.auxiliary.tensors()
        mesh = DeviceMesh.from_group(self.group, self.rows.weight.device.type)
        state: dict[str, Tensor] = {}
        for name, tensor in local.items():
            # The rows of a class stay together, whatever the number of ranks.
            by_class = tensor.view(len(self.shard), -1, *tensor.shape[1:]) if self.products.centers > 1 else tensor
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
        strength: float = 1.0,
        sizes: Sequence[int] | None = None,
        update: bool = True,
        loss_weight: float = 1.0,
        loss_scale: Tensor | float = 1.0,
    ) -> HeadOutput:
        """Loss of `embeddings` [b, D], not normalised, with `labels` [b] (int64, in [0, C)). All ranks call together.

        `lr`: learning rate of the rows; `step` keys the sampled classes; `strength` in [0, 1]: share of the margin;
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
                batch = gather(
                    seen_x.to(self.products.dtype), labels, norm, sizes, classes=self.num_classes, group=self.group
                )
                seen = self._look(batch, strength, step, learns)
            loss, gradients = self._vectors(seen, strength, step, loss_weight, differentiate=learns)
            extra = self.auxiliary(x, unit, batch.labels, batch.x, batch.norm, batch.sizes) * loss_weight
        whole = loss + extra.detach()
        finite = whole.isfinite()
        if learns:
            self.loss.restore(before, ~finite)
            if self.row_sum is not None:
                self._state_before = self._state_before or before
            updates = self._updates

            def backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
                if updates != self._updates:
                    raise RuntimeError(
                        "the head's rows changed between this forward pass and its backward pass: "
                        "run backward before the next update, or build the head with fused=False"
                    )
                skip = ~(finite & gradient.isfinite())
                by_x, by_norm = self._backward(seen, gradients, gradient / loss_scale, lr, step, skip, update)
                return by_x * loss_scale, by_norm * loss_scale

            whole = Tie.apply(seen_x, norm, loss, backward) + extra
        return HeadOutput(whole, seen.cosine.mean(), finite)

    def apply_gradient(self, lr: float, finite: Tensor | None = None, *, step: int = 0, scale: float = 1.0) -> None:
        """Update the rows by `scale` times what the backward passes added up, and start anew. For `fused=False`.

        Where any of their losses, or `finite` (scalar bool, on the device), was not finite, nothing changes, and the
        loss's state is again what it was before them. Only rows that took part in one of the passes change.
        """
        if self.row_sum is None:
            raise RuntimeError("a fused head applies its gradient in backward; build it with fused=False")
        self._aside.join()
        total = self.row_sum
        skip = (self._nonfinite if finite is None else self._nonfinite | ~finite).float()
        self.optimizer.begin(self.rows, step, lr, skip)
        taken = total.taken.nonzero().squeeze(1) if self.sample_rate < 1 else None
        count = len(self.rows) if taken is None else len(taken)
        for start in range(0, count, self.products.chunk):
            span = slice(start, min(start + self.products.chunk, count))
            part = span if taken is None else taken[span]
            bias = None if total.bias is None else total.bias[part] * scale
            self.optimizer.update(self.rows, part, total.weight[part] * scale, lr, skip, step, bias)
        self.scalars.apply(lr, skip, scale)
        self.auxiliary.apply(skip)
        self.loss.restore(self._state_before, skip.bool())
        self._state_before = {}
        total.clear()
        self._nonfinite.zero_()
        self._updates += 1

    def _look(self, batch: Gathered, strength: float, step: int, learns: bool) -> _Seen:
        """Go over this rank's classes, and learn from the other ranks what is to be known of theirs."""
        self._aside.join()
        classes = None
        if learns and self.sample_rate < 1:
            classes = sample_rows(batch.labels, self.num_classes, self.sample_rate, self.seed, step, self.shard)
            self.optimizer.catch_up(self.rows, rows_of(classes, self.products.centers), step)
        elif not learns:
            self.optimizer.settle(self.rows)
        taking = Taking.of(batch.labels, self.shard, classes)
        loss, unit = self.loss, self.loss.unit_embeddings and self.loss.unit_rows
        own = list(pytorch.targets(self.rows, taking, batch.x.float(), self.products)[: 1 if unit else 2])
        known = torch.stack(own, dim=1)
        if loss.targets_first:
            dist.all_reduce(known, group=self.group)
            if learns:
                loss.observe(known[:, -1], batch.norm)
        for again in (False, True) if loss.sums_twice and learns else (True,):
            seen_targets = Targets(known[:, 0], batch.norm, strength, step)
            summand = self._summand(seen_targets, strength)
            sums, shift, kept = self._sum(taking, batch.x, summand, keep=learns and again)
            columns = [sums] if loss.targets_first else [sums, torch.stack(own, dim=1)]
            reduced = torch.cat(columns, dim=1)
            dist.all_reduce(reduced, group=self.group)
            sums = reduced[:, : sums.shape[1]]
            if not loss.targets_first:
                known = reduced[:, sums.shape[1] :]
            total = sums if loss.logistic else sums[:, 0].log() + shift
            if not again:
                loss.observe_sum(total, known[:, -1])
        if learns and not loss.targets_first:
            loss.observe(known[:, -1], batch.norm)
        product, cosine = known[:, 0], known[:, -1]
        log_sum = torch.zeros_like(product) if loss.logistic else torch.where(sums[:, 0] == 0, shift, total)
        return _Seen(batch, taking, summand, total, log_sum, product, cosine, kept)

    def _summand(self, targets: Targets, strength: float) -> Summand:
        negatives, bound = self.loss.negatives(strength), self.loss.bound
        if self.filter is not None:
            negatives = Filtered(negatives, self.filter.threshold, self.filter.zero)
        anchor = self.loss.anchor(targets) if self.loss.targets_first else None
        return Summand(negatives, anchor, self.loss.logistic, bound)

    def _sum(
        self, taking: Taking, x: Tensor, summand: Summand, *, keep: bool
    ) -> tuple[Tensor, Tensor, Kept | Tensor | None]:
        """This rank's sums over its negatives, shifted as all ranks' are, the shift [B], and what is kept."""
        products = self.products if keep else replace(self.products, workspace=None)
        own = self._maker.statistics(self.rows, taking, x, products, summand)
        if summand.logistic or summand.offset is not None:
            return own.sums, own.shift, own.kept
        shift = own.shift.clone()
        dist.all_reduce(shift, dist.ReduceOp.MAX, group=self.group)
        return own.sums * rescaling(own.shift, shift)[:, None], finite_shift(shift), None

    def _vectors(
        self, seen: _Seen, strength: float, step: int, loss_weight: float, *, differentiate: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and its gradients by the sum over the negatives, by the targets' products, by the norms (of [B]
        each), and by each learned scalar."""
        inputs = [seen.total.detach(), seen.product.detach(), seen.batch.norm.detach(), *self.scalars.values]
        with torch.set_grad_enabled(differentiate):
            if differentiate:
                for tensor in inputs:
                    tensor.requires_grad_()
            each = self.loss(inputs[0], Targets(inputs[1], inputs[2], strength, step))
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
        by_total, by_product, by_norm, *by_scalars = (gradient * factor for gradient in gradients)
        batch = seen.batch
        arriving: list[Callable[[], Tensor]] = []

        def ready(by_x: Tensor) -> None:
            arriving.append(start_reduce_scatter_rows(by_x, batch.sizes, self.group))

        sink = None
        if update:
            self.auxiliary.add(batch.x, batch.labels, batch.norm)
            sink = self._sink(lr, step, skip.float(), by_scalars, arriving)
        self._maker.backward(
            self.rows,
            seen.taking,
            batch.x,
            self.products,
            seen.summand,
            seen.log_sum,
            by_total[:, 0] if self.loss.logistic else by_total,
            seen.product,
            by_product,
            sink,
            ready,
            seen.kept,
        )
        return arriving[0]() * self.world, by_norm[batch.of(self.rank)] * self.world

    def _sink(self, lr: float, step: int, skip: Tensor, by_scalars: list[Tensor], arriving: list[Any]) -> Sink:
        """What becomes of the gradients. Once the embeddings' is `arriving`, the rest has time beside the backbone's
        backward pass.
        """
        self.scalars.add(by_scalars)
        if self.row_sum is not None:
            self._nonfinite |= skip.bool()
            return self.row_sum.add
        self._updates += 1
        self.scalars.apply(lr, skip)
        self.auxiliary.apply(skip)
        self.optimizer.begin(self.rows, step, lr, skip)

        def apply(part: Part, gradient: RowGradient) -> None:
            if not arriving:
                self.optimizer.update(self.rows, part, gradient, lr, skip, step)
                return
            read = gradient.a, gradient.x, gradient.along, gradient.bias, skip
            with self._aside.run(*read, part if isinstance(part, Tensor) else None):
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
    fused: bool = True,
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
        fused=fused,
    )
