"""Softmax losses whose margin or scale is not constant: it follows the norms, chance, or the batch.

c is a cosine, theta its angle, s the scale, m the margin, |x| the embedding's norm; y is the sample's own class, j any
other.
"""

import math
from typing import final

import torch
from torch import Tensor

from recognition import config
from recognition.head.losses import margins
from recognition.head.losses.base import CrossEntropy, Loss, MarginSoftmax, Targets, cross_entropy
from recognition.head.losses.negatives import AffineNegatives, Negatives
from recognition.randomness import splitmix64


@final
class AdaFaceLoss(MarginSoftmax):
    """AdaFace (Kim et al. 2022, arXiv 2204.00964): `z_y = s (cos(theta_y - m q) - (m + m q))`, `z_j = s c_j`.

    The quality `q = (|x| - mean) / (deviation / h)` is clamped to [-1, 1]; mean and deviation of the norms are running
    ones. It is a constant in the gradient.
    """

    settings: config.AdaFace

    def initial_running(self) -> dict[str, float]:
        return {"mean": 20.0, "deviation": 100.0}

    def next_running(self, cosine: Tensor, norm: Tensor) -> dict[str, Tensor]:
        norm, momentum = norm.clamp(0.001, 100), self.settings.momentum
        found = {"mean": torch.lerp(self.running["mean"], norm.mean(), momentum)}
        if len(norm) > 1:
            found["deviation"] = torch.lerp(self.running["deviation"], norm.std(), momentum)
        return found

    def target(self, targets: Targets) -> Tensor:
        norm = targets.norm.detach().clamp(0.001, 100)
        spread = (self.running["deviation"] + 1e-3) / self.settings.concentration
        quality = ((norm - self.running["mean"]) / spread).clamp(-1, 1)
        margin = targets.margin_scale * self.settings.margin
        return self.settings.scale * margins.adaface(targets.product, quality, margin)


@final
class MagFaceLoss(Loss):
    """MagFace (Meng et al. 2021, arXiv 2103.06627): `z_y = s cos(theta_y + m(a))`, `z_j = s c_j` and
    `loss = log(1 + exp(lse - z_y)) + lambda_g g(a)`.

    `a = |x|`, clamped to [l_a, u_a]; m(a) is linear from `lower_margin` at l_a to `upper_margin` at u_a, and
    `g(a) = a / u_a^2 + 1 / a`. Both have a gradient through the norm.
    """

    settings: config.MagFace

    @property
    def bound(self) -> float:
        return self.settings.scale

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(self.settings.scale)

    def target(self, targets: Targets) -> Tensor:
        s = self.settings
        slope = (s.upper_margin - s.lower_margin) / (s.upper_norm - s.lower_norm)
        margin = slope * (self._clamped(targets) - s.lower_norm) + s.lower_margin
        return s.scale * margins.arcface(targets.product, targets.margin_scale * margin)

    def __call__(self, lse: Tensor, targets: Targets, /) -> Tensor:
        norm = self._clamped(targets)
        pull = norm / self.settings.upper_norm**2 + 1 / norm
        return cross_entropy(lse, self.target(targets)) + self.settings.norm_weight * pull

    def _clamped(self, targets: Targets) -> Tensor:
        return targets.norm.clamp(self.settings.lower_norm, self.settings.upper_norm)


@final
class ElasticFaceLoss(MarginSoftmax):
    """ElasticFace (Boutros et al. 2022, arXiv 2109.09416): `z_y = s cos(theta_y + m_i)` or `s (c_y - m_i)`, and
    `z_j = s c_j`.

    Each sample's margin m_i is drawn from N(m, deviation) anew in each step, equal on all ranks. ElasticFace+ gives the
    smallest of the batch's margins to the largest target cosine, and so on.
    """

    settings: config.ElasticFace

    def draw(self, step: int, count: int, device: torch.device) -> Tensor:
        """Draw the margins [count] of a step, keyed by the seed and the step."""
        generator = torch.Generator(device)
        generator.manual_seed(splitmix64(splitmix64(self.seed) ^ step) % (1 << 63))
        normal = torch.randn(count, generator=generator, device=device)
        return self.settings.margin + self.settings.deviation * normal

    def target(self, targets: Targets) -> Tensor:
        cosine = targets.product
        margin = self.draw(targets.step, len(cosine), cosine.device)
        if self.settings.plus:
            # The peers sort by what the ranks' inverse says; the paper gives the smallest margin to the largest cosine.
            rank = cosine.detach().argsort(descending=True).argsort()
            margin = margin.sort().values[rank]
        margin = targets.margin_scale * margin
        return self.settings.scale * margins.of_base(self.settings.base, cosine, margin)


@final
class AdaCosLoss(CrossEntropy):
    """AdaCos (Zhang et al. 2019, arXiv 1905.00292): `z_y = s c_y`, `z_j = s c_j` with a running scale.

    In each step `s = log(mean_i sum_j exp(s c_ij)) / cos(min(pi / 4, median_i theta_iy))`, from the s before it, which
    starts as `sqrt(2) log(C - 1)`.
    """

    settings: config.AdaCos
    sums_twice = True

    def initial_running(self) -> dict[str, float]:
        return {"scale": math.sqrt(2) * math.log(max(self.num_classes - 1, 2))}

    @property
    def bound(self) -> None:
        return None

    def next_running_from_lse(self, lse: Tensor, cosine: Tensor) -> dict[str, Tensor]:
        mean = torch.logsumexp(lse, 0) - math.log(len(lse))
        median = torch.acos(cosine.clamp(-1, 1)).median().clamp(max=math.pi / 4)
        scale = mean / median.cos()
        return {"scale": torch.where(scale > 0, scale, self.running["scale"])}

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(self.running["scale"].clone())

    def target(self, targets: Targets) -> Tensor:
        return self.running["scale"] * targets.product
