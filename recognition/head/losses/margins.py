"""Target margins: pure functions of the target's cosine [B] and a margin, one number or [B].

Their value [B] replaces the cosine in the logit, before the scale.

All are differentiable at every cosine, |cosine| = 1 included, and keep NaN as NaN. theta is the cosine's angle.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def arcface(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return `cos(theta + m)`: ArcFace (Deng et al. 2019, arXiv 1801.07698).

    Beyond theta + m = pi, where the cosine would rise again, it is `cos(theta) - m sin(m)`, the authors' guard.
    The gradient is the true one, `sin(theta + m) / sin(theta)`.
    """
    # Filled on the device, as copying a number from the host to a GPU would make the host wait.
    margin = margin.to(cosine.dtype) if isinstance(margin, Tensor) else cosine.new_full((), margin)
    turned = cosine * margin.cos() - sine(cosine) * margin.sin()
    return torch.where(cosine > -margin.cos(), turned, cosine - margin * margin.sin())


def cosface(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return `cos(theta) - m`: CosFace (Wang et al. 2018, arXiv 1801.09414)."""
    return cosine - margin


def of_base(base: Literal["arcface", "cosface"], cosine: Tensor, margin: Tensor | float) -> Tensor:
    """Return ArcFace's or CosFace's value, for losses that build on either."""
    return arcface(cosine, margin) if base == "arcface" else cosface(cosine, margin)


def arcface_straight_through(cosine: Tensor, margin: float) -> Tensor:
    """Return `cos(theta + m)`, unguarded and with 1 for its gradient: ArcFace as in InsightFace's arcface_torch."""
    value = torch.cos(torch.acos(cosine.detach().clamp(-1, 1)) + margin)
    return value + (cosine - cosine.detach())


def combined(cosine: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    """Return `cos(m1 theta + m2) - m3`, with its true gradient: combined margin (Deng et al. 2019, section 2.2).

    Where the angle exceeds pi it is continued by `falling`. In that region alone m1 = 1, m3 = 0 differs from `arcface`.
    """
    return falling(m1 * angle(cosine) + m2) - m3


def sphereface(cosine: Tensor, margin: float, blend: float) -> Tensor:
    """Return `(psi(theta) + lambda cos(theta)) / (1 + lambda)`, with psi = `falling(m theta)`: SphereFace (Liu et al.
    2017, arXiv 1704.08063).

    `blend`: lambda.
    """
    return cosine + (falling(margin * angle(cosine)) - cosine) / (1 + blend)


def sphereface_r(cosine: Tensor, margin: float) -> Tensor:
    """Return `cos(min(m theta, pi))`: SphereFace-R v1 (Liu et al. 2022, arXiv 2109.05565)."""
    return torch.cos((margin * angle(cosine)).clamp(max=math.pi))


def adaface(cosine: Tensor, quality: Tensor, margin: float) -> Tensor:
    """Return `cos(theta - m q) - (m + m q)`: AdaFace (Kim et al. 2022, arXiv 2204.00964).

    `quality`: q [B], in [-1, 1]. The turned angle is kept in [1e-3, pi - 1e-3], with no gradient beyond.
    """
    turned = (angle(cosine) - margin * quality).clamp(1e-3, math.pi - 1e-3)
    return torch.cos(turned) - (margin + margin * quality)


def falling(turned: Tensor) -> Tensor:
    """Return `(-1)^k cos(a) - 2k` with k = floor(a / pi): SphereFace's continuation of cos(a) to angles [B] beyond pi.

    It is continuous and falls everywhere.
    """
    turns = torch.floor(turned.detach() / math.pi)
    return (1 - 2 * (turns % 2)) * torch.cos(turned) - 2 * turns


def angle(cosine: Tensor) -> Tensor:
    """Return the angle, with a gradient that is finite everywhere."""
    return torch.atan2(sine(cosine), cosine)


def sine(cosine: Tensor) -> Tensor:
    """Return the sine of the angle, in (0, 1]. Its floor keeps 1 / sine, and so every gradient, finite."""
    return (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
