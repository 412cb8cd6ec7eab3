"""What ranks do with the head to have it checked; each function runs on all ranks and returns what it found."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from recognition import config
from recognition.distributed import split
from recognition.head import ShardedSoftmax
from recognition.head.sampling import sample_rows
from tests.support.reference_head import (
    TRAINING_BATCH,
    TRAINING_CLASSES,
    TRAINING_RATES,
    D,
    data,
    drawn_margins,
    error,
    errors_of_loss,
    fill,
    make,
    run,
    training_rates,
    whole,
)
from tests.support.reference_losses import LOSSES, DenseHead

# One of each kind of loss meets every batch; the others meet the first two.
EVERY_BATCH = ("softmax", "sphereface", "arcface", "curricularface", "adacos", "adaface", "uce", "cosface-subcenters")

# A softmax whose gradient is kept, one with a learned scale, and one that keeps nothing.
KEPT = ("arcface", "adacos", "curricularface")


def batches(world: int) -> dict[str, tuple[int, list[int], range | None]]:
    """Classes, samples of each rank, and where the labels come from (None: all classes)."""
    uneven = [3, 1, 4, 2][:world]
    return {
        "plain": (19, [5] * world, None),
        "uneven": (18, uneven, None),
        "batch-of-one": (7, [1] + [0] * (world - 1), None),
        "targets-on-one-rank": (23, split(13, world), range(2)),
        "targets-on-the-last-rank": (23, split(13, world), range(22, 23)),
        "fewer-classes-than-ranks": (2, split(9, world), None),
        "one-class": (1, split(5, world), None),
    }


def dense_loss(
    loss: config.Loss, x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None, margin_scale: float = 1.0
) -> Tensor:
    """Of a head before its first step, with gradients by `weight` and `bias`."""
    settings = config.Head(loss=loss)
    head = DenseHead.initial(settings, weight)
    head.weight, head.bias = weight, bias
    return head.loss(x, labels, margin_scale=margin_scale)


def against_reference(
    precision: str, cases: dict[str, tuple[int, list[int], range | None]], kernels: str = "torch", **options: Any
) -> dict[str, list[float]]:
    errors = {}
    order, size = (torch.inf, D) if precision == "float32" else (2, 512)
    for name, settings in LOSSES.items():
        for number, (batch_name, (classes, sizes, within)) in enumerate(cases.items()):
            if name not in EVERY_BATCH and number > 1:
                continue
            for margin_scale in (1.0, 0.3) if batch_name == "plain" else (1.0,):
                x, labels, weight, bias = data(classes, sum(sizes), number, within, size, settings.subcenters)
                x.requires_grad_()
                dense = DenseHead.initial(settings, weight, bias)
                margins = drawn_margins(settings.loss, 2, sum(sizes))
                expected = dense.loss(x, labels, step=2, margin_scale=margin_scale, margins=margins)
                expected.backward()
                head = make(
                    settings,
                    classes,
                    size=size,
                    update_in_backward=False,
                    precision=precision,
                    backend=kernels,
                    **options,
                )
                fill(head, weight, bias)
                output, gradient = run(head, x.detach(), labels, sizes, margin_scale=margin_scale, step=2)
                assert head.accumulated is not None
                found = [errors_of_loss(output.loss, expected), error(gradient, x.grad, order)]
                found.append(error(whole(head, head.accumulated.weight), dense.weight.grad, order))
                if dense.bias is not None:
                    found.append(error(whole(head, head.accumulated.bias), dense.bias.grad, order))
                found += [errors_of_loss(head.loss.running[key], value) for key, value in dense.state.items()]
                for moved, scalar in zip(head.scalars.gradients, dense.scalars.values(), strict=True):
                    found.append(errors_of_loss(moved, scalar.grad))
                assert output.finite.item()
                errors[f"{name} {batch_name} {margin_scale}"] = found
    return errors


def fused_training(name: str, **options: Any) -> dict[str, np.ndarray]:
    """Losses of six steps, and the rows, their momenta and the loss's scalars after them."""
    settings = LOSSES[name]
    count = TRAINING_BATCH * len(TRAINING_RATES)
    x, labels, weight, bias = data(TRAINING_CLASSES, count, centers=settings.subcenters)
    head = make(settings, TRAINING_CLASSES, momentum=0.8, weight_decay=0.05, **options)
    fill(head, weight, bias)
    losses = []
    for step, lr in enumerate(training_rates(name)):
        part = slice(TRAINING_BATCH * step, TRAINING_BATCH * (step + 1))
        output, _ = run(head, x[part], labels[part], split(TRAINING_BATCH, head.world), lr=lr, step=step)
        losses.append(output.loss.item())
    found: dict[str, np.ndarray] = {
        key: whole(head, head.rows.tensors()[key]).numpy()
        for key in ("weight", "momentum", "bias", "bias_momentum")
        if key in head.rows.tensors()
    }
    found |= {f"loss.{key}": value.numpy() for key, value in (head.loss.running | head.loss.learned).items()}
    return {"losses": np.array(losses), **found}


