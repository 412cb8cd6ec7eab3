"""The gathered batch: embeddings, labels and norms of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from recognition.distributed import all_gather_rows
from recognition.errors import UserError


@dataclass(frozen=True)
class GlobalBatch:
    """A gathered batch, in rank order."""

    x: Tensor
    """[B, D], embeddings"""
    labels: Tensor
    """[B], int64"""
    norm: Tensor
    """[B], float32: the embeddings' norms"""
    sizes: list[int]
    """b of every rank"""

    def of(self, rank: int) -> slice:
        """Return the slice of the batch that holds a rank's own samples."""
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))


def gather_batch(
    x: Tensor, labels: Tensor, norm: Tensor, sizes: Sequence[int] | None, *, classes: int, group: dist.ProcessGroup
) -> GlobalBatch:
    """Gather the batch of all ranks from this rank's `x` [b, D], `labels` [b] and `norm` [b] in two collectives.

    `sizes`: b of every rank; None: all equal. A label outside 0..classes-1 raises UserError on all ranks; on a GPU,
    where a check on the host would have to wait for the device, it triggers an assertion in CUDA.
    """
    sizes = [len(x)] * dist.get_world_size(group) if sizes is None else list(sizes)
    x = all_gather_rows(x, sizes, group)
    # The bits of the norms travel with the labels, which saves a collective.
    packed = torch.stack([labels.long(), norm.detach().view(torch.int32).long()], dim=1)
    packed = all_gather_rows(packed, sizes, group)
    labels, norm = packed[:, 0].contiguous(), packed[:, 1].int().view(torch.float32)
    _check(labels, sizes, classes)
    return GlobalBatch(x, labels, norm, sizes)


def _check(labels: Tensor, sizes: list[int], classes: int) -> None:
    valid = (labels >= 0) & (labels < classes)
    if labels.is_cuda:
        torch._assert_async(valid.all(), f"a label is outside 0..{classes - 1}")
    elif not valid.all():
        position = int((~valid).nonzero()[0])
        label, rank = int(labels[position]), 0
        for size in sizes:
            if position < size:
                break
            position, rank = position - size, rank + 1
        raise UserError(
            f"label {label} of sample {position} in the batch of rank {rank} is outside 0..{classes - 1}: "
            "the data has more identities than the head was built for"
        )
