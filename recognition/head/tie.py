"""A way into autograd for a loss whose gradient is computed by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadGradient(torch.autograd.Function):
    """Ties a loss that was computed outside autograd to `x` and `norm`, whose gradients `backward` returns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, loss: Tensor, backward: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The loss, to be differentiated."""
        ctx.backward = backward
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients by `x` and `norm`, from the loss's."""
        with torch.autocast(gradient.device.type, enabled=False):
            return *ctx.backward(gradient), None, None
