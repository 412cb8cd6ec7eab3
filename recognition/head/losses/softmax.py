"""Losses that are a softmax over all classes, where a margin on the target is not all there is to them."""

import math

import torch
from torch import Tensor

from recognition import config
from recognition.head.losses import margins
from recognition.head.losses.base import Loss, Targets
from recognition.head.losses.negatives import (
    AffineNegatives,
    CircleNegatives,
    CurricularNegatives,
    MVSoftmaxNegatives,
    Negatives,
    SphereFaceRNegatives,
)
from recognition.randomness import splitmix64


class Softmax(Loss):
    """The textbook softmax: `x . w + b`."""

    unit_embeddings = False
    unit_rows = False


class SphereFace(Loss):
    """SphereFace: logits grow with the embedding's norm."""

    unit_embeddings = False
    reads_norms = True

    def __init__(self, settings: config.SphereFace) -> None:
        super().__init__(None)
        self._settings = settings

    def target(self, targets: Targets) -> Tensor:
        settings = self._settings
        blend = max(settings.lambda_end, settings.lambda_start / (1 + settings.lambda_decay * targets.step))
        norm = targets.norm.clamp(min=1e-12)
        factor = 1 + targets.margin_scale * (settings.margin - 1)
        return norm * margins.sphereface(targets.product / norm, factor, blend)


class DividedNegatives(Loss):
    """SphereFace-R v2."""

    def __init__(self, settings: config.SphereFaceR) -> None:
        super().__init__(settings.scale, lambda targets: targets.product)
        self._factor = settings.margin

    def negatives(self, margin_scale: float) -> Negatives:
        return SphereFaceRNegatives(self.scale or 1.0, 1 + margin_scale * (self._factor - 1))


class AdaFace(Loss):
    """AdaFace: margins follow the norms' place in a running mean and deviation."""

    def __init__(self, settings: config.AdaFace, device: torch.device) -> None:
        super().__init__(settings.scale)
        self._settings = settings
        self.state = {
            "mean": torch.tensor(20.0, device=device),
            "deviation": torch.tensor(100.0, device=device),
        }

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        norm = norm.clamp(0.001, 100)
        _blend(self.state["mean"], norm.mean(), self._settings.momentum)
        if len(norm) > 1:
            _blend(self.state["deviation"], norm.std(), self._settings.momentum)

    def target(self, targets: Targets) -> Tensor:
        norm = targets.norm.detach().clamp(0.001, 100)
        spread = (self.state["deviation"] + 1e-3) / self._settings.concentration
        quality = ((norm - self.state["mean"]) / spread).clamp(-1, 1)
        margin = targets.margin_scale * self._settings.margin
        return self._settings.scale * margins.adaface(targets.product, quality, margin)


class MagFace(Loss):
    """MagFace: margin and a pull on the norm, both functions of the norm and with a gradient through it."""

    reads_norms = True

    def __init__(self, settings: config.MagFace) -> None:
        super().__init__(settings.scale)
        self._settings = settings

    def target(self, targets: Targets) -> Tensor:
        s = self._settings
        slope = (s.upper_margin - s.lower_margin) / (s.upper_norm - s.lower_norm)
        margin = slope * (self._clamped(targets) - s.lower_norm) + s.lower_margin
        return s.scale * margins.arcface(targets.product, targets.margin_scale * margin)

    def __call__(self, total: Tensor, targets: Targets) -> Tensor:
        norm = self._clamped(targets)
        pull = norm / self._settings.upper_norm**2 + 1 / norm
        return super().__call__(total, targets) + self._settings.norm_weight * pull

    def _clamped(self, targets: Targets) -> Tensor:
        return targets.norm.clamp(self._settings.lower_norm, self._settings.upper_norm)


class ElasticFace(Loss):
    """ElasticFace: margins drawn anew in each step, the same on all ranks."""

    def __init__(self, settings: config.ElasticFace, seed: int) -> None:
        super().__init__(settings.scale)
        self._settings, self._seed = settings, seed

    def draw(self, step: int, count: int, device: torch.device) -> Tensor:
        """The margins [count] of a step, keyed by the seed and the step."""
        generator = torch.Generator(device)
        generator.manual_seed(splitmix64(splitmix64(self._seed) ^ step) % (1 << 63))
        normal = torch.randn(count, generator=generator, device=device)
        return self._settings.margin + self._settings.deviation * normal

    def target(self, targets: Targets) -> Tensor:
        cosine = targets.product
        margin = self.draw(targets.step, len(cosine), cosine.device)
        if self._settings.plus:
            # The peers sort by what the ranks' inverse says; the paper gives the smallest margin to the largest cosine.
            rank = cosine.detach().argsort(descending=True).argsort()
            margin = margin.sort().values[rank]
        margin = targets.margin_scale * margin
        bent = margins.arcface(cosine, margin) if self._settings.base == "arcface" else cosine - margin
        return self._settings.scale * bent


