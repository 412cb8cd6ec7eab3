"""Layers equal to torch's that train faster on a CPU, and BatchNorm's statistics averaged over the ranks.

On a GPU, in evaluation and, for PReLU, under `torch.compile` the layers are torch's own.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional


class _PReLU(torch.autograd.Function):
    """PReLU with a vectorised backward pass; torch's is a scalar loop on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        slope = weight.to(x.dtype).view(1, -1, *[1] * (x.ndim - 2))
        ctx.save_for_backward(x, slope)
        return functional.prelu(x, slope.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        x, slope = ctx.saved_tensors
        positive = torch.ops.aten.threshold_backward(gradient, x, 0)
        negative = gradient - positive
        x_gradient = torch.addcmul(positive, negative, slope)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        return x_gradient, negative.mul_(x).sum(dims, dtype=torch.float32)


class PReLU(nn.PReLU):
    """PReLU with one slope per channel: x where x > 0, else slope * x (He et al. 2015)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [b,C,...] to the same shape."""
        if self.training and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _PReLU.apply(x, self.weight)
        return super().forward(x)


class GroupedConv2d(nn.Conv2d):
    """Convolution in groups; in training on a CPU it stays in float32 under autocast.

    The bfloat16 gradients of strided and of grouped convolutions take several times as long as the float32 ones there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [b,inputs,h,w] to [b,outputs,h/stride,w/stride]."""
        if self.training and x.dtype != torch.float32 and x.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def average_running_statistics(backbone: nn.Module) -> None:
    """Replace every BatchNorm's running mean and variance by the mean over the ranks, in place.

    Collective: one all-reduce. Otherwise each rank would evaluate, save and export the statistics of its own images.
    BatchNorms in evaluation mode are skipped: they are frozen, so equal on all ranks, and averaging could round them.
    """
    world = dist.get_world_size()
    statistics = [
        buffer
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if world == 1 or not statistics:
        return
    flat = torch.cat([buffer.flatten() for buffer in statistics])
    dist.all_reduce(flat)
    flat /= world
    for buffer, mean in zip(statistics, flat.split([buffer.numel() for buffer in statistics]), strict=True):
        buffer.copy_(mean.view_as(buffer))
