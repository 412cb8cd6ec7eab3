"""One update from one global batch: forward, back through the head's rows to the backbone, and a step of both."""

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
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
from recognition.training.optimizer import Schedule, clip_gradients, set_lr, step_if_finite

log = logging.getLogger(__name__)

# The argument has had another name since torch 2.15 or so, which warns of the old one.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_RANKS_KEEP_THEIR_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Update:
    """What a step does to `backbone`, `head`, `optimizer` and `loss_scale`, which it shares with the trainer."""

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
        """`sizes`: images of each rank in one forward pass."""
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
        """Steps that were called off, in all."""
        self.nonfinite_in_a_row = torch.zeros_like(self.nonfinite)
        self.rows_moved_alone = torch.zeros_like(self.nonfinite)
        """In how many of those in a row the loss was finite, so that a fused head had moved before the rest was known.
        """

    def __call__(self, step: int, batches: Iterator[Batch], schedule: Schedule) -> dict[str, Tensor | float]:
        """Do update number `step`; returns what is recorded of it, on the device."""
        config, passes = self.config.training, self.config.training.accumulation
        factor = schedule.factor(step)
        lr, head_lr = self.config.optimizer.lr * factor, self.config.head_optimizer.lr * factor
        set_lr(self.optimizer, lr)
        margin_scale = schedule.margin_strength(step, self.config.head.margin_warmup_epochs)
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.keep()
        device, head_device = self.ranks.device, self.ranks.head_device
        loss, cosine = torch.zeros((), device=head_device), torch.zeros((), device=head_device)
        norm = torch.zeros((), device=device)
        finite = torch.ones((), dtype=torch.bool, device=head_device)
        for micro_step in range(step * passes, (step + 1) * passes):
            batch = next(batches)
            seed_step(self.config.run.seed, micro_step, self.ranks.rank)
            with self._synchronised(last=micro_step == (step + 1) * passes - 1):
                embeddings = self.replica(batch.images)
                output = self.head(
                    embeddings.to(head_device),
                    batch.labels.to(head_device),
                    lr=head_lr,
                    step=step,
                    margin_scale=margin_scale,
                    sizes=self.sizes,
                    loss_weight=1 / passes,
                    loss_scale=self.loss_scale.value,
                )
                (output.loss * self.loss_scale.value).backward()
            loss += output.loss.detach()
            cosine += output.target_cosine / passes
            norm += embeddings.detach().norm(dim=1).mean() / passes
            finite &= output.finite
        self.loss_scale.unscale(self.backbone.parameters())
        gradient_norm = clip_gradients(self.backbone.parameters(), config.clip_norm)
        loss_finite, finite = finite, finite & gradient_norm.isfinite().to(head_device)
        if self.head.accumulated is not None:
            self.head.apply_gradient(head_lr, finite, step=step)
        step_if_finite(self.optimizer, finite.to(device))
        self.buffers.restore_unless(finite.to(device))
        self.loss_scale.update(finite)
        self.nonfinite += ~finite
        self.nonfinite_in_a_row = torch.where(finite, 0, self.nonfinite_in_a_row + 1)
        if self.head.accumulated is None:
            self.rows_moved_alone = torch.where(finite, 0, self.rows_moved_alone + loss_finite)
        values: dict[str, Tensor | float] = {
            "loss": loss,
            "lr": lr,
            "target_cosine": cosine,
            "embedding_norm": norm,
            "gradient_norm": gradient_norm,
        }
        if self.loss_scale.enabled:
            values["loss_scale"] = self.loss_scale.value
        return values

    def warn_if_not_finite(self, step: int) -> int:
        """Say so if the last steps before `step` were not finite; returns how many in a row. Waits for the device."""
        in_a_row = int(self.nonfinite_in_a_row)
        if in_a_row:
            alone = int(self.rows_moved_alone)
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

    def _synchronised(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over the ranks in the last pass of a step alone."""
        if last or not isinstance(self.replica, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.replica.no_sync()


class Buffers:
    """A module's buffers (BatchNorm's running statistics), which a step that changes nothing has to leave alone too.

    A forward pass moves them before anyone knows whether its loss is finite, so they are put back afterwards: on the
    device, with a handful of launches however many they are.
    """

    def __init__(self, module: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in module.buffers():
            if buffer.numel():
                by_type.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [(buffers, *_flat(buffers), *_flat(buffers)) for buffers in by_type.values()]

    def keep(self) -> None:
        """Take note of the buffers as they are."""
        for buffers, _, kept_parts, _, _ in self._groups:
            torch._foreach_copy_(kept_parts, buffers)

    def restore_unless(self, flag: Tensor) -> None:
        """Set them back to what they were at `keep`, unless `flag` (scalar bool, on their device) is true."""
        for buffers, kept, _, now, now_parts in self._groups:
            torch._foreach_copy_(now_parts, buffers)
            torch.where(flag, now, kept, out=now)
            torch._foreach_copy_(buffers, now_parts)


def _flat(buffers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Room for the buffers in one piece, and its parts in their shapes."""
    sizes = [buffer.numel() for buffer in buffers]
    flat = buffers[0].new_empty(sum(sizes))
    return flat, [part.view(buffer.shape) for part, buffer in zip(flat.split(sizes), buffers, strict=True)]


def micro_batch_sizes(config: Config, world: int) -> list[int]:
    """Images of each rank in one forward pass. Raises UserError where a rank gets too few for its BatchNorm."""
    sizes = distributed.split(config.training.global_batch // config.training.accumulation, world)
    if min(sizes) < 2:
        raise UserError(
            f"training.global_batch ({config.training.global_batch}) over {world} ranks and "
            f"{config.training.accumulation} passes leaves a rank {min(sizes)} images; BatchNorm needs 2. "
            "Raise training.global_batch, lower training.accumulation or start fewer ranks"
        )
    return sizes
