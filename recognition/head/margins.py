"""Target margins: what is done to the logit of a sample's own class.

Pure functions on vectors, which know nothing of shards or chunks. Each takes the target's cosine [B] (the textbook
softmax: its logit) and a `strength` in [0, 1], by which a warm-up scales the margin, and returns the logit [B] that
stands in the loss. All are differentiable at every cosine, |cosine| = 1 included, and keep NaN as NaN.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from recognition import config

TargetMargin = Callable[[Tensor, float], Tensor]
"""(cosine [B], strength) -> logit [B]"""


def target_margin(margin: config.Margin) -> TargetMargin:
    """The function that a `head.margin` section describes."""
    return partial(_MARGINS[margin.name], **margin.model_dump(exclude={"name"}))


def softmax(logit: Tensor, strength: float) -> Tensor:
    """The textbook softmax: the logit `x . w + b` as it is."""
    return logit


def normface(cosine: Tensor, strength: float, *, scale: float) -> Tensor:
    """NormFace (Wang et al. 2017, arXiv 1704.06369): `s cos(theta)`."""
    return scale * cosine


def cosface(cosine: Tensor, strength: float, *, scale: float, margin: float) -> Tensor:
    """CosFace (Wang et al. 2018, arXiv 1801.09414): `s (cos(theta) - m)`."""
    return scale * (cosine - strength * margin)


def arcface(cosine: Tensor, strength: float, *, scale: float, margin: float, straight_through: bool = False) -> Tensor:
    """ArcFace (Deng et al. 2019, arXiv 1801.07698): `s cos(theta + m)`.

    Beyond theta + m = pi, where the cosine would rise again, it is `s (cos(theta) - m sin(m))`, the authors' guard.
    The gradient is the true one, `s sin(theta + m) / sin(theta)`. With `straight_through` it is `s` and nothing is
    guarded, as in InsightFace's arcface_torch.
    """
    margin = strength * margin
    if straight_through:
        value = scale * torch.cos(torch.acos(cosine.detach().clamp(-1, 1)) + margin)
        return value + scale * (cosine - cosine.detach())
    turned = cosine * math.cos(margin) - _sine(cosine) * math.sin(margin)
    guard = cosine - margin * math.sin(margin)
    return scale * torch.where(cosine > -math.cos(margin), turned, guard)


def combined(cosine: Tensor, strength: float, *, scale: float, m1: float, m2: float, m3: float) -> Tensor:
    """Combined margin (Deng et al. 2019, section 2.2): `s (cos(m1 theta + m2) - m3)`, with its true gradient.

    Where `a = m1 theta + m2` exceeds pi, `cos(a)` would rise again. It is continued as in SphereFace (Liu et al. 2017,
    arXiv 1704.08063), by `(-1)^k cos(a) - 2k` with `k = floor(a / pi)`: continuous and falling over all angles. In that
    region alone m1 = 1, m3 = 0 differs from `arcface`.
    """
    angle = (1 + strength * (m1 - 1)) * torch.atan2(_sine(cosine), cosine) + strength * m2
    turns = torch.floor(angle.detach() / math.pi)
    falling = (1 - 2 * (turns % 2)) * torch.cos(angle) - 2 * turns
    return scale * (falling - strength * m3)


def _sine(cosine: Tensor) -> Tensor:
    """The sine of the angle, in (0, 1]. Its floor is what keeps 1 / sine, and so every gradient, finite."""
    return (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()


_MARGINS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "normface": normface,
    "cosface": cosface,
    "arcface": arcface,
    "combined": combined,
}
