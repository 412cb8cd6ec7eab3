"""The head as one process with the whole weights, all logits and ordinary autograd has it, in float64."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recognition import config
from recognition.distributed import all_gather_rows
from recognition.head import ShardedSoftmax, build_head

MARGINS: dict[str, config.Margin] = {
    "softmax": config.Softmax(),
    "normface": config.NormFace(scale=30.0),
    "cosface": config.CosFace(),
    "arcface": config.ArcFace(),
    "arcface-wide": config.ArcFace(scale=20.0, margin=2.0),
    "arcface-straight-through": config.ArcFace(straight_through=True),
    "arcface-large-scale": config.ArcFace(scale=100.0),
    "combined": config.Combined(m1=1.0, m2=0.3, m3=0.2),
    "combined-m1": config.Combined(scale=32.0, m1=1.6, m2=0.1, m3=0.1),
}
D = 24


def dense_loss(
    margin: config.Margin, x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, strength: float = 1.0
) -> Tensor:
    if isinstance(margin, config.Softmax):
        return F.cross_entropy(x @ weight.T + bias, labels)
    cosine = (F.normalize(x) @ F.normalize(weight).T).clamp(-1 + 1e-12, 1 - 1e-12)
    target = cosine.gather(1, labels[:, None])
    theta = target.acos()
    match margin:
        case config.NormFace():
            bent = target
        case config.CosFace(margin=m):
            bent = target - strength * m
        case config.ArcFace(margin=m, straight_through=True):
            # As arcface_torch: the angle is taken and bent in place under no_grad, so that autograd sees a plain scale.
            bent = target + ((theta + strength * m).cos() - target).detach()
        case config.ArcFace(margin=m):
            m *= strength
            bent = torch.where(theta + m <= math.pi, (theta + m).cos(), target - m * math.sin(m))
        case config.Combined(m1=m1, m2=m2, m3=m3):
            angle = (1 + strength * (m1 - 1)) * theta + strength * m2
            turns = (angle / math.pi).floor().detach()
            bent = (-1) ** turns * angle.cos() - 2 * turns - strength * m3
    return F.cross_entropy(margin.scale * cosine.scatter(1, labels[:, None], bent), labels)


def data(
    classes: int, batch: int, seed: int = 0, within: range | None = None, size: int = D
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings of all lengths that lie from near to opposite their class; labels repeat; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64) * 0.1
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    within = within or range(classes)
    labels = torch.randint(within.start, within.stop, (batch,), generator=generator)
    pull = torch.linspace(1.5, -1.0, batch + 2, dtype=torch.float64)[1:-1, None]
    noise = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    x = (F.normalize(weight[labels]) * pull + F.normalize(noise)) * torch.rand(batch, 1, generator=generator) * 3
    # float32 numbers, so that both sides start from the same.
    return x.float().double(), labels, weight.float().double(), bias.float().double()


def make(
    margin: config.Margin, classes: int, *, size: int = D, seed: int = 0, fused: bool = True, **settings: Any
) -> ShardedSoftmax:
    section = config.Head(margin=margin, chunk=settings.pop("chunk", 4), **settings)
    return build_head(section, classes, size, seed=seed, device="cpu", fused=fused)


def fill(head: ShardedSoftmax, weight: Tensor, bias: Tensor | None = None) -> None:
    own = slice(head.shard.start, head.shard.stop)
    head.rows.weight.copy_(weight[own])
    if head.rows.bias is not None and bias is not None:
        head.rows.bias.copy_(bias[own])


def whole(head: ShardedSoftmax, local: Tensor) -> Tensor:
    size = -(-head.num_classes // head.world)
    sizes = [max(0, min(size, head.num_classes - rank * size)) for rank in range(head.world)]
    return all_gather_rows(local, sizes)


def error(found: Tensor, expected: Tensor, order: float = torch.inf) -> float:
    """Norm of the difference, relative to what is expected; by default the largest difference and number."""
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


def errors_of_loss(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs() / expected.abs().clamp(min=1e-3))


TRAINING_CLASSES, TRAINING_BATCH, TRAINING_RATES = 21, 12, [0.2, 0.2, 0.1, 0.1, 0.05, 0.02]


@cache
def dense_training(name: str) -> dict[str, np.ndarray]:
    """The same in float64 with the whole weights and torch's SGD."""
    x, labels, weight, bias = data(TRAINING_CLASSES, TRAINING_BATCH * len(TRAINING_RATES))
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    groups = [{"params": [weight], "weight_decay": 0.05}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.8)
    losses = []
    for step, lr in enumerate(TRAINING_RATES):
        part = slice(TRAINING_BATCH * step, TRAINING_BATCH * (step + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = dense_loss(MARGINS[name], x[part], labels[part], weight, bias)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {"losses": np.array(losses), "weight": weight.detach().numpy()}
    found["momentum"] = optimizer.state[weight]["momentum_buffer"].numpy()
    if name == "softmax":
        found["bias"] = bias.detach().numpy()
        found["bias_momentum"] = optimizer.state[bias]["momentum_buffer"].numpy()
    return found
