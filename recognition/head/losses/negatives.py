"""Logits of the negative classes as functions of their cosines, element by element: in PyTorch and for a kernel.

Each class maps cosines [B, n] between embeddings and rows of other classes to logits [B, n], and gives their derivative
by the cosines. `hard_boundary` [B] is the value beyond which a negative of that sample counts as hard, for the
losses that have one.

`kernel_code` is the Triton version for a tile of cosines and the boundaries of its samples: it returns logits and
derivative, and reads the values of the class's fields, in their order, from the tuple `fields`. A new kind of negatives
is a class here, without any change in the kernels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from recognition.head.losses.triton_code import Tile, arccosine, jit, sine_and_cosine, tl

_FIELDS = 4
"""Number of fields that the kernels read from `packed_fields`."""


@dataclass(frozen=True)
class Negatives(ABC):
    """Logits of the negative classes. A subclass is a frozen dataclass of up to 4 numbers or scalar tensors."""

    kinds: ClassVar[dict[str, type["Negatives"]]] = {}
    """All subclasses by name, as an operator takes tensors, numbers and strings but no classes."""
    heavy: ClassVar[bool] = False
    """Whether the kernel code takes many registers (powers, angles), so that a smaller tile is faster."""
    kernel_code: ClassVar[Callable[..., Any] | None] = None
    """Triton function of (cosine, boundary, fields); None where there is no kernel."""

    def __init_subclass__(cls) -> None:
        Negatives.kinds[cls.__name__] = cls

    @abstractmethod
    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        """Return the logits [B, n] of `cosine` [B, n], which stays as it is."""

    @abstractmethod
    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor | float:
        """Return the derivative of the logits by the cosines: [B, n], or one number."""

    @property
    def unfiltered(self) -> "Negatives":
        """The negatives whose kernel code is used: these, or the filtered ones without their filter."""
        return self

    def packed_fields(self, device: torch.device) -> Tensor:
        """Return the fields, in their order, and zeros up to 4 float32 numbers on `device`; the host need not wait."""
        values = [getattr(self, field.name) for field in fields(self)]
        if len(values) > _FIELDS:
            raise ValueError(f"{type(self).__name__} has {len(values)} fields; the kernels read {_FIELDS} at most")
        packed = torch.zeros(_FIELDS, device=device)
        for place, value in enumerate(values):
            # Copying a number from the host would make it wait; `fill_` passes the number with its launch.
            packed[place].copy_(value.detach()) if isinstance(value, Tensor) else packed[place].fill_(value)
        return packed


@dataclass(frozen=True)
class AffineNegatives(Negatives):
    """`scale cosine + bias`."""

    scale: Tensor | float
    bias: Tensor | float = 0.0

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        scaled = cosine * self.scale
        return scaled if isinstance(self.bias, float) and self.bias == 0 else scaled.add_(self.bias)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor | float:
        return self.scale

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, bias = fields[0], fields[1]
        return cosine * scale + bias, tl.zeros_like(cosine) + scale


@dataclass(frozen=True)
class CurricularNegatives(Negatives):
    """CurricularFace (Huang et al. 2020, arXiv 2004.00288): beyond the boundary `s c (t + c)`, else `s c`."""

    scale: float
    t: Tensor

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(beyond(cosine, hard_boundary), cosine * (self.t + cosine), cosine)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(beyond(cosine, hard_boundary), self.t + 2 * cosine, 1.0)

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, t = fields[0], fields[1]
        hard = cosine > boundary[:, None]
        z = scale * tl.where(hard, cosine * (t + cosine), cosine)
        return z, scale * tl.where(hard, t + 2 * cosine, 1.0)


@dataclass(frozen=True)
class MVSoftmaxNegatives(Negatives):
    """MV-Softmax (Wang et al. 2020, arXiv 1912.00833): beyond the boundary `s (w c + w - 1)`, else `s c`."""

    scale: float
    weight: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        hard = self.weight * cosine + (self.weight - 1)
        return self.scale * torch.where(beyond(cosine, hard_boundary), hard, cosine)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.where(beyond(cosine, hard_boundary), self.weight, 1.0)

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, weight = fields[0], fields[1]
        hard = cosine > boundary[:, None]
        z = scale * tl.where(hard, weight * cosine + (weight - 1), cosine)
        return z, scale * tl.where(hard, weight, 1.0)


@dataclass(frozen=True)
class CircleNegatives(Negatives):
    """Circle loss (Sun et al. 2020, arXiv 2002.10857): `s [c + m]+ (c - m)`, the weight in brackets a constant."""

    scale: float
    margin: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.derivative(cosine, hard_boundary) * (cosine - self.margin)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * (cosine + self.margin).clamp(min=0)

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, margin = fields[0], fields[1]
        derivative = scale * tl.maximum(cosine + margin, 0.0)
        return derivative * (cosine - margin), derivative


@dataclass(frozen=True)
class SphereFaceRNegatives(Negatives):
    """SphereFace-R v2 (Liu et al. 2022, arXiv 2109.05565): `s cos(theta / m)`."""

    heavy = True

    scale: float
    margin: float

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * torch.cos(_angle(cosine) / self.margin)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        angle = _angle(cosine)
        return self.scale / self.margin * torch.sin(angle / self.margin) / torch.sin(angle)

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, margin = fields[0], fields[1]
        edge = 0.99999988079071044921875  # 1 - 2^-23, as `_angle` has it
        edged = tl.minimum(tl.maximum(cosine, -edge), edge)
        angle = arccosine(edged) / margin
        # Of half the angle, which stays below pi / 2: cos a = 1 - 2 sin^2(a / 2) and sin a = 2 sin(a / 2) cos(a / 2).
        sine, cosine_of_half = sine_and_cosine(angle / 2)
        z = scale * (1 - 2 * sine * sine)
        return z, scale / margin * (2 * sine * cosine_of_half) / tl.sqrt((1 - edged) * (1 + edged))


@dataclass(frozen=True)
class SphereFace2Negatives(Negatives):
    """SphereFace2 (Wen et al. 2022, arXiv 2108.01513): `r (g(c) + m) + b` with `g(c) = 2 ((c + 1) / 2)^t - 1`."""

    heavy = True

    scale: float
    margin: float
    exponent: float
    bias: Tensor

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * (similarity(cosine, self.exponent) + self.margin) + self.bias

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * self.exponent * _half(cosine) ** (self.exponent - 1)

    @staticmethod
    @jit
    def kernel_code(cosine: "Tile", boundary: "Tile", fields: "Tile") -> "tuple[Tile, Tile]":
        scale, margin = fields[0], fields[1]
        exponent, bias = fields[2], fields[3]
        half = tl.maximum((cosine + 1) / 2, 1.1754943508222875e-38)
        power = tl.exp2((exponent - 1) * tl.log2(half))
        z = scale * (2 * half * power - 1 + margin) + bias
        return z, scale * exponent * power


@dataclass(frozen=True)
class FilteredNegatives(Negatives):
    """Inter-class filtering (An et al. 2022, arXiv 2203.15565) of cosines beyond `threshold`.

    They are left out of the sum, or with `zero`, as in InsightFace's arcface_torch, count as cosines of 0. The kernels
    filter themselves, around the code of `inner`.
    """

    inner: Negatives
    threshold: float
    zero: bool

    @property
    def unfiltered(self) -> Negatives:
        return self.inner

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        near = cosine > self.threshold
        if self.zero:
            return self.inner.logits(cosine.masked_fill(near, 0), hard_boundary)
        return self.inner.logits(cosine, hard_boundary).masked_fill(near, -torch.inf)

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return torch.where(cosine > self.threshold, 0.0, self.inner.derivative(cosine, hard_boundary))


def similarity(cosine: Tensor, exponent: float) -> Tensor:
    """Return SphereFace2's g(c) = 2 ((c + 1) / 2)^t - 1."""
    return 2 * _half(cosine) ** exponent - 1


def _half(cosine: Tensor) -> Tensor:
    """Return (c + 1) / 2, where rounding may have brought c below -1."""
    return ((cosine + 1) / 2).clamp(min=torch.finfo(cosine.dtype).tiny)


def _angle(cosine: Tensor) -> Tensor:
    """Return the angle, kept off 0 and pi, where its sine divides."""
    edge = 1 - torch.finfo(cosine.dtype).eps
    return torch.acos(cosine.clamp(-edge, edge))


def beyond(cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
    """Return where `cosine` [B, n] is beyond its sample's boundary [B], bool [B, n]."""
    if hard_boundary is None:
        raise ValueError("the targets' cosines are needed before the negatives'")
    return cosine > hard_boundary[:, None]
