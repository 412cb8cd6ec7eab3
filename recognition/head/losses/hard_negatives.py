"""Softmax losses in which hard negatives, those with a large cosine, count more.

c is a cosine, theta its angle, s the scale, m the margin; y is the sample's own class, j any other.
"""

from typing import final

import torch
from torch import Tensor

from recognition import config
from recognition.head.losses import margins
from recognition.head.losses.base import CrossEntropy, Targets
from recognition.head.losses.negatives import CircleNegatives, CurricularNegatives, MVSoftmaxNegatives, Negatives


@final
class CurricularFaceLoss(CrossEntropy):
    """CurricularFace (Huang et al. 2020, arXiv 2004.00288): `z_y = s cos(theta_y + m)`, and `z_j = s c_j (t + c_j)`
    where `c_j > cos(theta_y + m)`, else `s c_j`.

    t is a running mean of the targets' cosines, so hard negatives gain weight as training goes.
    """

    settings: config.CurricularFace
    targets_first = True

    def initial_running(self) -> dict[str, float]:
        return {"t": 0.0}

    @property
    def bound(self) -> float:
        return 2 * self.settings.scale

    def next_running(self, cosine: Tensor, norm: Tensor) -> dict[str, Tensor]:
        return {"t": torch.lerp(self.running["t"], cosine.mean(), self.settings.momentum)}

    def negatives(self, margin_scale: float) -> Negatives:
        return CurricularNegatives(self.settings.scale, self.running["t"].clone())

    def hard_boundary(self, targets: Targets) -> Tensor:
        cosine = targets.product.detach()
        return torch.cos(torch.acos(cosine.clamp(-1, 1)) + targets.margin_scale * self.settings.margin)

    def target(self, targets: Targets) -> Tensor:
        return self.settings.scale * margins.arcface(targets.product, targets.margin_scale * self.settings.margin)


@final
class MVSoftmaxLoss(CrossEntropy):
    """MV-Softmax (Wang et al. 2020, arXiv 1912.00833): `z_y = s (c_y - m)` or `s cos(theta_y + m)`, and
    `z_j = s (w c_j + w - 1)` where `s c_j > z_y`, else `s c_j`.
    """

    settings: config.MVSoftmax
    targets_first = True

    @property
    def bound(self) -> float:
        return (2 * self.settings.weight - 1) * self.settings.scale

    def negatives(self, margin_scale: float) -> Negatives:
        return MVSoftmaxNegatives(self.settings.scale, self.settings.weight)

    def hard_boundary(self, targets: Targets) -> Tensor:
        return (self.target(targets) / self.settings.scale).detach()

    def target(self, targets: Targets) -> Tensor:
        margin = targets.margin_scale * self.settings.margin
        return self.settings.scale * margins.of_base(self.settings.base, targets.product, margin)


@final
class CircleLoss(CrossEntropy):
    """Circle loss with class weights (Sun et al. 2020, arXiv 2002.10857): `z_y = s [1 + m - c_y]+ (c_y - 1 + m)`,
    `z_j = s [c_j + m]+ (c_j - m)`.

    The factors in brackets, `[a]+ = max(a, 0)`, are constants in the gradient. The margin is not warmed up.
    """

    settings: config.Circle

    @property
    def bound(self) -> None:
        return None

    def negatives(self, margin_scale: float) -> Negatives:
        return CircleNegatives(self.settings.scale, self.settings.margin)

    def target(self, targets: Targets) -> Tensor:
        cosine, margin = targets.product, self.settings.margin
        weight = (1 + margin - cosine.detach()).clamp(min=0)
        return self.settings.scale * weight * (cosine - (1 - margin))