class AdaCos(Loss):
    """AdaCos: the scale is a function of the batch's angles and of the sum over its negatives."""

    sums_twice = True

    def __init__(self, num_classes: int, device: torch.device) -> None:
        super().__init__(None)
        start = math.sqrt(2) * math.log(max(num_classes - 1, 2))
        self.state = {"scale": torch.tensor(start, device=device)}

    def observe_lse(self, lse: Tensor, cosine: Tensor) -> None:
        mean = torch.logsumexp(lse, 0) - math.log(len(lse))
        median = torch.acos(cosine.clamp(-1, 1)).median().clamp(max=math.pi / 4)
        scale = mean / median.cos()
        self.state["scale"].copy_(torch.where(scale.isfinite() & (scale > 0), scale, self.state["scale"]))

    def negatives(self, margin_scale: float) -> Negatives:
        return AffineNegatives(self.state["scale"].clone())

    def target(self, targets: Targets) -> Tensor:
        return self.state["scale"] * targets.product


class CurricularFace(Loss):
    """CurricularFace: negatives beyond the bent target grow with a running mean of the targets' cosines."""

    targets_first = True

    def __init__(self, settings: config.CurricularFace, device: torch.device) -> None:
        super().__init__(settings.scale)
        self._settings = settings
        self.state = {"t": torch.tensor(0.0, device=device)}

    @property
    def bound(self) -> float:
        return 2 * self._settings.scale

    def observe(self, cosine: Tensor, norm: Tensor) -> None:
        _blend(self.state["t"], cosine.mean(), self._settings.momentum)

    def negatives(self, margin_scale: float) -> Negatives:
        return CurricularNegatives(self._settings.scale, self.state["t"].clone())

    def hard_boundary(self, targets: Targets) -> Tensor:
        cosine = targets.product.detach()
        return torch.cos(torch.acos(cosine.clamp(-1, 1)) + targets.margin_scale * self._settings.margin)

    def target(self, targets: Targets) -> Tensor:
        return self._settings.scale * margins.arcface(targets.product, targets.margin_scale * self._settings.margin)


class MVSoftmax(Loss):
    """MV-Softmax: negatives beyond the bent target are made larger."""

    targets_first = True

    def __init__(self, settings: config.MVSoftmax) -> None:
        super().__init__(settings.scale)
        self._settings = settings

    @property
    def bound(self) -> float:
        return (2 * self._settings.weight - 1) * self._settings.scale

    def negatives(self, margin_scale: float) -> Negatives:
        return MVSoftmaxNegatives(self._settings.scale, self._settings.weight)

    def hard_boundary(self, targets: Targets) -> Tensor:
        return (self.target(targets) / self._settings.scale).detach()

    def target(self, targets: Targets) -> Tensor:
        margin = targets.margin_scale * self._settings.margin
        bent = (
            margins.arcface(targets.product, margin) if self._settings.base == "arcface" else targets.product - margin
        )
        return self._settings.scale * bent


class Circle(Loss):
    """Circle loss with class weights; the weights of the logits are constants in the gradient."""

    def __init__(self, settings: config.Circle) -> None:
        super().__init__(settings.scale)
        self._settings = settings

    @property
    def bound(self) -> None:
        return None

    def negatives(self, margin_scale: float) -> Negatives:
        return CircleNegatives(self._settings.scale, self._settings.margin)

    def target(self, targets: Targets) -> Tensor:
        cosine, margin = targets.product, self._settings.margin
        weight = (1 + margin - cosine.detach()).clamp(min=0)
        return self._settings.scale * weight * (cosine - (1 - margin))


def _blend(running: Tensor, new: Tensor, weight: float) -> None:
    """A running mean, in place. What is not finite does not enter it."""
    running.copy_(torch.where(new.isfinite(), torch.lerp(running, new, weight), running))
