import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from recognition import config
from recognition.training.optimizer import (
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
    set_lr,
    step_if_finite,
)
from recognition.training.schedule import Schedule

SGD = config.SGD(lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = config.AdamW(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05)
YES, NO = torch.tensor(True), torch.tensor(False)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.slope = nn.PReLU(4)
        self.linear = nn.Linear(4, 5)


def small(seed: int = 0) -> Small:
    """Every value random: a norm's ones and zeros would hide a decay."""
    model = Small().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def give_gradients(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Random gradients, in the parameters' own layout as autograd leaves them; returned in float64."""
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        gradients[name] = parameter.grad.double().numpy()
    return gradients


def float64(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **optimizer_tensors(optimizer, model)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_near(model: nn.Module, expected: dict[str, np.ndarray]) -> None:
    """Float32 against float64 after four steps: some ten roundings of 6e-8, of numbers of about 1."""
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("decay_all", [False, True])
def test_sgd_follows_the_textbook(decay_all: bool) -> None:
    model = small()
    optimizer = build_optimizer(model, SGD, decay_norms_and_biases=decay_all)
    weights = float64(model)
    velocities = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step, lr in enumerate([0.1, 0.05, 0.02, 0.01]):
        for name, gradient in give_gradients(model, step).items():
            decay = 0.01 if decay_all or weights[name].ndim > 1 else 0.0
            velocities[name] = 0.9 * velocities[name] + gradient + decay * weights[name]
            weights[name] = weights[name] - lr * velocities[name]
        set_lr(optimizer, lr)
        step_if_finite(optimizer, YES)
    assert_near(model, weights)


@pytest.mark.parametrize("decay_all", [False, True])
def test_adamw_follows_the_textbook(decay_all: bool) -> None:
    model = small()
    optimizer = build_optimizer(model, ADAMW, decay_norms_and_biases=decay_all)
    weights = float64(model)
    first = {name: np.zeros_like(weight) for name, weight in weights.items()}
    second = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for step, lr in enumerate([0.01, 0.02, 0.03, 0.01], start=1):
        for name, gradient in give_gradients(model, step).items():
            decay = 0.05 if decay_all or weights[name].ndim > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.99 * second[name] + 0.01 * gradient**2
            update = (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.99**step)) + 1e-6)
            weights[name] = weights[name] * (1 - lr * decay) - lr * update
        set_lr(optimizer, lr)
        step_if_finite(optimizer, YES)
    assert_near(model, weights)


def test_norms_biases_and_slopes_are_a_group_without_decay_and_frozen_parameters_in_none() -> None:
    model = small()
    model.linear.weight.requires_grad_(False)
    optimizer = build_optimizer(model, SGD, decay_norms_and_biases=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {
        0.01: {"convolution.weight"},
        0.0: {"norm.weight", "norm.bias", "slope.weight", "linear.bias"},
    }


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(settings: config.SGD | config.AdamW, steps_before: int) -> None:
    model = small()
    optimizer = build_optimizer(model, settings, decay_norms_and_biases=False)
    for step in range(steps_before):
        give_gradients(model, step)
        step_if_finite(optimizer, YES)
    before = snapshot(model, optimizer)
    give_gradients(model, 9)
    assert model.linear.weight.grad is not None
    model.linear.weight.grad[0, 0] = math.nan
    norm = clip_gradients(model.parameters(), 5.0)
    step_if_finite(optimizer, torch.isfinite(norm))
    assert identical(snapshot(model, optimizer), before)
    give_gradients(model, 10)
    step_if_finite(optimizer, YES)
    assert not identical(snapshot(model, optimizer), before)
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(model, optimizer).values())


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_step_that_was_skipped_is_as_if_it_had_not_been(settings: config.SGD | config.AdamW) -> None:
    results = []
    for flags in ([YES, NO, YES], [YES, YES]):
        model = small()
        optimizer = build_optimizer(model, settings, decay_norms_and_biases=False)
        seed = 0
        for flag in flags:
            give_gradients(model, seed if flag else 99)
            step_if_finite(optimizer, flag)
            seed += int(flag)
        results.append(snapshot(model, optimizer))
    assert identical(*results)


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_first_step_from_zero_state_is_the_first_step_of_torch(settings: config.SGD | config.AdamW) -> None:
    ours, theirs = small(), small()
    optimizer = build_optimizer(ours, settings, decay_norms_and_biases=True)
    if isinstance(settings, config.SGD):
        peer: torch.optim.Optimizer = torch.optim.SGD(
            theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, fused=True
        )
    else:
        peer = torch.optim.AdamW(
            theirs.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.05, fused=True
        )
    assert all(not tensor.any() for tensor in optimizer_tensors(optimizer, ours).values())
    for step in range(2):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        step_if_finite(optimizer, YES)
        peer.step()
        assert identical(snapshot(ours, optimizer), snapshot(theirs, peer))


@pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_state_loaded_in_place_continues_bit_for_bit(settings: config.SGD | config.AdamW) -> None:
    model = small()
    optimizer = build_optimizer(model, settings, decay_norms_and_biases=False)
    for step in range(3):
        give_gradients(model, step)
        step_if_finite(optimizer, YES)
    saved = snapshot(model, optimizer)

    restored = small(seed=1)
    fresh = build_optimizer(restored, settings, decay_norms_and_biases=False)
    with torch.no_grad():
        for name, tensor in {**dict(restored.named_parameters()), **optimizer_tensors(fresh, restored)}.items():
            tensor.copy_(saved[name])
    for each, its_optimizer in ((model, optimizer), (restored, fresh)):
        give_gradients(each, 3)
        step_if_finite(its_optimizer, YES)
    assert identical(snapshot(model, optimizer), snapshot(restored, fresh))


def test_state_is_named_by_parameter() -> None:
    model = small()
    names = {name for name, _ in model.named_parameters()}
    sgd = optimizer_tensors(build_optimizer(model, SGD, decay_norms_and_biases=False), model)
    assert set(sgd) == {f"momentum_buffer.{name}" for name in names}
    adamw = optimizer_tensors(build_optimizer(model, ADAMW, decay_norms_and_biases=False), model)
    assert set(adamw) == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in names}
    plain = config.SGD(momentum=0.0)
    assert optimizer_tensors(build_optimizer(model, plain, decay_norms_and_biases=False), model) == {}


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_clipping_returns_the_norm_before_it_and_scales_only_what_is_too_long(max_norm: float) -> None:
    model = small()
    gradients = give_gradients(model, 0)
    model.slope.weight.grad = None
    del gradients["slope.weight"]
    expected = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    norm = clip_gradients(model.parameters(), max_norm)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    scale = max_norm / expected if 0 < max_norm < expected else 1.0
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            # A norm and a product in float32.
            np.testing.assert_allclose(parameter.grad.numpy(), scale * gradients[name], rtol=1e-5, err_msg=name)


