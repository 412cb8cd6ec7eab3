"""The head against a dense, single-process, float64 version of the papers' formulas, on 1 to 4 ranks."""

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from recognition import config
from recognition.distributed import all_gather_rows, split
from recognition.head import ShardedSoftmax, build_head
from recognition.head.sampling import sample_rows

WORLDS = [1, 2, 3, 4]
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


# ---------------------------------------------------------------- the reference: full logits, ordinary autograd


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


# ---------------------------------------------------------------- what every number of ranks does, in one launch


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


def against_reference(precision: str, cases: dict[str, tuple[int, list[int], range | None]]) -> dict[str, list[float]]:
    errors = {}
    order, size = (torch.inf, D) if precision == "float32" else (2, 512)
    for margin_name, margin in MARGINS.items():
        for number, (batch_name, (classes, sizes, within)) in enumerate(cases.items()):
            for strength in (1.0, 0.3) if batch_name == "plain" else (1.0,):
                x, labels, weight, bias = data(classes, sum(sizes), number, within, size)
                tensors = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
                expected = dense_loss(margin, tensors[0], labels, tensors[1], tensors[2], strength)
                expected.backward()
                head = make(margin, classes, size=size, fused=False, precision=precision)
                fill(head, weight, bias)
                output, gradient = run(head, x, labels, sizes, strength=strength)
                assert head.row_gradient is not None
                found = [errors_of_loss(output.loss, expected), error(gradient, tensors[0].grad, order)]
                found.append(error(whole(head, head.row_gradient.weight), tensors[1].grad, order))
                if head.row_gradient.bias is not None:
                    found.append(error(whole(head, head.row_gradient.bias), tensors[2].grad, order))
                cosine = F.cosine_similarity(x, weight[labels]).mean()
                found.append(float((output.target_cosine - cosine).abs()))
                assert output.finite.item()
                errors[f"{margin_name} {batch_name} {strength}"] = found
    return errors


def errors_of_loss(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs() / expected.abs().clamp(min=1e-3))


TRAINING_CLASSES, TRAINING_BATCH, TRAINING_RATES = 21, 12, [0.2, 0.2, 0.1, 0.1, 0.05, 0.02]


def fused_training(margin: config.Margin) -> dict[str, np.ndarray]:
    """Losses of six steps, and the rows and their momenta after them."""
    x, labels, weight, bias = data(TRAINING_CLASSES, TRAINING_BATCH * len(TRAINING_RATES))
    head = make(margin, TRAINING_CLASSES, momentum=0.8, weight_decay=0.05)
    fill(head, weight, bias)
    losses = []
    for step, lr in enumerate(TRAINING_RATES):
        part = slice(TRAINING_BATCH * step, TRAINING_BATCH * (step + 1))
        output, _ = run(head, x[part], labels[part], split(TRAINING_BATCH, head.world), lr=lr, step=step)
        losses.append(output.loss.item())
    state = {name: whole(head, local).numpy() for name, local in vars(head.rows).items() if local is not None}
    return {"losses": np.array(losses), **state}


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


def accumulation() -> float:
    """Two passes over halves of a batch and one update, against one fused step over the whole."""
    x, labels, weight, _ = data(13, 16)
    world = dist.get_world_size()
    heads = [make(config.ArcFace(), 13, fused=fused) for fused in (True, False)]
    for head in heads:
        fill(head, weight)
    for step in range(3):
        run(heads[0], x, labels, split(16, world), step=step)
        outputs = [
            run(heads[1], x[half], labels[half], split(8, world), step=step, loss_weight=0.5)[0]
            for half in (slice(0, 8), slice(8, 16))
        ]
        assert heads[1].row_gradient is not None
        heads[1].apply_gradient(0.1)
        assert not heads[1].row_gradient.weight.any()
    total = sum(output.loss for output in outputs)
    assert torch.isfinite(total)
    return max(
        error(heads[1].rows.weight, heads[0].rows.weight.double()),
        error(heads[1].rows.momentum, heads[0].rows.momentum.double()),
    )


