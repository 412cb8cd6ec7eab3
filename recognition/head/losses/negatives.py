"""What becomes of the other classes' cosines: the logits that stand in the loss, element by element.

Each maps cosines [B, n] between embeddings and rows of other classes to logits [B, n], and gives the derivative of
the one by the other. `hard_boundary` [B] is what a negative of that sample is held against, for the losses that
have one.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Negatives(Protocol):
    """Logits of the other classes."""

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        """[B, n] from `cosine` [B, n], which stays as it is."""
        ...

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor | float:
        """Derivative of the logits by the cosines: [B, n], or one number."""
        ...


@dataclass(frozen=True)
class AffineNegatives:
    """`scale cosine + bias`."""

    scale: Tensor | float
    bias: Tensor | float = 0.0

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        scaled = cosine * self.scale
        return scaled if isinstance(self.bias, float) and self.bias == 0 else scaled.add_(self.bias)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor | float:
        return self.scale


@dataclass(frozen=True)
class CurricularNegatives:
    """CurricularFace (Huang et al. 2020, arXiv 2004.00288): beyond the anchor `s c (t + c)`, else `s c`."""

    scale: float
    t: Tensor

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(_beyond(cosine, hard_boundary), cosine * (self.t + cosine), cosine)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(_beyond(cosine, hard_boundary), self.t + 2 * cosine, 1.0)


@dataclass(frozen=True)
class MVSoftmaxNegatives:
    """MV-Softmax (Wang et al. 2020, arXiv 1912.00833): beyond the anchor `s (w c + w - 1)`, else `s c`."""

    scale: float
    weight: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        hard = self.weight * cosine + (self.weight - 1)
        return self.scale * torch.where(_beyond(cosine, hard_boundary), hard, cosine)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(_beyond(cosine, hard_boundary), self.weight, 1.0)


@dataclass(frozen=True)
class CircleNegatives:
    """Circle loss (Sun et al. 2020, arXiv 2002.10857): `s [c + m]+ (c - m)`, the weight in brackets a constant."""

    scale: float
    margin: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.derivative(cosine, hard_boundary) * (cosine - self.margin)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * (cosine + self.margin).clamp(min=0)


@dataclass(frozen=True)
class SphereFaceRNegatives:
    """SphereFace-R v2 (Liu et al. 2022, arXiv 2109.05565): `s cos(theta / m)`."""

    scale: float
    margin: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.cos(_angle(cosine) / self.margin)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        angle = _angle(cosine)
        return self.scale / self.margin * torch.sin(angle / self.margin) / torch.sin(angle)


@dataclass(frozen=True)
class SphereFace2Negatives:
    """SphereFace2 (Wen et al. 2022, arXiv 2108.01513): `r (g(c) + m) + b` with `g(c) = 2 ((c + 1) / 2)^t - 1`."""

    scale: float
    margin: float
    exponent: float
    bias: Tensor

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * (similarity(cosine, self.exponent) + self.margin) + self.bias

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * self.exponent * _half(cosine) ** (self.exponent - 1)


@dataclass(frozen=True)
class FilteredNegatives:
    """Inter-class filtering (An et al. 2022, arXiv 2203.15565) of cosines beyond `threshold`.

    They are left out of the sum, or with `zero`, as in InsightFace's arcface_torch, count as cosines of 0.
    """

    inner: Negatives
    threshold: float
    zero: bool

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        near = cosine > self.threshold
        if self.zero:
            return self.inner.logits(cosine.masked_fill(near, 0), hard_boundary)
        return self.inner.logits(cosine, hard_boundary).masked_fill(near, -torch.inf)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return torch.where(cosine > self.threshold, 0.0, self.inner.derivative(cosine, hard_boundary))


def similarity(cosine: Tensor, exponent: float) -> Tensor:
    """SphereFace2's g(c) = 2 ((c + 1) / 2)^t - 1."""
    return 2 * _half(cosine) ** exponent - 1


def _half(cosine: Tensor) -> Tensor:
    """(c + 1) / 2, where rounding may have brought c below -1."""
    return ((cosine + 1) / 2).clamp(min=torch.finfo(cosine.dtype).tiny)


def _angle(cosine: Tensor) -> Tensor:
    """The angle, kept off 0 and pi, where its sine divides."""
    edge = 1 - torch.finfo(cosine.dtype).eps
    return torch.acos(cosine.clamp(-edge, edge))


def _beyond(cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
    if hard_boundary is None:
        raise ValueError("the targets' cosines are needed before the negatives'")
    return cosine > hard_boundary[:, None]
