"""What ranks do to have the head's options checked; each function runs on all ranks and returns what it found."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from recognition import config
from recognition.distributed import split
from recognition.head import ShardedSoftmax
from recognition.head.sampling import sample_rows
from tests.support.reference_head import D, data, error, errors_of_loss, fill, make, run, whole
from tests.support.reference_losses import DenseHead

CLASSES, BATCH, RATES = 30, 8, [0.1, 0.1, 0.05, 0.2, 0.02, 0.1, 0.1, 0.05]
AUXILIARY = {
    "center": config.Head(loss=config.CosFace(), center=config.Center(weight=0.3)),
    "center softmax": config.Head(loss=config.Softmax(), center=config.Center(weight=0.3, rate=1.0)),
    "triplet": config.Head(loss=config.ArcFace(), triplet=config.Triplet(weight=2.0, margin=0.4)),
    "contrastive": config.Head(loss=config.CosFace(), contrastive=config.Contrastive(weight=0.7, margin=1.3)),
    "all, unnormalised": config.Head(
        loss=config.SphereFace(),
        center=config.Center(),
        triplet=config.Triplet(),
        contrastive=config.Contrastive(),
    ),
}


def full(head: ShardedSoftmax, name: str) -> Tensor:
    """A tensor of a checkpoint, gathered from all ranks."""
    tensor = head.state_dict_tensors()[name]
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def auxiliary() -> dict[str, float]:
    """Two steps with each; the largest error of loss, gradient and centres."""
    world, errors = dist.get_world_size(), {}
    for name, settings in AUXILIARY.items():
        x, labels, weight, bias = data(4, 2 * (BATCH + 1))
        dense = DenseHead.initial(settings, weight, bias)
        head = make(settings, 4, update_in_backward=False)
        fill(head, weight, bias)
        found = []
        for half in (slice(0, BATCH + 1), slice(BATCH + 1, None)):
            some = x[half].clone().requires_grad_()
            expected = dense.loss(some, labels[half]) + dense.auxiliary(some, labels[half])
            expected.backward()
            output, gradient = run(head, x[half], labels[half], split(BATCH + 1, world))
            found += [errors_of_loss(output.loss, expected), error(gradient, some.grad)]
            if dense.centers is not None:
                dense.move_centers(x[half], labels[half])
                head.apply_gradient(0.0)  # which moves the centres too, and no row
                found.append(error(full(head, "centers"), dense.centers))
        errors[name] = max(found)
    return errors


def train(head: ShardedSoftmax, **options: Any) -> list[float]:
    x, labels, _, _ = data(CLASSES, BATCH * len(RATES))
    losses = []
    for step, lr in enumerate(RATES):
        part = slice(BATCH * step, BATCH * (step + 1))
        output, _ = run(head, x[part], labels[part], split(BATCH, head.world), lr=lr, step=step, **options)
        losses.append(output.loss.item())
    return losses


def dense_sampled(
    rate: float, optimizer_config: type[torch.optim.Optimizer], **settings: Any
) -> tuple[list[float], Tensor]:
    """The same training by the reference, whose optimizer sees a gradient of zero where classes take no part."""
    x, labels, weight, _ = data(CLASSES, BATCH * len(RATES))
    dense = DenseHead.initial(config.Head(loss=config.CosFace(scale=16.0)), weight)
    optimizer = optimizer_config([dense.weight], **settings)
    losses = []
    for step, lr in enumerate(RATES):
        part = slice(BATCH * step, BATCH * (step + 1))
        taken = sample_rows(labels[part], CLASSES, rate, 0, step, range(CLASSES)) if rate < 1 else None
        optimizer.param_groups[0]["lr"] = lr
        dense.weight.grad = torch.zeros_like(dense.weight)
        loss = dense.loss(x[part], labels[part], taken=taken)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dense.weight.detach()


def lazy() -> list[float]:
    """Momentum and decay of rows that took no part: losses while training, and all rows once they are looked at."""
    losses, weight = dense_sampled(0.2, torch.optim.SGD, momentum=0.9, weight_decay=0.3)
    head = make(config.CosFace(scale=16.0), CLASSES, sample_rate=0.2, inactive_rows="lazy", weight_decay=0.3)
    fill(head, data(CLASSES, 1)[2])
    found = train(head)
    before = error(whole(head, head.rows.weight), weight)
    return [
        float(np.abs(np.subtract(found, losses)).max() / max(losses)),
        error(full(head, "weight"), weight),
        before,
    ]


def adamw() -> list[float]:
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    losses, weight = dense_sampled(1.0, torch.optim.AdamW, **settings)
    section = config.Head(loss=config.CosFace(scale=16.0), precision="float32", chunk=4)
    head = ShardedSoftmax(section, CLASSES, D, seed=0, optimizer=config.AdamW(**settings), device="cpu")
    fill(head, data(CLASSES, 1)[2])
    found = train(head)
    return [float(np.abs(np.subtract(found, losses)).max() / max(losses)), error(whole(head, head.rows.weight), weight)]


def formats() -> dict[str, Any]:
    """Losses and rows of a training with each format; `split` is `float32` in another form."""
    found = {}
    for state in ("float32", "split", "bfloat16"):
        head = make(config.CosFace(scale=16.0), CLASSES, row_format=state, sample_rate=0.5)
        fill(head, data(CLASSES, 1)[2])
        found[state] = train(head), whole(head, head.rows.read(slice(None))).numpy()
    return found


def loss_scale() -> list[float]:
    """A scaled loss scales the embeddings' gradient, and moves the head as if it were not scaled."""
    x, labels, weight, _ = data(CLASSES, BATCH)
    sizes, gradients, rows, scalars = split(BATCH, dist.get_world_size()), [], [], []
    for scale in (1.0, 1024.0):
        head = make(config.UCE(scale=8.0), CLASSES)
        fill(head, weight)
        own = slice(sum(sizes[: head.rank]), sum(sizes[: head.rank + 1]))
        local = x[own].float().requires_grad_()
        output = head(local, labels[own], lr=0.1, step=0, sizes=sizes, loss_scale=torch.tensor(scale))
        (output.loss * scale).backward()
        assert local.grad is not None
        gradients.append(local.grad / scale)
        rows.append(head.rows.weight.clone())
        scalars.append(head.loss.learned["bias"].clone()[None])
    return [error(second, first.double()) for first, second in (gradients, rows, scalars) if first.numel()]


