"""Softmax losses with a constant margin, or none: the target's logit is a function of its cosine alone.

c is a cosine, theta its angle, s the scale, m the margin; y is the sample's own class, j any other.
"""

from typing import final

from torch import Tensor

from recognition import config
from recognition.head.losses import margins
from recognition.head.losses.base import CrossEntropy, MarginSoftmax, Targets
from recognition.head.losses.negatives import AffineNegatives, Negatives, SphereFaceRNegatives


@final
class SoftmaxLoss(MarginSoftmax):
    """Textbook softmax: `z_y = x . w_y + b_y`, `z_j = x . w_j + b_j`."""

    settings: config.Softmax

    def target(self, targets: Targets) -> Tensor:
        return targets.product


@final
class NormFaceLoss(MarginSoftmax):
    """NormFace (Wang et al. 2017, arXiv 1704.06369): `z_y = s c_y`, `z_j = s c_j`."""

    settings: config.NormFace

    def target(self, targets: Targets) -> Tensor:
        return self.settings.scale * targets.product


@final
class CosFaceLoss(MarginSoftmax):
    """CosFace (Wang et al. 2018, arXiv 1801.09414): `z_y = s (c_y - m)`, `z_j = s c_j`."""

    settings: config.CosFace

    def target(self, targets: Targets) -> Tensor:
        return self.settings.scale * margins.cosface(targets.product, targets.margin_scale * self.settings.margin)


@final
class ArcFaceLoss(MarginSoftmax):
    """ArcFace (Deng et al. 2019, arXiv 1801.07698): `z_y = s cos(theta_y + m)`, `z_j = s c_j`."""

    settings: config.ArcFace

    def target(self, targets: Targets) -> Tensor:
        turned = margins.arcface_straight_through if self.settings.straight_through else margins.arcface
        return self.settings.scale * turned(targets.product, targets.margin_scale * self.settings.margin)


@final
class CombinedLoss(MarginSoftmax):
    """Combined margin (Deng et al. 2019, arXiv 1801.07698): `z_y = s (cos(m1 theta_y + m2) - m3)`, `z_j = s c_j`."""

    settings: config.Combined

    def target(self, targets: Targets) -> Tensor:
        share, m1, m2, m3 = targets.margin_scale, self.settings.m1, self.settings.m2, self.settings.m3
        return self.settings.scale * margins.combined(targets.product, 1 + share * (m1 - 1), share * m2, share * m3)


@final
class SphereFaceLoss(MarginSoftmax):
    """SphereFace (Liu et al. 2017, arXiv 1704.08063): `z_y = |x| (psi(theta_y) + lambda c_y) / (1 + lambda)`,
    `z_j = |x| c_j`.

    psi continues `cos(m theta)` so that it falls; lambda anneals with the steps.
    """

    settings: config.SphereFace

    def target(self, targets: Targets) -> Tensor:
        settings = self.settings
        blend = max(settings.lambda_end, settings.lambda_start / (1 + settings.lambda_decay * targets.step))
        norm = targets.norm.clamp(min=1e-12)
        factor = 1 + targets.margin_scale * (settings.margin - 1)
        return norm * margins.sphereface(targets.product / norm, factor, blend)


@final
class SphereFaceRLoss(CrossEntropy):
    """SphereFace-R (Liu et al. 2022, arXiv 2109.05565).

    Version 1: `z_y = s cos(min(m theta_y, pi))`, `z_j = s c_j`. Version 2: `z_y = s c_y`, `z_j = s cos(theta_j / m)`.
    """

    settings: config.SphereFaceR

    @property
    def bound(self) -> float:
        return self.settings.scale

    def negatives(self, margin_scale: float) -> Negatives:
        if self.settings.version == 1:
            return AffineNegatives(self.settings.scale)
        return SphereFaceRNegatives(self.settings.scale, self._factor(margin_scale))

    def target(self, targets: Targets) -> Tensor:
        if self.settings.version == 2:
            return self.settings.scale * targets.product
        return self.settings.scale * margins.sphereface_r(targets.product, self._factor(targets.margin_scale))

    def _factor(self, margin_scale: float) -> float:
        return 1 + margin_scale * (self.settings.margin - 1)
