"""Losses without a normaliser: each class is decided by itself, and all share one learned bias."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.head.losses.base import Loss, Targets
from recognition.head.losses.negatives import AffineNegatives, Negatives, SphereFace2Negatives, similarity


class Logistic(Loss):
    """A loss for each class by itself, with a bias that all classes share and that is learned."""

    logistic = True

    def __init__(self, scale: float, bias: float, device: torch.device) -> None:
        super().__init__(scale)
        self.state = {"bias": torch.tensor(bias, device=device)}
        self.learned = ("bias",)

    def _others(self, total: Tensor, sign: float) -> Tensor:
        """The sum over the negatives, to whose logits `sign bias` is added, with its gradient by the bias."""
        bias = self.state["bias"]
        return total[:, 0] + sign * (bias - bias.detach()) * total[:, 1].detach()


class SphereFace2(Logistic):
    """SphereFace2: a binary classification for each class."""

    def __init__(self, settings: config.SphereFace2, num_classes: int, device: torch.device) -> None:
        s, r = settings, settings.scale
        odds = s.balance / ((1 - s.balance) * max(num_classes - 1, 1))
        positive = r * (2 * 0.5**s.exponent - 1 - s.margin)
        negative = r * (2 * 0.5**s.exponent - 1 + s.margin)
        root = math.sqrt((1 - odds) ** 2 + 4 * odds * math.exp(positive - negative))
        super().__init__(r, math.log(2 * odds) - negative - math.log(1 - odds + root), device)
        self._settings = settings

    def negatives(self, margin_scale: float) -> Negatives:
        s = self._settings
        return SphereFace2Negatives(s.scale, margin_scale * s.margin, s.exponent, self.state["bias"].detach().clone())

    def target(self, targets: Targets) -> Tensor:
        s = self._settings
        near = similarity(targets.product, s.exponent)
        return s.scale * (near - targets.margin_scale * s.margin) + self.state["bias"]

    def __call__(self, total: Tensor, targets: Targets) -> Tensor:
        s = self._settings
        own = F.softplus(-self.target(targets))
        return s.weight / s.scale * (s.balance * own + (1 - s.balance) * self._others(total, 1.0))


class UCE(Logistic):
    """UniFace's unified cross-entropy (Zhou et al. 2023, ICCV): logits `s cos(theta) - b`."""

    def __init__(self, settings: config.UCE, num_classes: int, device: torch.device) -> None:
        super().__init__(settings.scale, math.log(10 * num_classes), device)
        self._settings = settings

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(self._settings.scale, -self.state["bias"].detach())

    def target(self, targets: Targets) -> Tensor:
        return (
            self._settings.scale * (targets.product - targets.margin_scale * self._settings.margin) - self.state["bias"]
        )

    def __call__(self, total: Tensor, targets: Targets) -> Tensor:
        return F.softplus(-self.target(targets)) + self._others(total, -1.0)
