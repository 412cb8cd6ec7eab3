"""Target margins: what is done to the logit of a sample's own class.

Pure functions on vectors, which know nothing of shards or chunks: from the target's cosine [B], and a margin that is
one number or [B], to what takes the cosine's place, before the scale. All are differentiable at every cosine,
|cosine| = 1 included, and keep NaN as NaN.
"""

import math

import torch
from torch import Tensor


def arcface(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """ArcFace (Deng et al. 2019, arXiv 1801.07698): `cos(theta + m)`.

    Beyond theta + m = pi, where the cosine would rise again, it is `cos(theta) - m sin(m)`, the authors' guard.
    The gradient is the true one, `sin(theta + m) / sin(theta)`.
    """
    # Filled on the device: a GPU's host would wait for a number to be copied there.
    margin = margin.to(cosine.dtype) if isinstance(margin, Tensor) else cosine.new_full((), margin)
    turned = cosine * margin.cos() - sine(cosine) * margin.sin()
    return torch.where(cosine > -margin.cos(), turned, cosine - margin * margin.sin())


def arcface_straight_through(cosine: Tensor, margin: float) -> Tensor:
    """ArcFace as in InsightFace's arcface_torch: `cos(theta + m)` unguarded, with 1 for its gradient."""
    value = torch.cos(torch.acos(cosine.detach().clamp(-1, 1)) + margin)
    return value + (cosine - cosine.detach())


def combined(cosine: Tensor, m1: float, m2: float, m3: float) -> Tensor:
    """Combined margin (Deng et al. 2019, section 2.2): `cos(m1 theta + m2) - m3`, with its true gradient.

    Where the angle exceeds pi it is continued by `falling`. In that region alone m1 = 1, m3 = 0 differs from `arcface`.
    """
    return falling(m1 * angle(cosine) + m2) - m3


def sphereface(cosine: Tensor, margin: float, blend: float) -> Tensor:
    """SphereFace (Liu et al. 2017, arXiv 1704.08063): `cos(m theta)` continued by `falling`, blended with `cos(theta)`.

    `blend`: the paper's lambda, by which the cosine itself is weighted, against 1.
    """
    return cosine + (falling(margin * angle(cosine)) - cosine) / (1 + blend)


def sphereface_r(cosine: Tensor, margin: float) -> Tensor:
    """SphereFace-R v1 (Liu et al. 2022, arXiv 2109.05565): `cos(min(m theta, pi))`."""
    return torch.cos((margin * angle(cosine)).clamp(max=math.pi))


def adaface(cosine: Tensor, quality: Tensor, margin: float) -> Tensor:
    """AdaFace (Kim et al. 2022, arXiv 2204.00964): `cos(theta - m q) - (m + m q)` with `quality` q [B] in [-1, 1].

    The turned angle is kept in [1e-3, pi - 1e-3], with no gradient beyond.
    """
    turned = (angle(cosine) - margin * quality).clamp(1e-3, math.pi - 1e-3)
    return torch.cos(turned) - (margin + margin * quality)


def falling(turned: Tensor) -> Tensor:
    """cos(a) over angles [B] beyond pi, too, continued as by SphereFace: `(-1)^k cos(a) - 2k`, k = floor(a / pi).

    It is continuous and falls everywhere.
    """
    turns = torch.floor(turned.detach() / math.pi)
    return (1 - 2 * (turns % 2)) * torch.cos(turned) - 2 * turns


def angle(cosine: Tensor) -> Tensor:
    """The angle, with a gradient that is finite everywhere."""
    return torch.atan2(sine(cosine), cosine)


def sine(cosine: Tensor) -> Tensor:
    """The sine of the angle, in (0, 1]. Its floor is what keeps 1 / sine, and so every gradient, finite."""
    return (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