def test_polynomial_at_points_worked_out_by_hand() -> None:
    training = config.Training(epochs=3, warmup_epochs=1, power=2.0)
    schedule = Schedule.of(training, steps_per_epoch=4.0)
    assert (schedule.total_steps, schedule.warmup_steps) == (12, 4)
    factors = [schedule.factor(step) for step in range(14)]
    eighths = [8, 7, 6, 5, 4, 3, 2, 1]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8] + [(n / 8) ** 2 for n in eighths] + [0.0, 0.0])


def test_cosine_at_points_worked_out_by_hand() -> None:
    schedule = Schedule.of(config.Training(epochs=2, schedule="cosine"), steps_per_epoch=3.0)
    third, sixth = 0.75, (1 + math.sqrt(3) / 2) / 2
    assert [schedule.factor(step) for step in range(7)] == pytest.approx([1, sixth, third, 0.5, 0.25, 1 - sixth, 0])


@pytest.mark.parametrize("shape", ["polynomial", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 2.0])
def test_the_rate_rises_without_a_jump_peaks_once_and_every_step_learns(
    shape: Literal["polynomial", "cosine"], warmup: float
) -> None:
    training = config.Training(epochs=5, warmup_epochs=warmup, schedule=shape)
    schedule = Schedule.of(training, steps_per_epoch=20.5)
    factors = np.array([schedule.factor(step) for step in range(schedule.total_steps + 1)])
    peak = schedule.warmup_steps
    assert factors[peak] == 1 and (np.delete(factors, peak) < 1).all()
    assert (factors[:-1] > 0).all() and factors[-1] == 0
    assert (np.diff(factors[: peak + 1]) > 0).all() and (np.diff(factors[peak:]) < 0).all()
    largest_rise, largest_fall = 1 / (peak + 1), math.pi / 2 / (schedule.total_steps - peak)
    assert np.diff(factors).max(initial=0) <= largest_rise + 1e-12 and -np.diff(factors).min() <= largest_fall + 1e-12


