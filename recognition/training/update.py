"""One update from one global batch: forward, back through the head's rows to the backbone, and a step of both."""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from recognition import distributed
from recognition.config import Config
from recognition.data.pipeline import Batch
from recognition.distributed import ProcessInfo
from recognition.errors import UserError
from recognition.head.sharded_softmax import ShardedSoftmax
from recognition.models.backbone import seed_step
from recognition.training.loss_scale import LossScale
from recognition.training.optimizer import clip_gradients, set_lr, step_if_finite
from recognition.training.schedule import Schedule

log = logging.getLogger(__name__)

# The argument has had another name since torch 2.15 or so, which warns of the old one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_RANKS_KEEP_THEIR_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one update. Tensors are scalars on the device: reading one waits for it."""

    loss: Tensor
    lr: float
    """Learning rate of the backbone."""
    target_cosine: Tensor
    """Mean cosine of an embedding to its class's weight, before the margin."""
    embedding_norm: Tensor
    """Mean norm of this rank's embeddings."""
    gradient_norm: Tensor
    """Global norm of the backbone's gradient, before clipping."""
    loss_scale: Tensor | None
    """Factor of the loss after the update; None where it is not scaled."""

    def to_dict(self) -> dict[str, Tensor | float]:
        """Return the metrics by name, without those that are None."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}


@dataclass
class _Passes:
    """Sums over the forward passes of a step, scalars on the device."""

    loss: Tensor
    target_cosine: Tensor
    embedding_norm: Tensor
    finite: Tensor
    """Whether all losses and the head's gradients are finite."""

    @classmethod
    def begin(cls, device: torch.device, head_device: torch.device) -> "_Passes":
        """Start a step."""
        loss, cosine = torch.zeros((), device=head_device), torch.zeros((), device=head_device)
        return cls(loss, cosine, torch.zeros((), device=device), torch.ones((), dtype=torch.bool, device=head_device))


