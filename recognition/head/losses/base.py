"""What a loss over classes is: what happens to vectors, with nothing known of shards or chunks.

A loss says what becomes of the other classes' cosines (`negatives`), and makes of their sum and of each sample's own
cosine the loss of each sample. Most are a softmax, for which the sum is that of exp(logit); those that are `logistic`
sum log(1 + exp(logit)). What a loss keeps between steps is in `state`, scalars that are equal on all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.losses.negatives import AffineNegatives, Negatives


@dataclass(frozen=True)
class Targets:
    """What all ranks know of a gathered batch and its own classes."""

    product: Tensor
    """[B], of embedding and row: the cosine, where the loss normalises both."""
    norm: Tensor
    """[B], of the embeddings."""
    margin_scale: float
    """Share of the margin, in [0, 1]."""
    step: int
    """Which step of the training it is."""


class Loss:
    """A softmax whose target is bent by a margin; the base of the others."""

    unit_embeddings = True
    unit_rows = True
    """Whether embeddings, and rows, count by their direction alone. Rows that do not have a bias."""
    logistic = False
    reads_norms = False
    """Whether the gradient by the embeddings' norms is wanted."""
    targets_first = False
    """Whether `observe` or the negatives need the targets' cosines, before anything is summed."""
    sums_twice = False
    """Whether `observe_lse` changes what is to be summed."""

    def __init__(self, scale: float | None, margin: Callable[[Targets], Tensor] | None = None) -> None:
        self.scale = scale
        self.state: dict[str, Tensor] = {}
        self.learned: tuple[str, ...] = ()
        """Names of the scalars in `state` that are moved along their gradient."""
        self._margin = margin

    @property
    def bound(self) -> float | None:
        """Largest possible logit of a negative; None where there is no useful bound."""
        return self.scale

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        """Bring the state up to a training step's batch before it is used: `cosine` and `norm` [B], detached."""

    def observe_lse(self, lse: Tensor, cosine: Tensor) -> None:
        """Likewise from the log of the first sum over the negatives, [B]."""

    def restore(self, state: dict[str, Tensor], where: Tensor) -> None:
        """Set the state back to `state`, where `where` (scalar bool) is true."""
        for name, value in state.items():
            self.state[name].copy_(torch.where(where, value, self.state[name]))

    def negatives(self, margin_scale: float) -> Negatives:
        """What becomes of the other classes' cosines."""
        return AffineNegatives(1.0 if self.scale is None else self.scale)

    def hard_boundary(self, targets: Targets) -> Tensor | None:
        """What the negatives are held against, [B]."""
        return None

    def target(self, targets: Targets) -> Tensor:
        """The target's logit [B], differentiable."""
        if self._margin is None:
            raise NotImplementedError
        bent = self._margin(targets)
        return bent if self.scale is None else self.scale * bent

    def __call__(self, total: Tensor, targets: Targets) -> Tensor:
        """Loss of each sample [B], differentiable by both.

        `total`: log of the sum of exp(logit) [B]; of a logistic loss [B, 2], the sums of log(1 + exp(logit)) and of
        its derivative by the logit.
        """
        return F.softplus(total - self.target(targets))
