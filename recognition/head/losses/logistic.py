"""Losses without a normaliser: a binary decision for each class, with one learned bias that all classes share.

c is a cosine, s or r the scale, m the margin, b the bias; y is the sample's own class, j any other.
"""

import math
from typing import final

import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.head.losses.base import Loss, Targets
from recognition.head.losses.negatives import AffineNegatives, Negatives, SphereFace2Negatives, similarity


class BinaryCrossEntropy(Loss):
    """Binary cross-entropies of all classes, whose logits share a learned bias b.

    Up to weights, `loss = log(1 + exp(-z_y)) + sum_j log(1 + exp(z_j))`.
    """

    logistic = True

    @property
    def bound(self) -> float | None:
        return self.scale

    def negatives_loss(self, sums: Tensor, sign: float) -> Tensor:
        """Return `sum_j log(1 + exp(z_j))` [B], where `z_j` contains `sign b`, with its gradient by b.

        `sums` [B, 2]: its value, and the sum of its derivatives by z_j.
        """
        bias = self.learned["bias"]
        return sums[:, 0] + sign * (bias - bias.detach()) * sums[:, 1].detach()


@final
class SphereFace2Loss(BinaryCrossEntropy):
    """SphereFace2 (Wen et al. 2022, arXiv 2108.01513): `z_y = r (g(c_y) - m) + b`, `z_j = r (g(c_j) + m) + b` and
    `loss = w / r (lambda log(1 + exp(-z_y)) + (1 - lambda) sum_j log(1 + exp(z_j)))`.

    `g(c) = 2 ((c + 1) / 2)^t - 1`. b starts where the loss is least if all cosines are 0.
    """

    settings: config.SphereFace2

    def initial_learned(self) -> dict[str, float]:
        s, r = self.settings, self.settings.scale
        odds = s.balance / ((1 - s.balance) * max(self.num_classes - 1, 1))
        positive = r * (2 * 0.5**s.exponent - 1 - s.margin)
        negative = r * (2 * 0.5**s.exponent - 1 + s.margin)
        root = math.sqrt((1 - odds) ** 2 + 4 * odds * math.exp(positive - negative))
        return {"bias": math.log(2 * odds) - negative - math.log(1 - odds + root)}

    def negatives(self, margin_scale: float) -> Negatives:
        s = self.settings
        return SphereFace2Negatives(s.scale, margin_scale * s.margin, s.exponent, self.learned["bias"].detach().clone())

    def target(self, targets: Targets) -> Tensor:
        s = self.settings
        near = similarity(targets.product, s.exponent)
        return s.scale * (near - targets.margin_scale * s.margin) + self.learned["bias"]

    def __call__(self, sums: Tensor, targets: Targets, /) -> Tensor:
        s = self.settings
        own = F.softplus(-self.target(targets))
        return s.weight / s.scale * (s.balance * own + (1 - s.balance) * self.negatives_loss(sums, 1.0))


@final
class UCELoss(BinaryCrossEntropy):
    """Unified cross-entropy of UniFace (Zhou et al. 2023, ICCV): `z_y = s (c_y - m) - b`, `z_j = s c_j - b` and
    `loss = log(1 + exp(-z_y)) + sum_j log(1 + exp(z_j))`.

    b starts as `log(10 C)`.
    """

    settings: config.UCE

    def initial_learned(self) -> dict[str, float]:
        return {"bias": math.log(10 * self.num_classes)}

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(self.settings.scale, -self.learned["bias"].detach())

    def target(self, targets: Targets) -> Tensor:
        cosine, margin = targets.product, targets.margin_scale * self.settings.margin
        return self.settings.scale * (cosine - margin) - self.learned["bias"]

    def __call__(self, sums: Tensor, targets: Targets, /) -> Tensor:
        return F.softplus(-self.target(targets)) + self.negatives_loss(sums, -1.0)