def broken_batch(fused: bool) -> dict[str, bool]:
    """One embedding of the last rank is NaN."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, labels, weight, _ = data(13, 4 * world)
    head = make(config.ArcFace(), 13, fused=fused)
    fill(head, weight)
    run(head, x, labels, [4] * world)
    if not fused:
        head.apply_gradient(0.1)
    before, momentum = head.rows.weight.clone(), head.rows.momentum.clone()
    local = x[4 * rank : 4 * rank + 4].float()
    if rank == world - 1:
        local[1, 3] = torch.nan
    local.requires_grad_()
    output = head(local, labels[4 * rank : 4 * rank + 4], lr=0.1, step=1)
    output.loss.backward()
    if not fused:
        head.apply_gradient(0.1)
    unchanged = torch.equal(head.rows.weight, before) and torch.equal(head.rows.momentum, momentum)
    run(head, x, labels, [4] * world)
    if not fused:
        head.apply_gradient(0.1)
    went_on = bool((head.rows.weight != before).any() and head.rows.weight.isfinite().all())
    return {"finite": bool(output.finite), "unchanged": unchanged, "went_on": went_on or not len(before)}


def sampled_step(fused: bool) -> dict[str, Any]:
    classes, world = 40, dist.get_world_size()
    x, labels, weight, _ = data(classes, 6)
    head = make(config.CosFace(), classes, fused=fused, sample_rate=0.4, weight_decay=0.1, seed=5)
    fill(head, weight)
    head.rows.momentum.fill_(0.25)
    output, gradient = run(head, x, labels, split(6, world), step=9, lr=0.5)
    if not fused:
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
    found, found_momenta = whole(head, head.rows.weight), whole(head, head.rows.momentum)
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


def watched_step(margin: config.Margin, sample_rate: float) -> dict[str, Any]:
    """A step of 64 samples a rank and 4,000 classes a rank, in chunks of 100."""
    world = dist.get_world_size()
    head = make(margin, 4000 * world, chunk=100, sample_rate=sample_rate)
    embeddings = torch.randn(64, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(64) * 7 * world
    with Watch() as watch:
        head(embeddings, labels, lr=0.1, step=0).loss.backward()
    return {"largest": watch.largest, "logits": 64 * world * 4000, "collectives": dict(watch.collectives)}


def rules() -> dict[str, Any]:
    """Small promises of the interface."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x, labels, weight, _ = data(9, 4 * world)
    sizes, found = [4] * world, {}
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
        head = make(config.CosFace(), 9, fused=not unfused)
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
    _, frozen = run(head, x, labels, sizes, update=False)
    found["update=False"] = torch.equal(head.rows.weight, before) and bool(frozen.any())
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = run(head, x, labels, sizes)
    found["autocast"] = [errors_of_loss(output.loss, expected), error(gradient, frozen.double())]
    found["frozen backbone"] = head(x[own].float(), labels[own], lr=0.1, step=0).loss.requires_grad
    found["no parameters"] = not list(head.parameters()) and not head.state_dict()
    return found


def trained_head(margin: config.Margin, classes: int) -> ShardedSoftmax:
    world = dist.get_world_size()
    x, labels, _, _ = data(classes, 12)
    head = make(margin, classes, seed=3)
    for step in range(2):
        run(head, x, labels, split(12, world), step=step)
    return head


def saved(folder: str) -> None:
    for classes in (2, 11):
        dcp.save(trained_head(config.Softmax(), classes).state(), checkpoint_id=f"{folder}/{classes}")


