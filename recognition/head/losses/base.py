"""Interface of a loss over classes: functions of [B] vectors, since sharding and chunking are the head's business.

For a sample with the cosines c_y to its own class and c_j to every other class j, a loss defines logits, and from
them the loss of the sample. With softmax cross-entropy:

    z_y = target(c_y),   z_j = negatives(c_j),   lse = log sum_j exp(z_j)
    loss = -log(exp(z_y) / (exp(z_y) + sum_j exp(z_j))) = log(1 + exp(lse - z_y))

so one number, `lse`, is all that the loss has to know of the classes that are spread over ranks and chunks. A
`logistic` loss decides for each class by itself, and has sum_j log(1 + exp(z_j)) in its place.

In a training step the head calls, with arguments that are equal on all ranks:

    1. `observe`, with the targets' cosines: here if the loss is `targets_first`, otherwise after 4
    2. `hard_boundary`, if the loss is `targets_first`
    3. `negatives`; the head sums over the classes and reduces the sums over the ranks
    4. `observe_lse`, if the loss `sums_twice`; then 2 and 3 again, with the running scalars that it has changed
    5. the loss itself, which calls `target`, and autograd by its arguments and by the `learned` scalars
    6. `restore`, which undoes 1 and 4 where the step is skipped because something was not finite

and in evaluation 2, 3 and 5. A class of losses is either abstract or final, and a final one declares the type of its
settings: `settings: config.CosFace` is how `build_loss` finds `CosFaceLoss`.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.head.losses.negatives import AffineNegatives, Negatives

BY_SETTINGS: dict[type, type["Loss"]] = {}
"""The final classes of losses by the type of their settings; filled as the classes are defined."""


@dataclass(frozen=True)
class Targets:
    """Facts of a gathered batch and its own classes that are known on all ranks."""

    product: Tensor
    """[B], products of embeddings and their classes' rows: cosines, where the loss normalises both."""
    norm: Tensor
    """[B], of the embeddings."""
    margin_scale: float
    """Share of the margin, in [0, 1]."""
    step: int
    """Number of the training step."""


class Loss(ABC):
    """Base of all losses over classes."""

    logistic = False
    """Whether the negatives' part is sum log(1 + exp(z_j)), instead of log sum exp(z_j)."""
    targets_first = False
    """Whether `hard_boundary` and `negatives` need the targets' cosines, before anything is summed."""
    sums_twice = False
    """Whether the negatives' logits depend on `lse` by way of `observe_lse`."""

    settings: config.Loss

    def __init__(self, settings: config.Loss, num_classes: int, *, seed: int, device: torch.device) -> None:
        self.settings, self.num_classes, self.seed = settings, num_classes, seed
        self.unit_embeddings, self.unit_rows = settings.unit_embeddings, settings.unit_rows
        self.scale = settings.scale if isinstance(settings, config.ScaledLoss) else None
        """s; None where there is no constant one."""
        self.running = {name: torch.tensor(value, device=device) for name, value in self.initial_running().items()}
        """Scalars that follow the batches, kept between steps and in checkpoints."""
        self.learned = {name: torch.tensor(value, device=device) for name, value in self.initial_learned().items()}
        """Scalars that the head's optimizer moves along their gradient."""

    def __init_subclass__(cls) -> None:
        kind = inspect.get_annotations(cls, eval_str=True).get("settings")
        if kind is not None and BY_SETTINGS.setdefault(kind, cls) is not cls:
            raise TypeError(f"two losses have settings {kind.__name__}: {BY_SETTINGS[kind].__name__}, {cls.__name__}")

    def initial_running(self) -> dict[str, float]:
        """Return the first values of the `running` scalars."""
        return {}

    def initial_learned(self) -> dict[str, float]:
        """Return the first values of the `learned` scalars."""
        return {}

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        """Update the running scalars by a training batch: the targets' `cosine` and embeddings' `norm`, [B]."""
        self._update(self.next_running(cosine, norm))

    def observe_lse(self, lse: Tensor, cosine: Tensor) -> None:
        """Update the running scalars by the first sum over the negatives: `lse` and the targets' `cosine`, [B]."""
        self._update(self.next_running_from_lse(lse, cosine))

    def next_running(self, cosine: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Return new values of running scalars, for `observe`. Values that are not finite are dropped."""
        return {}

    def next_running_from_lse(self, lse: Tensor, cosine: Tensor) -> dict[str, Tensor]:
        """Return new values of running scalars, for `observe_lse`. Values that are not finite are dropped."""
        return {}

    def restore(self, running: dict[str, Tensor], where: Tensor) -> None:
        """Set the running scalars back to `running` where `where` (scalar bool) is true."""
        for name, value in running.items():
            self.running[name].copy_(torch.where(where, value, self.running[name]))

    @property
    @abstractmethod
    def bound(self) -> float | None:
        """Largest possible logit of a negative; None where there is no useful bound."""

    @abstractmethod
    def negatives(self, margin_scale: float) -> Negatives:
        """Return z_j as a function of c_j, with the share `margin_scale` of the margin."""

    def hard_boundary(self, targets: Targets) -> Tensor | None:
        """Return the cosine [B] beyond which a negative of that sample is hard; None if the loss has no such thing."""
        return None

    @abstractmethod
    def target(self, targets: Targets) -> Tensor:
        """Return z_y [B], differentiable."""

    @abstractmethod
    def __call__(self, total: Tensor, targets: Targets, /) -> Tensor:
        """Return the loss of each sample [B], differentiable by both arguments.

        `total`: lse [B]; of a logistic loss [B, 2], the sums of log(1 + exp(z_j)) and of its derivative by z_j.
        """

    def _update(self, running: dict[str, Tensor]) -> None:
        for name, value in running.items():
            self.running[name].copy_(torch.where(value.isfinite(), value, self.running[name]))


class CrossEntropy(Loss):
    """Softmax cross-entropy over all classes: `loss = log(1 + exp(lse - z_y))`."""

    def __call__(self, lse: Tensor, targets: Targets, /) -> Tensor:
        return cross_entropy(lse, self.target(targets))


class MarginSoftmax(CrossEntropy):
    """Softmax cross-entropy whose margin is all in `z_y`; `z_j = s c_j`, and without a scale `z_j = x . w_j + b_j`."""

    @property
    def bound(self) -> float | None:
        return self.scale

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(1.0 if self.scale is None else self.scale)


def cross_entropy(lse: Tensor, target: Tensor) -> Tensor:
    """Return the softmax cross-entropy [B] of target logits [B] against the log-sum-exp of the negatives' [B]."""
    return F.softplus(lse - target)
