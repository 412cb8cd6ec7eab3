"""The scale of the loss against torch's GradScaler, which decides by the same rule."""

import pytest
import torch
from torch import nn

from recognition import config
from recognition.training.loss_scale import LossScale

CPU = torch.device("cpu")


def settings(start: float, growth_steps: int) -> config.Training:
    return config.Training(initial_loss_scale=start, loss_scale_growth_steps=growth_steps)


@pytest.mark.parametrize("growth_steps", [1, 3])
def test_equals_torchs_scaler(growth_steps: int) -> None:
    ours = LossScale(settings(1024.0, growth_steps), CPU, enabled=True)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_steps)
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        finite = bool(torch.rand((), generator=generator) < 0.8)
        parameter.grad = torch.full((3,), 1.0 if finite else torch.inf)
        theirs.scale(torch.ones(()))  # which is when it makes its scale
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite))
        assert ours.value.item() == theirs.get_scale()
        seen.add(ours.value.item())
    assert len(seen) > 4


def test_gradients_are_freed_of_the_scale() -> None:
    scale = LossScale(settings(512.0, 10), CPU, enabled=True)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    model.weight.grad = torch.full((2, 3), 512.0 * 0.3)
    scale.unscale(model.parameters())
    assert torch.equal(model.weight.grad, torch.full((2, 3), 512.0 * 0.3) / 512.0)


def test_the_state_goes_on_in_mid_growth() -> None:
    first = LossScale(settings(8.0, 4), CPU, enabled=True)
    for finite in (True, False, True, True):
        first.update(torch.tensor(finite))
    assert first.state() == {"value": 4.0, "good_steps": 2}
    second = LossScale(settings(8.0, 4), CPU, enabled=True)
    second.load(first.state())
    for _ in range(2):
        second.update(torch.tensor(True))
    assert second.state() == {"value": 8.0, "good_steps": 0}


def test_growth_stops_before_infinity() -> None:
    scale = LossScale(settings(2.0**127, 1), CPU, enabled=True)
    scale.update(torch.tensor(True))
    assert scale.value.item() == 2.0**127


def test_other_precisions_have_a_scale_of_one() -> None:
    scale = LossScale(settings(512.0, 1), CPU, enabled=False)
    scale.update(torch.tensor(False))
    assert scale.value.item() == 1.0
    assert scale.state() == {}
    scale.load({"value": 4.0, "good_steps": 1})
    assert scale.value.item() == 1.0