def everything(folder: str) -> dict[str, Any]:
    world = dist.get_world_size()
    head = make(config.CosFace(), 2500, seed=8)
    found = {
        "initial": whole(head, head.rows.weight).numpy(),
        "float32": against_reference("float32", batches(world)),
        "bfloat16": against_reference("bfloat16", {"plain": (50, split(40, world), None)}),
        "training": {name: fused_training(margin) for name, margin in MARGINS.items()},
        "accumulation": accumulation(),
        "broken": [broken_batch(fused) for fused in (True, False)],
        "sampled": [sampled_step(fused) for fused in (True, False)],
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


@cache
def attempt(world: int) -> list[dict[str, Any]] | AssertionError:
    try:
        return run_ranks(everything, world, str(_folder))
    except AssertionError as failure:
        return failure


def results(world: int) -> list[dict[str, Any]]:
    found = attempt(world)
    if isinstance(found, AssertionError):
        raise found
    return found


_folder: Path


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _folder
    _folder = tmp_path_factory.mktemp("heads")


# ---------------------------------------------------------------- what it has to be

each_world = pytest.mark.parametrize("world", WORLDS)


@each_world
def test_loss_and_gradients_are_the_papers(world: int) -> None:
    for rank in results(world):
        assert len(rank["float32"]) == len(MARGINS) * (len(batches(world)) + 1)
        wrong = {name: errors for name, errors in rank["float32"].items() if not max(errors) <= 1e-5}
        assert not wrong


@each_world
def test_bfloat16_products_are_close(world: int) -> None:
    for rank in results(world):
        assert len(rank["bfloat16"]) == 2 * len(MARGINS)
        for name, errors in rank["bfloat16"].items():
            # The error of a logit, and so of its exponential, grows with the scale.
            scale = getattr(MARGINS[name.split()[0]], "scale", 0.0)
            assert 1e-6 < max(errors) <= 1e-2 * max(1, scale / 64), name


@each_world
@pytest.mark.parametrize("name", MARGINS)
def test_fused_update_is_torch_sgd(world: int, name: str) -> None:
    expected = dense_training(name)
    for rank in results(world):
        found = rank["training"][name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.abs(found[key] - value).max() <= 1e-5 * np.abs(value).max(), key


@each_world
def test_accumulation_is_the_large_batch(world: int) -> None:
    assert max(rank["accumulation"] for rank in results(world)) <= 1e-6


@each_world
def test_a_broken_batch_changes_nothing_on_any_rank(world: int) -> None:
    for rank in results(world):
        for found in rank["broken"]:
            assert found == {"finite": False, "unchanged": True, "went_on": True}


@each_world
def test_only_sampled_rows_take_part(world: int) -> None:
    for rank in results(world):
        for found in rank["sampled"]:
            assert found["untouched"]
            assert found["changed"]
            assert found["count"] == 16
            assert max(found["errors"]) <= 1e-5


def test_under_ddp_the_backbone_gets_the_single_process_gradient() -> None:
    for rank in results(2):
        assert max(rank["ddp"]) <= 1e-5


@each_world
def test_logits_are_never_held_and_collectives_are_few(world: int) -> None:
    for rank in results(world):
        for name, all_reduces in (("watched", 1), ("watched softmax", 2), ("watched sampled", 1)):
            found = rank[name]
            # The rows themselves are the largest; a chunk of logits and one of rows are smaller.
            assert found["largest"] <= 4000 * D < found["logits"]
            assert found["collectives"] == {
                "_allgather_base_": 2,
                "allreduce_": all_reduces,
                "_reduce_scatter_base_": 1,
            }


@each_world
def test_rules(world: int) -> None:
    for rank in results(world):
        found = rank["rules"]
        assert f"label 9 of sample 2 in the batch of rank {world - 1} is outside 0..8" in found["label 0"]
        assert "label -1 of sample 2" in found["label 1"]
        assert max(found["evaluation"]) <= 1e-5
        assert max(found["autocast"]) <= 1e-5
        for name in ("evaluation has no graph", "update=False", "frozen backbone", "no parameters"):
            assert found[name], name


def test_initial_rows_differ_and_do_not_depend_on_the_number_of_ranks() -> None:
    rows = results(1)[0]["initial"]
    for world in WORLDS[1:]:
        for rank in results(world):
            np.testing.assert_array_equal(rank["initial"], rows)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert rows.mean() == pytest.approx(0, abs=5e-4 / 4)
    assert rows.std() == pytest.approx(0.01, rel=0.02)


def resharded(folder: str) -> list[float]:
    """What two ranks saved, loaded here, saved and loaded once more: the largest differences from training here."""
    worst = []
    for classes in (2, 11):
        expected = trained_head(config.Softmax(), classes)
        for source, target in ((f"{folder}/{classes}", f"{folder}/{classes}-again"), (f"{folder}/{classes}-again", "")):
            head = make(config.Softmax(), classes, seed=99)
            state = head.state()
            assert sorted(state) == ["bias", "bias_momentum", "momentum", "weight"]
            dcp.load(state, checkpoint_id=source)
            if target:
                dcp.save(state, checkpoint_id=target)
            worst += [error(getattr(head.rows, name), getattr(expected.rows, name).double()) for name in state]
    return worst


def test_state_loads_in_place_at_another_number_of_ranks() -> None:
    results(2)
    # Two classes on three ranks: one shard is empty.
    for errors in run_ranks(resharded, 3, str(_folder)):
        assert len(errors) == 16
        assert max(errors) <= 1e-5


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="process group"):
        make(config.ArcFace(), 3)


def test_embeddings_of_another_size_are_refused() -> None:
    run_ranks(refusals, 1)


def refusals() -> None:
    head = make(config.ArcFace(), 3)
    with pytest.raises(ValueError, match="embeddings are"):
        head(torch.zeros(2, D + 1), torch.zeros(2, dtype=torch.long), lr=0.1, step=0)
    with pytest.raises(RuntimeError, match="fused=False"):
        head.apply_gradient(0.1)
    with pytest.raises(config.UserError, match="0 classes"):
        make(config.ArcFace(), 0)
