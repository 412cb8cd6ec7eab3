"""The baseline head against CosFace in float64 on one process, written down from its paper."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from recognition import config
from recognition.benchmarks.baseline_head import BaselineHead
from tests.support.ranks import run_ranks

C, D, B, RATES = 23, 8, 12, (0.3, 0.1, 0.2)
LOSS = config.CosFace(scale=16.0, margin=0.35)


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = 3 * torch.randn(len(RATES) * B, D, generator=generator)
    labels = torch.randint(C, (len(x),), generator=generator)
    return x, labels, torch.randn(C, D, generator=generator)


def _trained(optimizer: config.Optimizer) -> dict[str, np.ndarray]:
    """Losses of some steps, this rank's gradients by its embeddings, and its rows after them."""
    rank, share = dist.get_rank(), B // dist.get_world_size()
    x, labels, weight = _data()
    head = BaselineHead(C, D, seed=0, device="cpu", loss=LOSS, optimizer=optimizer)
    first = head.weight.detach().clone().numpy()
    with torch.no_grad():
        head.weight.copy_(weight[head.shard.start : head.shard.stop])
    losses, gradients = [], []
    for step, rate in enumerate(RATES):
        own = slice(step * B + rank * share, step * B + (rank + 1) * share)
        embeddings = x[own].requires_grad_()
        loss = head(embeddings, labels[own])
        loss.backward()
        head.update(rate)
        assert head.weight.grad is None
        losses.append(loss.item())
        assert embeddings.grad is not None
        gradients.append(embeddings.grad.numpy() / dist.get_world_size())
    return {"losses": np.array(losses), "gradients": np.stack(gradients), "first": first} | {
        name: tensor.detach().numpy() for name, tensor in head.state().items()
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Losses, gradients by the embeddings, rows and momenta, by arithmetic in float64."""
    x, labels, weight = (tensor.double() if tensor.is_floating_point() else tensor for tensor in _data())
    momentum = torch.zeros_like(weight)
    losses, gradients = [], []
    for step, rate in enumerate(RATES):
        part = slice(step * B, (step + 1) * B)
        rows, batch = weight.clone().requires_grad_(), x[part].clone().requires_grad_()
        cosine = F.normalize(batch) @ F.normalize(rows).T
        loss = F.cross_entropy(LOSS.scale * (cosine - LOSS.margin * F.one_hot(labels[part], C)), labels[part])
        loss.backward()
        assert rows.grad is not None and batch.grad is not None
        momentum = 0.9 * momentum + rows.grad + 0.01 * weight
        weight = weight - rate * momentum
        losses.append(loss.item())
        gradients.append(batch.grad)
    return {"losses": losses, "gradients": torch.stack(gradients), "weight": weight, "momentum_buffer": momentum}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_equals_cosface_and_sgd_in_float64(world: int, expected: dict[str, Any]) -> None:
    found = run_ranks(_trained, world, config.SGD(momentum=0.9, weight_decay=0.01))
    # Float32 against float64: 6e-8 of logits of 16, and of what three steps make of them.
    for own in found:
        np.testing.assert_allclose(own["losses"], expected["losses"], rtol=1e-5)
    gradients = np.concatenate([own["gradients"] for own in found], axis=1)
    np.testing.assert_allclose(gradients, expected["gradients"], rtol=1e-4, atol=1e-6)
    for name in ("weight", "momentum_buffer"):
        np.testing.assert_allclose(
            np.concatenate([own[name] for own in found]), expected[name], rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_ranks_start_with_rows_of_their_own() -> None:
    first, second = (own["first"] for own in run_ranks(_trained, 2, config.AdamW()))
    assert len(first) + len(second) == C
    assert not np.isclose(first[: len(second)], second).any()


def _sampled() -> dict[str, Any]:
    rank, world, classes = dist.get_rank(), dist.get_world_size(), 100
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(8, D, generator=generator), torch.randint(50, (8,), generator=generator)
    own = slice(8 // world * rank, 8 // world * (rank + 1))
    head = BaselineHead(classes, D, seed=0, device="cpu", loss=LOSS, sample_rate=0.3)
    before = head.weight.detach().clone()
    loss = head(x[own].requires_grad_(), labels[own])
    loss.backward()
    assert head.weight.grad is not None
    touched = head.weight.grad.any(1).nonzero().squeeze(1)
    head.update(0.1)
    changed = int((head.weight != before).any(1).sum())
    return {
        "loss": loss.item(),
        "shard": head.shard,
        "touched": (touched + head.shard.start).tolist(),
        "changed": changed,
        "rows": before.numpy(),
        "batch": (x.numpy(), labels.numpy()),
    }


def test_samples_the_positives_and_others_up_to_the_rate() -> None:
    found = run_ranks(_sampled, 2)
    x, labels = (torch.from_numpy(each) for each in found[0]["batch"])
    touched = [row for own in found for row in own["touched"]]
    # The second rank has none of the batch's classes.
    assert [len(own["touched"]) for own in found] == [15, 15]
    assert set(labels.tolist()) <= set(touched)
    rows = torch.from_numpy(np.concatenate([own["rows"] for own in found])).double()[touched]
    places = torch.searchsorted(torch.tensor(touched), labels)
    cosine = F.normalize(x.double()) @ F.normalize(rows).T
    loss = F.cross_entropy(LOSS.scale * (cosine - LOSS.margin * F.one_hot(places, len(rows))), places)
    for own in found:
        assert own["loss"] == pytest.approx(loss.item(), rel=1e-5)
        # What is not sampled decays all the same: its gradient is dense.
        assert own["changed"] == len(own["shard"])


def _empty_shards() -> float:
    head = BaselineHead(2, D, seed=0, device="cpu", loss=LOSS)
    loss = head(torch.ones(1, D).requires_grad_(), torch.tensor([dist.get_rank() % 2]))
    loss.backward()
    head.update(0.1)
    return loss.item()


def test_a_rank_may_have_no_classes() -> None:
    losses = run_ranks(_empty_shards, 3)
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 1
