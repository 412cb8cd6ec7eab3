"""Losses on the embeddings of a batch that join the one over classes: center, triplet and contrastive loss."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from recognition import config
from recognition.distributed import reduce_scatter_rows


class Auxiliary:
    """Weighted sum of the losses on embeddings that `settings` ask for; centres are sharded as class weights are."""

    def __init__(
        self, settings: config.Head, shard: range, embedding_size: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        self._center, self._triplet, self._contrastive = settings.center, settings.triplet, settings.contrastive
        self._unit = settings.loss.unit_embeddings
        self._shard, self._group = shard, group
        self.centers = None if self._center is None else torch.zeros(len(shard), embedding_size, device=device)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, one row a class."""
        return {} if self.centers is None else {"centers": self.centers}

    def __call__(
        self, x: Tensor, unit: Tensor, labels: Tensor, gathered: Tensor, norm: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """Return the sum, a scalar equal on all ranks. Its gradient is that of the mean over the gathered batch, times
        the number of ranks, as the head's is.

        `x` [b, D]: this rank's embeddings, and `unit` [b, D] with length 1. `labels` [B], `gathered` [B, D] and
        `norm` [B]: the gathered batch, with embeddings as the head gathered them. `sizes`: b of every rank.
        """
        loss = x.new_zeros(())
        if self._center is not None:
            loss = loss + self._center.weight * self._center_loss(x, labels, sizes)
        if self._triplet is None and self._contrastive is None:
            return loss
        batch = gathered.float() if self._unit else gathered.float() / norm.clamp(min=1e-12)[:, None]
        rank = dist.get_rank(self._group)
        start = sum(sizes[:rank])
        # Every rank computes the whole, and differentiates it by its own embeddings.
        batch = torch.cat([batch[:start], unit, batch[start + len(unit) :]])
        squared = (2 - 2 * batch @ batch.T).clamp(min=0)
        same = labels[:, None] == labels
        pairs = x.new_zeros(())
        if self._triplet is not None:
            pairs = pairs + self._triplet.weight * batch_hard(squared, same, self._triplet.margin)
        if self._contrastive is not None:
            pairs = pairs + self._contrastive.weight * contrastive(squared, same, self._contrastive.margin)
        return loss + _times(pairs, dist.get_world_size(self._group))

    def add(self, gathered: Tensor, labels: Tensor, norm: Tensor) -> None:
        """Keep a gathered batch for `apply`."""
        if self.centers is not None and len(self.centers):
            self._batches.append((gathered, labels, norm))

    def apply(self, skip: Tensor) -> None:
        """Move the centres by the batches that were added, unless `skip` (scalar, 1 or true), and start anew."""
        for batch in self._batches:
            self._move(*batch, skip.bool())
        self._batches.clear()

    def _move(self, gathered: Tensor, labels: Tensor, norm: Tensor, skip: Tensor) -> None:
        """Bring the centres nearer to the batch's embeddings (Wen et al. 2016, equation 4), unless `skip` (bool)."""
        if self._center is None or self.centers is None:
            return
        x = gathered.float() * norm[:, None] if self._unit else gathered.float()
        places = torch.where(self._own(labels), labels - self._shard.start, 0)
        counted = (self._own(labels) & ~skip).float()
        counts = self.centers.new_zeros(len(self.centers)).index_add_(0, places, counted)
        factor = self._center.rate * counted / (1 + counts[places])
        self.centers.index_add_(
            0,
            places,
            torch.where(counted.bool()[:, None], factor[:, None], 0) * torch.nan_to_num(x - self.centers[places]),
        )

    def _center_loss(self, x: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the mean of `|x - c|^2 / 2` over the gathered batch."""
        if self.centers is None:
            raise AssertionError
        with torch.no_grad():
            own = self._own(labels)
            fetched = self.centers.new_zeros(len(labels), x.shape[1])
            if len(self.centers):
                fetched = torch.where(own[:, None], self.centers[torch.where(own, labels - self._shard.start, 0)], 0)
            centers = reduce_scatter_rows(fetched, sizes, self._group)
        local = (x - centers).square().sum() / 2 / len(labels)
        whole = local.detach().clone()
        dist.all_reduce(whole, group=self._group)
        world = dist.get_world_size(self._group)
        return _times(local, world) + (whole - local.detach())

    def _own(self, labels: Tensor) -> Tensor:
        return (labels >= self._shard.start) & (labels < self._shard.stop)


def batch_hard(squared: Tensor, same: Tensor, margin: float) -> Tensor:
    """Return the batch-hard triplet loss (Hermans et al. 2017, arXiv 1703.07737), a scalar.

    It is the mean of `[margin + furthest genuine - nearest impostor]+` over the anchors that have both; 0 without any.
    `squared` [B, B]: squared distances; `same` [B, B]: whether a pair is of one identity.
    """
    distance = _root(squared)
    genuine = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    furthest = torch.where(genuine, distance, -torch.inf).amax(1)
    nearest = torch.where(same, torch.inf, distance).amin(1)
    valid = genuine.any(1) & ~same.all(1)
    gap = torch.where(valid, furthest, 0) - torch.where(valid, nearest, 0)
    return torch.where(valid, (margin + gap).clamp(min=0), 0).sum() / valid.sum().clamp(min=1)


def contrastive(squared: Tensor, same: Tensor, margin: float) -> Tensor:
    """Return the contrastive loss (Hadsell et al. 2006), a scalar.

    It is the mean of `d^2` over the genuine pairs plus that of `[margin - d]+^2` over the impostor pairs; a mean over
    none is 0. `squared` [B, B]: squared distances; `same` [B, B]: whether a pair is of one identity.
    """
    pair = torch.ones_like(same).triu(1)
    genuine, impostor = same & pair, ~same & pair
    near = torch.where(genuine, squared, 0).sum() / genuine.sum().clamp(min=1)
    far = torch.where(impostor, (margin - _root(squared)).clamp(min=0).square(), 0).sum()
    return near + far / impostor.sum().clamp(min=1)


def _root(squared: Tensor) -> Tensor:
    """Return the square root, with a gradient of 0 at 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)


def _times(x: Tensor, factor: int) -> Tensor:
    """Return `x`, with its gradient multiplied by `factor`."""
    return x * factor - (x * (factor - 1)).detach()
