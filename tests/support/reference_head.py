"""Heads, batches and float64 trainings that the head's tests hold against each other."""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.distributed import all_gather_rows
from recognition.head import ShardedSoftmax
from recognition.head.losses.adaptive import ElasticFaceLoss
from recognition.head.losses.build import build_loss
from tests.support.reference_losses import LOSSES, DenseHead

D = 24


def data(
    classes: int, batch: int, seed: int = 0, within: range | None = None, size: int = D, centers: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of all lengths that lie from near to opposite their class; labels repeat; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes * centers, size, generator=generator, dtype=torch.float64) * 0.1
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    within = within or range(classes)
    labels = torch.randint(within.start, within.stop, (batch,), generator=generator)
    pull = torch.linspace(1.5, -1.0, batch + 2, dtype=torch.float64)[1:-1, None]
    noise = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    near = F.normalize(weight[labels * centers])
    x = (near * pull + F.normalize(noise)) * torch.rand(batch, 1, generator=generator) * 3
    # float32 numbers, so that both sides start from the same.
    return x.float().double(), labels, weight.float().double(), bias.float().double()


def make(
    loss: config.Loss | config.Head,
    classes: int,
    *,
    size: int = D,
    seed: int = 0,
    update_in_backward: bool = True,
    **settings: Any,
) -> ShardedSoftmax:
    head = loss if isinstance(loss, config.Head) else config.Head(loss=loss)
    given: dict[str, Any] = {"chunk": 4, "precision": "float32"} | settings
    # SGD's settings are given as the head's own, for short.
    optimizer_config = {name: given.pop(name) for name in ("momentum", "weight_decay") if name in given}
    head = config.Head.model_validate(
        head.model_dump() | {"optimizer": config.SGD(**optimizer_config).model_dump()} | given
    )
    return ShardedSoftmax(head, classes, size, seed=seed, device="cpu", update_in_backward=update_in_backward)


def fill(head: ShardedSoftmax, weight: Tensor, bias: Tensor | None = None) -> None:
    centers = head.options.centers
    own = slice(head.shard.start * centers, head.shard.stop * centers)
    head.rows.load(weight[own].float(), None if bias is None or head.rows.bias is None else bias[own].float())


def whole(head: ShardedSoftmax, local: Tensor | None) -> Tensor:
    assert local is not None
    size, centers = -(-head.num_classes // head.world), head.options.centers
    sizes = [centers * max(0, min(size, head.num_classes - rank * size)) for rank in range(head.world)]
    return all_gather_rows(local, sizes)


def error(found: Tensor | None, expected: Tensor | None, order: float = torch.inf) -> float:
    """Norm of the difference, relative to what is expected; by default the largest difference and number."""
    assert found is not None and expected is not None
    norm = torch.linalg.vector_norm
    return float(norm(found.double() - expected, order) / norm(expected, order).clamp(min=1e-12)) if len(found) else 0.0


def run(head: ShardedSoftmax, x: Tensor, labels: Tensor, sizes: list[int], **options: Any) -> tuple[Any, Tensor]:
    """Forward and backward of this rank's share of a batch; the output, and the whole batch's true gradient."""
    own = slice(sum(sizes[: head.rank]), sum(sizes[: head.rank + 1]))
    local = x[own].float().requires_grad_()
    options = {"lr": 0.1, "step": 0, **options}
    output = head(local, labels[own], sizes=sizes, **options)
    output.loss.backward()
    assert local.grad is not None
    return output, all_gather_rows(local.grad, sizes) / head.world


def errors_of_loss(found: Tensor, expected: Tensor | None) -> float:
    assert expected is not None
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs() / expected.abs().clamp(min=1e-3))


def drawn_margins(loss: config.Loss, step: int, batch: int, seed: int = 0) -> Tensor | None:
    """What ElasticFace draws; that it is random in the right way is not for the references to say."""
    if not isinstance(loss, config.ElasticFace):
        return None
    built = build_loss(loss, 1, seed=seed, device=torch.device("cpu"))
    assert isinstance(built, ElasticFaceLoss)
    return built.draw(step, batch, torch.device("cpu")).double()


TRAINING_CLASSES, TRAINING_BATCH, TRAINING_RATES = 21, 12, [0.2, 0.2, 0.1, 0.1, 0.05, 0.02]
TRAINING_SCALE = {"sphereface2": 0.02, "uce": 0.02, "circle": 0.1, "magface": 0.02}
"""Losses with large gradients are trained at smaller rates: what diverges cannot be compared."""


def training_rates(name: str) -> list[float]:
    return [rate * TRAINING_SCALE.get(name.split("-")[0], 1.0) for rate in TRAINING_RATES]


@cache
def dense_training(name: str) -> dict[str, np.ndarray]:
    """Losses of six steps, and what they leave, in float64 with the whole weights and torch's SGD."""
    settings = LOSSES[name]
    x, labels, weight, bias = data(TRAINING_CLASSES, TRAINING_BATCH * len(TRAINING_RATES), centers=settings.subcenters)
    head = DenseHead.initial(settings, weight, bias)
    others = [tensor for tensor in (head.bias, *head.scalars.values()) if tensor is not None]
    groups = [{"params": [head.weight], "weight_decay": 0.05}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.8)
    losses = []
    for step, lr in enumerate(training_rates(name)):
        part = slice(TRAINING_BATCH * step, TRAINING_BATCH * (step + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        margins = drawn_margins(settings.loss, step, TRAINING_BATCH)
        loss = head.loss(x[part], labels[part], step=step, margins=margins)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {"losses": np.array(losses), "weight": head.weight.detach().numpy()}
    found["momentum"] = optimizer.state[head.weight]["momentum_buffer"].numpy()
    if head.bias is not None:
        found["bias"] = head.bias.detach().numpy()
        found["bias_momentum"] = optimizer.state[head.bias]["momentum_buffer"].numpy()
    for key, value in (head.state | head.scalars).items():
        found[f"loss.{key}"] = value.detach().numpy()
    return found
