"""The baseline head that the package's own is measured and tested against; not for training.

It is straightforward PyTorch: CosFace (Wang et al. 2018) on all logits of a rank at once, a gradient for
every row, `torch.optim` over the whole shard. Partial FC (An et al. 2022, arXiv:2203.15565) saves products, but neither
gradient nor update: sampled rows are copied out, and the copy's gradient is spread over a gradient of all rows.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recognition import config
from recognition.distributed import all_gather_rows, reduce_scatter_rows, shard_rows


class BaselineHead(nn.Module):
    """CosFace over C classes, sharded over all ranks, in float32, with all logits and a dense gradient of all rows.

    `weight` [c, D]: this rank's rows, drawn with mean 0 and standard deviation 0.01.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        seed: int,
        device: torch.device | str,
        loss: config.CosFace | None = None,
        sample_rate: float = 1.0,
        optimizer: config.Optimizer | None = None,
    ) -> None:
        super().__init__()
        rank = dist.get_rank()
        self.shard = shard_rows(num_classes, dist.get_world_size(), rank)
        self.loss, self.sample_rate = loss or config.CosFace(), sample_rate
        # On the CPU, so that the sampled classes do not depend on the device.
        self._generator = torch.Generator().manual_seed(seed + rank)
        weight = torch.empty(len(self.shard), embedding_size).normal_(std=0.01, generator=self._generator)
        self.weight = nn.Parameter(weight.to(device))
        optimizer_config = optimizer or config.SGD()
        self.optimizer: torch.optim.Optimizer
        if isinstance(optimizer_config, config.SGD):
            self.optimizer = torch.optim.SGD(
                [self.weight],
                lr=optimizer_config.lr,
                momentum=optimizer_config.momentum,
                weight_decay=optimizer_config.weight_decay,
            )
        else:
            self.optimizer = torch.optim.AdamW(
                [self.weight],
                lr=optimizer_config.lr,
                betas=optimizer_config.betas,
                eps=optimizer_config.eps,
                weight_decay=optimizer_config.weight_decay,
            )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of `embeddings` [b, D], not normalised, for `labels` [b], int64: a scalar equal on all ranks.

        b has to be equal on all ranks. The embeddings get the gradient times the number of ranks, as from the package's
        head; the rows' gradient is in `weight.grad` after `backward`.
        """
        x = F.normalize(_Gather.apply(embeddings))
        labels = all_gather_rows(labels)
        own = (labels >= self.shard.start) & (labels < self.shard.stop)
        samples, classes = own.nonzero().squeeze(1), labels[own] - self.shard.start
        weight: Tensor = self.weight
        if self.sample_rate < 1:
            active = self._sampled(classes)
            classes = torch.searchsorted(active, classes)
            weight = weight[active]
        logits = F.linear(x, F.normalize(weight)).clamp(-1, 1)
        logits[samples, classes] -= self.loss.margin
        return _CrossEntropy.apply(logits * self.loss.scale, samples, classes)

    def update(self, lr: float) -> None:
        """Update all rows by a step of the optimizer, and drop the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return the rows and, after the first update, the optimizer's moments, by name, [c, D] each."""
        state = self.optimizer.state[self.weight]
        moments = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and tensor.ndim == 2}
        return {"weight": self.weight.detach()} | moments

    def _sampled(self, positives: Tensor) -> Tensor:
        """Return the active rows, ascending: the batch's, and random others up to the rate."""
        positives = positives.unique()
        count = int(self.sample_rate * len(self.shard))
        if count <= len(positives):
            return positives
        drawn = torch.rand(len(self.shard), generator=self._generator).to(self.weight.device)
        drawn[positives] = 2.0
        return drawn.topk(count).indices.sort().values


class _Gather(torch.autograd.Function):
    """Gather the embeddings of all ranks, [b, D] to [B, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather_rows(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_scatter_rows(gradient) * dist.get_world_size()


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits [B, n] whose columns are sharded over the ranks; the logits are overwritten.

    `samples`, `classes`: row and column of each target that is on this rank.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, samples: Tensor, classes: Tensor) -> Tensor:
        targets = logits.new_zeros(len(logits))
        targets[samples] = logits[samples, classes]
        # A rank may have no classes.
        largest = logits.amax(1) if logits.shape[1] else torch.full_like(targets, -torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        logits.sub_(largest[:, None]).exp_()
        total = logits.sum(1)
        dist.all_reduce(total)
        dist.all_reduce(targets)
        logits.div_(total[:, None])
        ctx.save_for_backward(logits, samples, classes)
        return (total.log() + largest - targets).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        probabilities, samples, classes = ctx.saved_tensors
        probabilities[samples, classes] -= 1
        return probabilities.mul_(gradient / len(probabilities)), None, None