def accumulation() -> float:
    """Two passes over halves of a batch and one update, against one update_in_backward step over the whole."""
    x, labels, weight, _ = data(13, 16)
    world = dist.get_world_size()
    heads = [make(config.ArcFace(), 13, update_in_backward=update_in_backward) for update_in_backward in (True, False)]
    for head in heads:
        fill(head, weight)
    for step in range(3):
        run(heads[0], x, labels, split(16, world), step=step)
        outputs = [
            run(heads[1], x[half], labels[half], split(8, world), step=step, loss_weight=0.5)[0]
            for half in (slice(0, 8), slice(8, 16))
        ]
        assert heads[1].accumulated is not None
        heads[1].apply_gradient(0.1)
        assert not heads[1].accumulated.weight.any()
    total = sum(output.loss for output in outputs)
    assert torch.isfinite(total)
    return max(
        error(heads[1].rows.weight, heads[0].rows.weight.double()),
        error(heads[1].rows.moments["momentum"], heads[0].rows.moments["momentum"].double()),
    )


def broken_batch(update_in_backward: bool) -> dict[str, bool]:
    """One embedding of the last rank is NaN."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, labels, weight, _ = data(13, 4 * world)
    head = make(config.ArcFace(), 13, update_in_backward=update_in_backward)
    fill(head, weight)
    run(head, x, labels, [4] * world)
    if not update_in_backward:
        head.apply_gradient(0.1)
    before, momentum = head.rows.weight.clone(), head.rows.moments["momentum"].clone()
    local = x[4 * rank : 4 * rank + 4].float()
    if rank == world - 1:
        local[1, 3] = torch.nan
    local.requires_grad_()
    output = head(local, labels[4 * rank : 4 * rank + 4], lr=0.1, step=1)
    output.loss.backward()
    if not update_in_backward:
        head.apply_gradient(0.1)
    unchanged = torch.equal(head.rows.weight, before) and torch.equal(head.rows.moments["momentum"], momentum)
    run(head, x, labels, [4] * world)
    if not update_in_backward:
        head.apply_gradient(0.1)
    went_on = bool((head.rows.weight != before).any() and head.rows.weight.isfinite().all())
    return {"finite": bool(output.finite), "unchanged": unchanged, "went_on": went_on or not len(before)}


def sampled_step(update_in_backward: bool) -> dict[str, Any]:
    classes, world = 40, dist.get_world_size()
    x, labels, weight, _ = data(classes, 6)
    head = make(
        config.CosFace(), classes, update_in_backward=update_in_backward, sample_rate=0.4, weight_decay=0.1, seed=5
    )
    fill(head, weight)
    head.rows.moments["momentum"].fill_(0.25)
    output, gradient = run(head, x, labels, split(6, world), step=9, lr=0.5)
    if not update_in_backward:
        head.apply_gradient(0.5)
    taken = sample_rows(labels, classes, 0.4, 5, 9, range(classes))
    small, small_x = weight[taken].clone().requires_grad_(), x.clone().requires_grad_()
    expected = dense_loss(config.CosFace(), small_x, torch.searchsorted(taken, labels), small, None)
    expected.backward()
    assert small.grad is not None
    momenta = torch.full_like(weight, 0.25)
    momenta[taken] = 0.9 * momenta[taken] + small.grad + 0.1 * weight[taken]
    weights = weight.clone()
    weights[taken] -= 0.5 * momenta[taken]
    found, found_momenta = whole(head, head.rows.weight), whole(head, head.rows.moments["momentum"])
    others = torch.ones(classes, dtype=torch.bool)
    others[taken] = False
    return {
        "errors": [
            errors_of_loss(output.loss, expected),
            error(gradient, small_x.grad),
            error(found, weights),
            error(found_momenta, momenta),
        ],
        "untouched": bool((found[others] == weight[others].float()).all() and (found_momenta[others] == 0.25).all()),
        "changed": bool((found[taken] != weight[taken].float()).any(1).all()),
        "count": len(taken),
    }


def data_parallel() -> tuple[float, float]:
    """A linear backbone in DDP under the head: errors of its gradient and of the rows after a step."""
    world, rank = dist.get_world_size(), dist.get_rank()
    _, labels, weight, _ = data(11, 4 * world)
    images = torch.randn(4 * world, 10, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    backbone = nn.Linear(10, D)
    single = nn.Linear(10, D).double()
    single.load_state_dict(backbone.state_dict())
    rows = weight.clone().requires_grad_()
    dense_loss(config.ArcFace(), single(images.double()), labels, rows, None).backward()
    assert rows.grad is not None
    head = make(config.ArcFace(), 11, weight_decay=0.0)
    fill(head, weight)
    own = slice(4 * rank, 4 * rank + 4)
    replica = DistributedDataParallel(backbone)
    head(replica(images[own]), labels[own], lr=0.3, step=0).loss.backward()
    return (
        max(error(p.grad, q.grad) for p, q in zip(backbone.parameters(), single.parameters(), strict=True)),
        error(whole(head, head.rows.weight), weight - 0.3 * rows.grad),
    )


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, and how often each collective is called."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.namespace == "c10d":
            self.collectives[operation._schema.name.split("::")[1]] += 1
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def watched_step(loss: config.Loss, sample_rate: float) -> dict[str, Any]:
    """A step of 64 samples a rank and 4,000 classes a rank, in chunks of 100."""
    world = dist.get_world_size()
    head = make(loss, 4000 * world, chunk=100, sample_rate=sample_rate)
    embeddings = torch.randn(64, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(64) * 7 * world
    with Watch() as watch:
        head(embeddings, labels, lr=0.1, step=0).loss.backward()
    return {"largest": watch.largest, "logits": 64 * world * 4000, "collectives": dict(watch.collectives)}


def rules() -> dict[str, Any]:
    """Small promises of the interface."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, labels, weight, _ = data(9, 4 * world)
    sizes = [4] * world
    found: dict[str, Any] = {}
    own = slice(4 * rank, 4 * rank + 4)

    head = make(config.CosFace(), 9)
    wrong = labels.clone()
    wrong[-2] = 9
    for number, bad in enumerate((9, -1)):
        wrong[-2] = bad
        with pytest.raises(config.UserError) as caught:
            head(x[own].float(), wrong[own], lr=0.1, step=0)
        found[f"label {number}"] = str(caught.value)

    fill(head, weight)
    for unfused in (False, True):
        head = make(config.CosFace(), 9, update_in_backward=not unfused)
        fill(head, weight)
        first = head(x[own].float().requires_grad_(), labels[own], lr=0.1, step=0)
        second = head(x[own].float().requires_grad_(), labels[own], lr=0.1, step=0)
        first.loss.backward()
        if unfused:
            second.loss.backward()
        else:
            with pytest.raises(RuntimeError, match="rows changed"):
                second.loss.backward()

    head = make(config.CosFace(), 9, sample_rate=0.5)
    fill(head, weight)
    expected = dense_loss(config.CosFace(), x, labels, weight, None)
    with torch.no_grad():
        # Sampled in training, so not equal; without gradients nothing is sampled.
        outputs = [head(x[own].float(), labels[own], lr=0.1, step=0)]
    head.eval()
    outputs.append(head(x[own].float().requires_grad_(), labels[own], lr=0.1, step=0))
    found["evaluation"] = [errors_of_loss(output.loss, expected) for output in outputs]
    found["evaluation has no graph"] = not any(output.loss.requires_grad for output in outputs)

    head = make(config.CosFace(), 9)
    fill(head, weight)
    before = head.rows.weight.clone()
    _, frozen = run(head, x, labels, sizes, lr=0.0)
    found["a rate of 0"] = torch.equal(head.rows.weight, before) and bool(frozen.any())
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = run(head, x, labels, sizes)
    found["autocast"] = [errors_of_loss(output.loss, expected), error(gradient, frozen.double())]
    found["frozen backbone"] = head(x[own].float(), labels[own], lr=0.1, step=0).loss.requires_grad
    found["no parameters"] = not list(head.parameters()) and not head.state_dict()
    return found


