"""Small rows, gradients for them, and torch's optimizers in float64, for the tests of the row optimizer."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from recognition import config
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.optimizer import RowOptimizer, build_row_optimizer
from recognition.head.class_weights.shard import RowFormat, RowSelection, WeightShard

CPU = torch.device("cpu")
COUNT, SIZE = 14, 8
SGD = config.SGD(momentum=0.9, weight_decay=0.05)
ADAMW = config.AdamW(betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1)
BOTH = pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
ALL = pytest.mark.parametrize(
    ("settings", "inactive_rows"), [(SGD, "sparse"), (SGD, "lazy"), (ADAMW, "sparse")], ids=["sgd", "lazy-sgd", "adamw"]
)
FORMATS: list[RowFormat] = ["float32", "split", "bfloat16"]
GO, SKIP = torch.tensor(0.0), torch.tensor(1.0)


def make(
    settings: config.SGD | config.AdamW,
    row_format: RowFormat = "float32",
    *,
    inactive_rows: Literal["sparse", "lazy"] = "sparse",
    bias: bool = False,
    count: int = COUNT,
    size: int = SIZE,
) -> tuple[WeightShard, RowOptimizer]:
    """Rows whose norms are about 3, and what changes them."""
    rows = WeightShard.initial(range(5, 5 + count), size, bias=bias, seed=1, device=CPU, row_format=row_format)
    optimizer = build_row_optimizer(settings, inactive_rows, seed=7)
    rows.moments.update(optimizer.moments(count, size, bias=bias, device=CPU, row_format=row_format))
    generator = torch.Generator().manual_seed(2)
    rows.load(torch.randn(count, size, generator=generator), torch.randn(count, generator=generator) if bias else None)
    return rows, optimizer


def gradient(values: Tensor, seed: int, *, bias: bool = False) -> RowGradient:
    generator = torch.Generator().manual_seed(seed)
    a, x = torch.randn(6, len(values), generator=generator), torch.randn(6, values.shape[1], generator=generator)
    radial = None if bias else torch.randn(len(values), generator=generator)
    return RowGradient(a, x, radial, torch.randn(len(values), generator=generator) if bias else None)


def formed(gradient: RowGradient, values: Tensor) -> Tensor:
    product = gradient.a.double().T @ gradient.x.double()
    return product if gradient.radial is None else product - gradient.radial.double()[:, None] * values.double()


def parts(scattered: bool, among: Tensor | None = None, size: int = 4) -> Iterator[RowSelection]:
    """All rows, or those `among` them, a few at a time; of none too."""
    if not scattered:
        yield from (slice(0, 4), slice(4, 10), slice(10, 10), slice(10, COUNT))
        return
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(4)) if among is None else among
    yield from (*order.split(size), torch.zeros(0, dtype=torch.int64))


def snapshot(rows: WeightShard) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in rows.tensors().items()}


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Float32 against float64, of the largest number too: 6e-8 for each of the operations of a few steps."""
    scale = expected.abs().max().item()
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=tolerance, atol=tolerance * scale)


def torch_optimizer(
    settings: config.SGD | config.AdamW, weight: Tensor, bias: Tensor | None, lr: float = 0.0
) -> torch.optim.Optimizer:
    groups = [{"params": [weight], "weight_decay": settings.weight_decay}]
    if bias is not None:
        groups.append({"params": [bias], "weight_decay": 0.0})
    if isinstance(settings, config.SGD):
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps)


def torch_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
