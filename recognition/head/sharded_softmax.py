"""The head: a softmax over class weights that are spread over the ranks, with a margin on each target.

Per step one gather of the embeddings and one of the labels, one all-reduce of the statistics, one reduce-scatter of
the embeddings' gradient. What goes over the classes is in `chunks`; what happens to the target's logit, in `margins`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from recognition import config
from recognition.distributed import all_gather_rows, reduce_scatter_rows, shard_rows
from recognition.head import chunks
from recognition.head.margins import target_margin
from recognition.head.row_optimizer import Part, RowGradient, Rows, RowSGD
from recognition.head.sampling import sample_rows


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
class _Batch:
    """The gathered batch, and what the backward pass needs of the forward pass."""

    x: Tensor
    taking: chunks.Taking
    inverse_norms: Tensor
    log_sum: Tensor
    sizes: Sequence[int] | None


class ShardedSoftmax(nn.Module):
    """Softmax cross-entropy over C classes, whose rows are sharded over the ranks of a group (Megatron-like).

    `rows` holds this rank's rows and their momentum, float32; `state()` is the same as one sharded tensor each. With
    `fused`, `loss.backward()` updates the rows; otherwise it adds to `row_gradient`, which `apply_gradient` applies.
    A process group has to exist, a group of one included. The module has no parameters: no optimizer but its own
    changes the rows, and DistributedDataParallel is to wrap the backbone alone.
    """

    def __init__(
        self,
        settings: config.Head,
        num_classes: int,
        embedding_size: int,
        *,
        seed: int,
        device: torch.device,
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
        self.world, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.shard = shard_rows(num_classes, self.world, self.rank)
        self.seed, self.sample_rate = seed, settings.sample_rate
        self.margin = target_margin(settings.margin)
        self.logits = chunks.Logits(
            scale=None if isinstance(settings.margin, config.Softmax) else settings.margin.scale,
            dtype=_product_type(settings.precision, device),
            chunk=settings.chunk,
        )
        self.optimizer = RowSGD(settings.momentum, settings.weight_decay)
        self.rows = Rows.initial(self.shard, embedding_size, bias=self.logits.scale is None, seed=seed, device=device)
        self.row_gradient = None if fused else RowGradient(self.rows)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self._updates = 0

    def state(self) -> dict[str, DTensor]:
        """The whole state as tensors placed `Shard(0)` over the group. They share storage with `rows`: loading into
        them loads the head, from any number of ranks.
        """
        mesh = DeviceMesh.from_group(self.group, self.rows.weight.device.type)
        return {
            name: DTensor.from_local(
                local,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([self.num_classes, *local.shape[1:]]),
                stride=local.stride(),
            )
            for name, local in vars(self.rows).items()
            if local is not None
        }

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
    ) -> HeadOutput:
        """Loss of `embeddings` [b, D], not normalised, with `labels` [b] (int64, in [0, C)). All ranks call together.

        `lr`: learning rate of the rows; `step` keys the sampled classes; `strength` in [0, 1]: share of the margin;
        `sizes`: b of every rank, None when they are equal; `update`: whether `backward` changes the rows at all.
        The embeddings get the gradient of the loss times the number of ranks, so that the mean over the ranks that
        DistributedDataParallel takes is the gradient. In eval mode, or without gradients, only the loss is computed,
        over all classes.
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
            if self.logits.scale is not None:
                x = F.normalize(x)
            with torch.no_grad():
                batch, negatives, logit, cosine = self._statistics(x, labels, sizes, step if learns else None)
            loss, negatives_gradient, target_gradient = self._vectors(
                negatives, logit, strength, loss_weight, differentiate=learns
            )
        finite = loss.isfinite()
        if learns:
            updates = self._updates

            def backward(gradient: Tensor) -> Tensor:
                if updates != self._updates:
                    raise RuntimeError(
                        "the head's rows changed between this forward pass and its backward pass: "
                        "run backward before the next update, or build the head with fused=False"
                    )
                skip = ~(finite & gradient.isfinite())
                sink = self._sink(lr, skip) if update else None
                return self._backward(batch, negatives_gradient * gradient, target_gradient * gradient, sink)

            loss = _Backward.apply(x, loss, backward)
        return HeadOutput(loss, cosine.mean(), finite)

    def apply_gradient(self, lr: float, finite: Tensor | None = None, *, scale: float = 1.0) -> None:
        """Update the rows by `scale` times what the backward passes added up, and start anew. For `fused=False`.

        Nothing changes where any of their losses, or `finite` (scalar bool, on the device), was not finite. Only rows
        that took part in one of the passes change.
        """
        if self.row_gradient is None:
            raise RuntimeError("a fused head applies its gradient in backward; build it with fused=False")
        gradient = self.row_gradient
        skip = (self._nonfinite if finite is None else self._nonfinite | ~finite).float()
        taken = gradient.taken.nonzero().squeeze(1) if self.sample_rate < 1 else None
        total = len(self.rows.weight) if taken is None else len(taken)
        for start in range(0, total, self.logits.chunk):
            span = slice(start, min(start + self.logits.chunk, total))
            part: Part = span if taken is None else taken[span]
            bias = None if gradient.bias is None else gradient.bias[part] * scale
            self.optimizer.update(self.rows, part, gradient.weight[part] * scale, bias, lr, skip)
        gradient.clear()
        self._nonfinite.zero_()
        self._updates += 1

    def _statistics(
        self, x: Tensor, labels: Tensor, sizes: Sequence[int] | None, step: int | None
    ) -> tuple[_Batch, Tensor, Tensor, Tensor]:
        """The gathered batch, and [B] each: log of the negatives' sum, the target's logit, its cosine, of all ranks."""
        x = all_gather_rows(x.to(self.logits.dtype), sizes, self.group)
        labels = all_gather_rows(labels.long(), sizes, self.group)
        self._check(labels, sizes)
        taken = None
        if step is not None and self.sample_rate < 1:
            taken = sample_rows(labels, self.num_classes, self.sample_rate, self.seed, step, self.shard)
        taking = chunks.Taking.of(labels, self.shard, taken)
        own = chunks.statistics(self.rows, taking, x, self.logits)
        shift, sums = own.shift, own.negatives
        if self.logits.scale is None:
            shift = own.shift.clone()
            dist.all_reduce(shift, dist.ReduceOp.MAX, group=self.group)
            sums = sums * chunks.rescaling(own.shift, shift)
        logit, cosine = chunks.targets(self.rows, taking, x.float(), self.logits)
        columns = [sums, logit] if self.logits.scale is not None else [sums, logit, cosine]
        reduced = torch.stack(columns, dim=1)
        dist.all_reduce(reduced, group=self.group)
        sums, logit, cosine = reduced[:, 0], reduced[:, 1], reduced[:, -1]
        shift = chunks.finite_shift(shift)
        log_sum = sums.log() + shift
        batch = _Batch(x, taking, own.inverse_norms, torch.where(sums == 0, shift, log_sum), sizes)
        return batch, log_sum, logit, cosine

    def _vectors(
        self, log_sum: Tensor, logit: Tensor, strength: float, loss_weight: float, *, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and its gradients by `log_sum` [B] (-inf where there are no negatives) and by `logit` [B]."""
        with torch.set_grad_enabled(differentiate):
            if differentiate:
                log_sum, logit = log_sum.detach().requires_grad_(), logit.detach().requires_grad_()
            loss = F.softplus(log_sum - self.margin(logit, strength)).mean() * loss_weight
        if not differentiate:
            return loss, log_sum, logit
        by_log_sum, by_logit = torch.autograd.grad(loss, (log_sum, logit))
        return loss.detach(), by_log_sum, by_logit

    def _sink(self, lr: float, skip: Tensor) -> chunks.Sink:
        """What becomes of the rows' gradients."""
        if self.row_gradient is not None:
            self._nonfinite |= skip
            return self.row_gradient.add
        self._updates += 1
        flag = skip.float()

        def apply(part: Part, gradient: Tensor, bias_gradient: Tensor | None) -> None:
            self.optimizer.update(self.rows, part, gradient, bias_gradient, lr, flag)

        return apply

    def _backward(
        self, batch: _Batch, negatives_gradient: Tensor, target_gradient: Tensor, sink: chunks.Sink | None
    ) -> Tensor:
        gradient = chunks.backward(
            self.rows,
            batch.taking,
            batch.x,
            self.logits,
            batch.inverse_norms,
            batch.log_sum,
            negatives_gradient,
            target_gradient,
            sink,
        )
        return reduce_scatter_rows(gradient, batch.sizes, self.group) * self.world

    def _check(self, labels: Tensor, sizes: Sequence[int] | None) -> None:
        valid = (labels >= 0) & (labels < self.num_classes)
        if labels.is_cuda:
            torch._assert_async(valid.all(), f"a label is outside 0..{self.num_classes - 1}")
        elif not valid.all():
            position = int((~valid).nonzero()[0])
            label, rank = int(labels[position]), 0
            for size in sizes or [len(labels) // self.world] * self.world:
                if position < size:
                    break
                position, rank = position - size, rank + 1
            raise config.UserError(
                f"label {label} of sample {position} in the batch of rank {rank} is outside 0..{self.num_classes - 1}: "
                "the data has more identities than the head was built for"
            )


class _Backward(torch.autograd.Function):
    """Ties a loss that was computed outside autograd to `x`, whose gradient `backward` returns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.backward = backward
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.backward(gradient), None, None


def build_head(
    settings: config.Head,
    num_classes: int,
    embedding_size: int,
    *,
    seed: int,
    ranks_group: dist.ProcessGroup | None = None,
    device: torch.device | str,
    fused: bool = True,
) -> ShardedSoftmax:
    """The head that `settings` describe, with this rank's share of freshly drawn rows on `device`.

    `ranks_group`: the ranks that share the rows; None means all.
    """
    return ShardedSoftmax(
        settings,
        num_classes,
        embedding_size,
        seed=seed,
        device=torch.device(device),
        ranks_group=ranks_group,
        fused=fused,
    )


def _product_type(precision: str, device: torch.device) -> torch.dtype:
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
