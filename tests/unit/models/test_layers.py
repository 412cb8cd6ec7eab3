"""The layers have the values and gradients of torch's own; running statistics are averaged over the ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from recognition.models.layers import GroupedConv2d, PReLU, average_running_statistics
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_prelu_has_the_gradient_of_torch(memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=memory_format)
    x[0, 0, 0, 0] = 0
    gradient = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (PReLU(4), nn.PReLU(4)):
        module.double().weight.data = torch.tensor([0.25, -0.5, 0.0, 1.5], dtype=torch.float64)
        argument = x.clone().requires_grad_()
        output = module(argument)
        results.append((output, *torch.autograd.grad(output, (argument, module.weight), gradient)))
    for ours, theirs in zip(*results, strict=True):
        # The slopes' gradient is summed in float32.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_grouped_convolution_under_autocast() -> None:
    module = GroupedConv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False)
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = functional.conv2d(x.float(), module.weight, stride=2, padding=1, groups=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
    assert torch.equal(output, expected.bfloat16())


def averaged_statistics() -> list[tuple[np.ndarray, np.ndarray]]:
    """Before and after, on each rank, of a network whose ranks saw different images."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5))
    images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank()))
    network(images * (1 + dist.get_rank()))
    buffers = [buffer for name, buffer in network.named_buffers() if "running" in name]
    before = [buffer.numpy().copy() for buffer in buffers]
    average_running_statistics(network)
    return [(old, new.numpy()) for old, new in zip(before, buffers, strict=True)]


def test_running_statistics_are_averaged_over_the_ranks() -> None:
    for ranks in zip(*run_ranks(averaged_statistics, 3), strict=True):
        before = [old for old, _ in ranks]
        assert not np.allclose(before[0], before[1])
        for _, after in ranks:
            # A sum of three and a division in float32.
            np.testing.assert_allclose(after, np.mean(before, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-7)