def trained_head(loss: config.Loss, classes: int) -> ShardedSoftmax:
    world = dist.get_world_size()
    x, labels, _, _ = data(classes, 12)
    head = make(loss, classes, seed=3)
    for step in range(2):
        run(head, x, labels, split(12, world), step=step)
    return head


def saved(folder: str) -> None:
    for classes in (2, 11):
        save(trained_head(config.Softmax(), classes).state_dict_tensors(), checkpoint_id=f"{folder}/{classes}")


def part(name: str, folder: str) -> dict[str, Any]:
    """What a few of the tests look at: of everything at once, the first to look would wait for minutes."""
    world = dist.get_world_size()
    match name:
        case "float32":
            return {"float32": against_reference("float32", batches(world))}
        case "bfloat16":
            return {"bfloat16": against_reference("bfloat16", {"plain": (50, split(40, world), None)})}
        case "training":
            return {"training": {name: fused_training(name) for name in LOSSES}}
        case "kept":
            return {"kept": against_reference("float32", batches(world), chunk=None)}
        case "kept training":
            return {"kept training": {name: fused_training(name, chunk=None) for name in KEPT}}
    head = make(config.CosFace(), 2500, seed=8)
    found = {
        "initial": whole(head, head.rows.weight).numpy(),
        "accumulation": accumulation(),
        "broken": [broken_batch(update_in_backward) for update_in_backward in (True, False)],
        "sampled": [sampled_step(update_in_backward) for update_in_backward in (True, False)],
        "watched": watched_step(config.ArcFace(), 1.0),
        "watched softmax": watched_step(config.Softmax(), 1.0),
        "watched sampled": watched_step(config.ArcFace(), 0.5),
        "rules": rules(),
    }
    if world == 2:
        # Once is enough for what takes seconds to import.
        found["ddp"] = data_parallel()
        saved(folder)
    return found


def resharded(folder: str) -> list[float]:
    """What two ranks saved, loaded here, saved and loaded once more: the largest differences from training here."""
    worst = []
    for classes in (2, 11):
        expected = trained_head(config.Softmax(), classes)
        for source, target in ((f"{folder}/{classes}", f"{folder}/{classes}-again"), (f"{folder}/{classes}-again", "")):
            head = make(config.Softmax(), classes, seed=99)
            state = head.state_dict_tensors()
            assert sorted(state) == ["bias", "bias_momentum", "inverse_norm", "momentum", "weight"]
            load(state, checkpoint_id=source)
            if target:
                save(state, checkpoint_id=target)
            worst += [error(head.rows.tensors()[name], expected.rows.tensors()[name].double()) for name in state]
    return worst


def refusals() -> None:
    head = make(config.ArcFace(), 3)
    with pytest.raises(ValueError, match="embeddings are"):
        head(torch.zeros(2, D + 1), torch.zeros(2, dtype=torch.long), lr=0.1, step=0)
    with pytest.raises(RuntimeError, match="update_in_backward=False"):
        head.apply_gradient(0.1)
    with pytest.raises(config.UserError, match="0 classes"):
        make(config.ArcFace(), 0)