def rates() -> dict[str, Any]:
    """Rate 0, which leaves the batch's own classes; one class a rank; the mean of sampled losses."""
    world = dist.get_world_size()
    sizes = split(BATCH, world)
    x, labels, weight, _ = data(CLASSES, BATCH)
    head = make(config.CosFace(), CLASSES, sample_rate=0.0)
    fill(head, weight)
    output, _ = run(head, x, labels, sizes)
    taken = labels.unique()
    dense = DenseHead.initial(config.Head(loss=config.CosFace()), weight)
    changed = (whole(head, head.rows.weight) != weight.float()).any(1).nonzero().squeeze(1)
    found = {
        "zero": errors_of_loss(output.loss, dense.loss(x, labels, taken=taken)),
        "zero touches": changed.tolist() == taken.tolist(),
    }

    few_x, few_labels, few, _ = data(world, BATCH)
    head = make(config.CosFace(), world, sample_rate=0.5, update_in_backward=False)
    fill(head, few)
    output, _ = run(head, few_x, few_labels, sizes)
    taken = sample_rows(few_labels, world, 0.5, 0, 0, range(world))
    dense = DenseHead.initial(config.Head(loss=config.CosFace()), few)
    found["one class a rank"] = errors_of_loss(output.loss, dense.loss(few_x, few_labels, taken=taken))

    # A logistic loss is linear in the sum over the negatives, so its mean over draws is known.
    section = config.Head(loss=config.UCE(scale=4.0, margin=0.1))
    dense = DenseHead.initial(section, weight)
    own, classes = labels.unique(), torch.arange(CLASSES)
    low = dense.loss(x, labels, taken=own).item()
    high = dense.loss(x, labels, taken=classes).item()
    share = (int(0.5 * CLASSES) - len(own)) / (CLASSES - len(own))
    head = make(section, CLASSES, sample_rate=0.5)
    fill(head, weight)
    part = slice(sum(sizes[: head.rank]), sum(sizes[: head.rank + 1]))
    with torch.enable_grad():
        draws = [head(x[part].float(), labels[part], lr=0.1, step=step, sizes=sizes).loss.item() for step in range(300)]
    found["mean"] = (np.mean(draws) - (low + share * (high - low))) / (np.std(draws) / len(draws) ** 0.5)
    found["spread"] = np.std(draws) / (high - low)
    return found


def options() -> dict[str, Any]:
    return {
        "auxiliary": auxiliary(),
        "lazy": lazy(),
        "adamw": adamw(),
        "formats": formats(),
        "loss scale": loss_scale(),
        "rates": rates(),
    }
