"""Learned scalars against the papers' updates, in Python's float64."""

import math

import pytest
import torch

from recognition import config
from recognition.head.learned_scalars import LearnedScalars

RATES, GRADIENTS = [0.1, 0.05, 0.2], [0.7, -1.5, 0.02]
OPTIMIZERS = [config.SGD(momentum=0.9), config.SGD(momentum=0.0), config.AdamW(betas=(0.8, 0.99), eps=1e-3)]
NAMES = {"sgd": ["loss.b.momentum"], "adamw": ["loss.b.exp_avg", "loss.b.exp_avg_sq", "loss.b.updates"]}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "sgd without momentum", "adamw"])


def by_the_paper(optimizer: config.Optimizer, value: float) -> float:
    first = second = 0.0
    for number, (lr, gradient) in enumerate(zip(RATES, GRADIENTS, strict=True), start=1):
        match optimizer:
            case config.SGD(momentum=momentum):
                first = momentum * first + gradient
                value -= lr * first
            case config.AdamW(betas=(beta1, beta2), eps=eps):
                first = beta1 * first + (1 - beta1) * gradient
                second = beta2 * second + (1 - beta2) * gradient**2
                mean, square = first / (1 - beta1**number), second / (1 - beta2**number)
                value -= lr * mean / (math.sqrt(square) + eps)
    return value


def scalars(optimizer: config.Optimizer, value: float = 2.0) -> LearnedScalars:
    return LearnedScalars({"b": torch.tensor(value)}, optimizer)


def move(learned: LearnedScalars, steps: slice, skip: float = 0.0) -> None:
    for lr, gradient in zip(RATES[steps], GRADIENTS[steps], strict=True):
        # In two backward passes.
        learned.add([torch.tensor(0.25 * gradient)])
        learned.add([torch.tensor(0.75 * gradient)])
        learned.apply(lr, torch.tensor(skip))
        assert [float(left) for left in learned.gradients] == [0.0]


@each_optimizer
def test_moves_as_the_papers_say_without_decay(optimizer: config.Optimizer) -> None:
    learned = scalars(optimizer)
    move(learned, slice(None))
    assert learned.values[0].item() == pytest.approx(by_the_paper(optimizer, 2.0), rel=1e-6)


@each_optimizer
def test_a_skipped_step_changes_nothing(optimizer: config.Optimizer) -> None:
    learned = scalars(optimizer)
    move(learned, slice(0, 1))
    before = [tensor.clone() for tensor in (*learned.values, *learned.tensors().values())]
    learned.add([torch.tensor(torch.nan)])
    learned.apply(0.1, torch.tensor(1.0))
    assert all(map(torch.equal, before, (*learned.values, *learned.tensors().values())))
    move(learned, slice(1, None))
    assert learned.values[0].item() == pytest.approx(by_the_paper(optimizer, 2.0), rel=1e-6)


@each_optimizer
def test_goes_on_from_a_checkpoint(optimizer: config.Optimizer) -> None:
    first = scalars(optimizer)
    move(first, slice(0, 2))
    assert list(first.tensors()) == NAMES[optimizer.name]
    second = scalars(optimizer, first.values[0].item())
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    move(second, slice(2, None))
    assert second.values[0].item() == pytest.approx(by_the_paper(optimizer, 2.0), rel=1e-6)


def test_none_are_nothing_to_do() -> None:
    learned = LearnedScalars({}, config.SGD())
    learned.apply(0.1, torch.tensor(0.0))
    assert learned.tensors() == {}