def test_epochs_that_are_no_whole_number_of_steps_are_rounded() -> None:
    assert Schedule.of(config.Training(epochs=0.3), steps_per_epoch=10.0).total_steps == 3
    assert Schedule.of(config.Training(epochs=20), steps_per_epoch=5_179_510 / 1024).total_steps == 101_162
    short = Schedule.of(config.Training(epochs=0.01, warmup_epochs=0.009), steps_per_epoch=1.0)
    assert (short.total_steps, short.warmup_steps, short.factor(0)) == (1, 0, 1.0)
    steep = Schedule.of(config.Training(epochs=1, warmup_epochs=0.95), steps_per_epoch=4.0)
    assert [steep.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 0.0]


def test_the_margin_grows_from_zero() -> None:
    schedule = Schedule.of(config.Training(epochs=10), steps_per_epoch=8.0)
    assert [schedule.margin_scale(step, 0.5) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.margin_scale(0, 0.0) == 1.0


@pytest.mark.parametrize("warmup", [0, 1])
def test_multistep_is_that_of_torch_behind_the_warm_up(warmup: int) -> None:
    training = config.Training(
        epochs=6, warmup_epochs=warmup, schedule="multistep", milestones=(2.0, 3.5, 5.0), gamma=0.2
    )
    schedule = Schedule.of(training, steps_per_epoch=4.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    peer = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[8, 14, 20], gamma=0.2)
    expected = []
    for _ in range(24):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        peer.step()
    expected[: 4 * warmup] = [(step + 1) / (4 * warmup + 1) for step in range(4 * warmup)]
    assert [schedule.factor(step) for step in range(schedule.total_steps)] == pytest.approx(expected, rel=1e-12)


def test_a_backbone_that_is_frozen_whole_leaves_nothing_to_do() -> None:
    model = small().requires_grad_(False)
    for settings in (SGD, ADAMW):
        optimizer = build_optimizer(model, settings, decay_norms_and_biases=False)
        before = snapshot(model, optimizer)
        set_lr(optimizer, 0.3)
        norm = clip_gradients(model.parameters(), 5.0)
        assert norm == 0
        step_if_finite(optimizer, norm.isfinite())
        assert identical(snapshot(model, optimizer), before)
        assert optimizer_tensors(optimizer, model) == {}


@pytest.mark.parametrize("settings", [{"schedule": "cosine"}, {"power": 2.0}])
def test_a_schedule_that_starts_again_is_that_of_a_run_which_begins_there(settings):
    whole = config.Training(epochs=5.0, warmup_epochs=1.0, **settings)
    added = config.Training(epochs=3.0, warmup_epochs=1.0, **settings)
    again, fresh = Schedule.of(whole, 10, offset=20), Schedule.of(added, 10)
    assert (again.total_steps, fresh.total_steps) == (50, 30)
    assert [again.factor(20 + step) for step in range(31)] == [fresh.factor(step) for step in range(31)]
    # The margin's warm-up is one of the run's beginning.
    assert again.margin_scale(25, 4.0) == Schedule.of(whole, 10).margin_scale(25, 4.0)