class Update:
    """Updates `backbone`, `head`, `optimizer` and `loss_scale`, which it shares with the trainer."""

    def __init__(
        self,
        config: Config,
        ranks: ProcessInfo,
        *,
        backbone: nn.Module,
        head: ShardedSoftmax,
        optimizer: Optimizer,
        loss_scale: LossScale,
        sizes: Sequence[int],
    ) -> None:
        """Wrap the backbone for gradient averaging. `sizes`: images of each rank in one forward pass."""
        self.config, self.ranks, self.sizes = config, ranks, sizes
        self.backbone, self.head, self.optimizer, self.loss_scale = backbone, head, optimizer, loss_scale
        self.replica: nn.Module = backbone
        if ranks.world > 1 and any(parameter.requires_grad for parameter in backbone.parameters()):
            self.replica = DistributedDataParallel(
                backbone,
                device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
                **_RANKS_KEEP_THEIR_BUFFERS,
                gradient_as_bucket_view=True,
                bucket_cap_mb=config.distributed.bucket_mib,
            )
        self.buffers = Buffers(backbone)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=ranks.head_device)
        """Number of skipped steps, in all."""
        self.nonfinite_in_a_row = torch.zeros_like(self.nonfinite)
        """Number of skipped steps in a row up to now."""
        self.head_updated_alone = torch.zeros_like(self.nonfinite)
        """Number of `nonfinite_in_a_row` steps in which the head had updated its rows, as the loss was finite."""

    def __call__(self, step: int, batches: Iterator[Batch], schedule: Schedule) -> StepMetrics:
        """Do update number `step`, or skip it where a loss or a gradient is not finite; returns its metrics."""
        passes, factor = self.config.training.accumulation_steps, schedule.factor(step)
        lr, head_lr = self.config.optimizer.lr * factor, self.config.head_optimizer.lr * factor
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.save()
        sums = _Passes.begin(self.ranks.device, self.ranks.head_device)
        for micro_step in range(step * passes, (step + 1) * passes):
            batch = next(batches)
            seed_step(self.config.run.seed, micro_step, self.ranks.rank)
            with self._gradient_sync(last=micro_step == (step + 1) * passes - 1):
                self._forward_backward(batch, step, head_lr, schedule, sums)
        gradient_norm = self._apply_gradients(step, head_lr, sums.finite)
        return StepMetrics(
            loss=sums.loss,
            lr=lr,
            target_cosine=sums.target_cosine,
            embedding_norm=sums.embedding_norm,
            gradient_norm=gradient_norm,
            loss_scale=self.loss_scale.value if self.loss_scale.enabled else None,
        )

    def _forward_backward(self, batch: Batch, step: int, head_lr: float, schedule: Schedule, sums: _Passes) -> None:
        """Run one forward and backward pass: add its gradients to the parameters', and its metrics to `sums`."""
        passes, head_device = self.config.training.accumulation_steps, self.ranks.head_device
        embeddings = self.replica(batch.images)
        output = self.head(
            embeddings.to(head_device),
            batch.labels.to(head_device),
            lr=head_lr,
            step=step,
            margin_scale=schedule.margin_scale(step, self.config.head.margin_warmup_epochs),
            sizes=self.sizes,
            loss_weight=1 / passes,
            loss_scale=self.loss_scale.value,
        )
        (output.loss * self.loss_scale.value).backward()
        sums.loss += output.loss.detach()
        sums.target_cosine += output.target_cosine / passes
        sums.embedding_norm += embeddings.detach().norm(dim=1).mean() / passes
        sums.finite &= output.finite

    def _apply_gradients(self, step: int, head_lr: float, loss_finite: Tensor) -> Tensor:
        """Update backbone and head, unless `loss_finite` (scalar bool) is false or the gradient's norm is not finite.

        Returns that norm. The host waits for nothing: each part of the update obeys a flag on the device.
        """
        self.loss_scale.unscale(self.backbone.parameters())
        gradient_norm = clip_gradients(self.backbone.parameters(), self.config.training.clip_norm)
        finite = loss_finite & gradient_norm.isfinite().to(self.ranks.head_device)
        if self.head.accumulated is not None:
            self.head.apply_gradient(head_lr, finite, step=step)
        step_if_finite(self.optimizer, finite.to(self.ranks.device))
        self.buffers.restore_unless(finite.to(self.ranks.device))
        self.loss_scale.update(finite)
        self.nonfinite += ~finite
        self.nonfinite_in_a_row = torch.where(finite, 0, self.nonfinite_in_a_row + 1)
        if self.head.accumulated is None:
            self.head_updated_alone = torch.where(finite, 0, self.head_updated_alone + loss_finite)
        return gradient_norm

    def warn_if_not_finite(self, step: int) -> int:
        """Warn if the last steps before `step` were not finite; returns how many in a row. Waits for the device."""
        in_a_row = int(self.nonfinite_in_a_row)
        if in_a_row:
            alone = int(self.head_updated_alone)
            but = f" but, in {alone}, whose loss was finite, the class weights" if alone else ""
            scaled = f"; the loss's scale is {float(self.loss_scale.value):g} now" if self.loss_scale.enabled else ""
            log.warning(
                "step %d: loss or gradient were not finite in the last %d steps, which changed nothing%s%s",
                step,
                in_a_row,
                but,
                scaled,
            )
        return in_a_row

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average the gradients over the ranks in the last pass of a step only."""
        if last or not isinstance(self.replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.replica.no_sync()


class Buffers:
    """A module's buffers (BatchNorm's running statistics), which a skipped step has to leave as they were.

    A forward pass updates them before anyone knows whether its loss is finite, so they are restored afterwards: on the
    device, with a handful of launches however many they are.
    """

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            if buffer.numel():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [(buffers, *_flat(buffers), *_flat(buffers)) for buffers in by_type.values()]

    def save(self) -> None:
        """Copy the buffers."""
        for buffers, _, saved_parts, _, _ in self._groups:
            torch._foreach_copy_(saved_parts, buffers)

    def restore_unless(self, flag: Tensor) -> None:
        """Restore the copies of `save`, unless `flag` (scalar bool, on the buffers' device) is true."""
        for buffers, saved, _, now, now_parts in self._groups:
            torch._foreach_copy_(now_parts, buffers)
            torch.where(flag, now, saved, out=now)
            torch._foreach_copy_(buffers, now_parts)


def _flat(buffers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Allocate one flat tensor for the buffers, and return it with views of it in their shapes."""
    sizes = [buffer.numel() for buffer in buffers]
    flat = buffers[0].new_empty(sum(sizes))
    return flat, [part.view(buffer.shape) for part, buffer in zip(flat.split(sizes), buffers, strict=True)]


def micro_batch_sizes(config: Config, world: int) -> list[int]:
    """Return the images of each rank in one forward pass. Raises UserError where a rank gets too few for BatchNorm."""
    sizes = distributed.split(config.training.global_batch // config.training.accumulation_steps, world)
    if min(sizes) < 2:
        raise UserError(
            f"training.global_batch ({config.training.global_batch}) over {world} ranks and "
            f"{config.training.accumulation_steps} passes leaves a rank {min(sizes)} images; BatchNorm needs 2. "
            "Raise training.global_batch, lower training.accumulation_steps or start fewer ranks"
        )
    return sizes
