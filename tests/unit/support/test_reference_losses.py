"""The references against numbers worked out by hand, closed values of the papers, and finite differences."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import eval_chebyt
from torch import Tensor

from recognition import config
from tests.support.reference_losses import LOSSES, DenseHead, cos_of_sum, falling_cos, ranked

DETACHED = [name for name in LOSSES if name.startswith(("adaface", "circle")) or name.endswith("straight-through")]
STATEFUL = [name for name in LOSSES if name.startswith(("adaface", "adacos", "curricularface"))]
degrees = math.radians


def random_head(name: str, classes: int = 4, size: int = 3, batch: int = 3) -> tuple[DenseHead, Tensor, Tensor, Tensor]:
    """A head with a state of some steps later, embeddings of lengths from 0.5 to 3, labels, and margins."""
    settings, generator = LOSSES[name], torch.Generator().manual_seed(1)
    weight = torch.randn(classes * settings.subcenters, size, generator=generator, dtype=torch.float64)
    labels = torch.arange(batch) % classes
    noise = F.normalize(torch.randn(batch, size, generator=generator, dtype=torch.float64))
    pull = torch.linspace(1.5, -1.0, batch, dtype=torch.float64)[:, None]
    lengths = torch.linspace(0.5, 3.0, batch, dtype=torch.float64)[torch.randperm(batch, generator=generator), None]
    x = F.normalize(F.normalize(weight[labels * settings.subcenters]) * pull + noise) * lengths
    head = DenseHead.initial(settings, weight, torch.randn(classes, generator=generator))
    later = {"mean": 1.5, "deviation": 0.8, "scale": 6.0, "t": 0.3}
    head.state = {name: torch.tensor(later[name], dtype=torch.float64) for name in head.state}
    return head, x, labels, torch.linspace(0.3, 0.6, batch, dtype=torch.float64)[torch.arange(batch) * 3 % batch]


def gradients(head: DenseHead, loss: Callable[[DenseHead, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(loss(head, x), [x, head.weight]))


def differences(head: DenseHead, loss: Callable[[DenseHead, Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The same gradients by central differences."""
    found, head = [], replace(head, weight=head.weight.detach())
    for start, at in ((x, lambda t: loss(head, t)), (head.weight, lambda t: loss(replace(head, weight=t), x))):
        shifts = 1e-6 * torch.eye(start.numel(), dtype=torch.float64).view(-1, *start.shape)
        gradient = [(at(start + shift) - at(start - shift)).item() / 2e-6 for shift in shifts]
        found.append(torch.tensor(gradient, dtype=torch.float64).view_as(start))
    return found


def close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol, atol)  # 1e-16 of a loss of 30, over 2e-6


# One embedding of length 2 at angle 0, its class at 60 degrees, and three other classes.
C1, C2, C3 = (math.cos(degrees(angle)) for angle in (80, 30, 200))
PLAIN = [10 * C1, 10 * C2, 10 * C3]
Z, KIND = 45 / 100.001, 10 * math.cos(degrees(60) + 0.3)
FACE: dict[str, Any] = {"scale": 10.0}
MAG: dict[str, Any] = {"scale": 10.0, "upper_norm": 5.0, "lower_margin": 0.2, "upper_margin": 1.0, "norm_weight": 3.0}
ADA: dict[str, Any] = {"scale": 10.0, "momentum": 0.5}
BY_HAND: list[tuple[Any, float, list[float]]] = [
    (config.Softmax(), 0.5 + 0.1, [4 * C1 + 0.2, 2 * C2 + 0.3, 6 * C3 + 0.4]),
    (config.NormFace(scale=10.0), 5.0, PLAIN),
    # In step 2, lambda = 4; psi(4 * 60) = -cos(240) - 2 = -1.5; 0.5 + (-1.5 - 0.5) / 5 = 0.1.
    (config.SphereFace(lambda_start=8.0, lambda_decay=0.5, lambda_end=1.0), 0.2, [2 * C1, 2 * C2, 2 * C3]),
    # lambda = 5; psi(2 * 60) = -0.5.
    (config.SphereFace(margin=2.0, lambda_start=8.0, lambda_decay=0.5), 2 * (0.5 - 1 / 6), [2 * C1, 2 * C2, 2 * C3]),
    (config.SphereFaceR(**FACE, margin=2.0), -5.0, PLAIN),
    (config.SphereFaceR(**FACE, margin=4.0), -10.0, PLAIN),
    # Angles are at most 180 degrees: 200 is 160.
    (config.SphereFaceR(**FACE, margin=2.0, version=2), 5.0, [10 * math.cos(degrees(a)) for a in (40, 15, 80)]),
    (config.CosFace(**FACE, margin=0.3), 2.0, PLAIN),
    (config.ArcFace(**FACE, margin=degrees(30)), 0.0, PLAIN),
    (config.ArcFace(**FACE, margin=degrees(150)), 5 - 10 * degrees(150) * 0.5, PLAIN),
    (config.ArcFace(**FACE, margin=degrees(150), straight_through=True), -5 * math.sqrt(3), PLAIN),
    (config.Combined(**FACE, m1=2.0, m2=degrees(30), m3=0.1), -5 * math.sqrt(3) - 1, PLAIN),
    (config.Combined(**FACE, m1=4.0, m2=degrees(30), m3=0.1), -21.0, PLAIN),
    # The mean moves to 11, the deviation of one norm does not exist; (2 - 11) / 100 * 20 is clipped to -1.
    (config.AdaFace(**ADA, margin=degrees(30), concentration=20.0), 0.0, PLAIN),
    (config.AdaFace(**ADA, concentration=5.0), 10 * (math.cos(degrees(60) + 0.4 * Z) - 0.4 * (1 - Z)), PLAIN),
    # 60 + 130 degrees are clipped to a little less than 180.
    (config.AdaFace(**ADA, margin=degrees(130), concentration=20.0), -10 * math.cos(1e-3), PLAIN),
    (config.MagFace(**MAG, lower_norm=1.0), 10 * math.cos(degrees(60) + 0.4), PLAIN),
    (config.MagFace(**MAG, lower_norm=4.0), 10 * math.cos(degrees(60) + 0.2), PLAIN),
    (config.ElasticFace(**FACE), 10 * math.cos(degrees(60) + 0.25), PLAIN),
    (config.ElasticFace(**FACE, base="cosface"), 2.5, PLAIN),
    # t = 0.1 * 0.5; only the class at 30 degrees is nearer than 60 degrees and the margin's 17.
    (config.CurricularFace(**FACE, margin=0.3, momentum=0.1), KIND, [10 * C1, 10 * C2 * (0.05 + C2), 10 * C3]),
    (config.MVSoftmax(**FACE, weight=1.2), 1.5, [10 * (1.2 * C1 + 0.2), 10 * (1.2 * C2 + 0.2), 10 * C3]),
    (config.MVSoftmax(**FACE, base="arcface", margin=0.3, weight=1.2), KIND, [10 * C1, 12 * C2 + 2, 10 * C3]),
    (config.Circle(scale=4.0, margin=0.25), -0.75, [4 * (C1**2 - 0.0625), 4 * (C2**2 - 0.0625), 0.0]),
]


def by_hand(**settings: Any) -> DenseHead:
    lengths, angles, bias = torch.tensor([[0.5, 2, 1, 3], [60, 80, 30, 200], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    weight = lengths[:, None] * torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1)
    return DenseHead.initial(config.Head(**settings), weight, bias)


def value(head: DenseHead, **options: Any) -> float:
    options = {"step": 2, "margins": torch.tensor([0.25], dtype=torch.float64), **options}
    return head.loss(torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.tensor([0]), **options).item()


def cross_entropy(target: float, others: list[float]) -> float:
    return math.log(sum(math.exp(z - target) for z in [target, *others]))


@pytest.mark.parametrize(("loss", "target", "others"), BY_HAND)
def test_worked_out_by_hand(loss: config.Loss, target: float, others: list[float]) -> None:
    expected = cross_entropy(target, others)
    if isinstance(loss, config.MagFace):
        a = max(2.0, loss.lower_norm)
        expected += 3 * (a / 25 + 1 / a)
    assert value(by_hand(loss=loss)) == pytest.approx(expected, rel=1e-10)


def test_adacos_by_hand() -> None:
    first = math.sqrt(2) * math.log(3)
    # 60 degrees count as 45.
    scale = math.sqrt(2) * math.log(sum(math.exp(first * c) for c in (C1, C2, C3)))
    head = by_hand(loss=config.AdaCos())
    for training, s in ((False, first), (True, scale), (False, scale)):
        assert value(head, training=training) == pytest.approx(cross_entropy(s / 2, [s * C1, s * C2, s * C3]))
        assert head.state["scale"] == pytest.approx(s)


def test_logistic_losses_by_hand() -> None:
    softplus, b = partial(np.logaddexp, 0), math.log(40)
    expected = softplus(b - 1) + sum(softplus(10 * c - b) for c in (C1, C2, C3))
    assert value(by_hand(loss=config.UCE(scale=10.0, margin=0.4))) == pytest.approx(expected)
    head = by_hand(loss=config.SphereFace2(scale=10.0, margin=0.2, exponent=2.0, balance=0.7, weight=5.0))
    head.scalars["bias"] = torch.tensor(0.3, dtype=torch.float64)
    genuine = softplus(-(10 * (2 * 0.75**2 - 1 - 0.2) + 0.3))
    impostors = sum(softplus(10 * (2 * ((c + 1) / 2) ** 2 - 1 + 0.2) + 0.3) for c in (C1, C2, C3))
    assert value(head) == pytest.approx(5 / 10 * (0.7 * genuine + 0.3 * impostors))


def test_filter_subcenters_and_taken_classes_by_hand() -> None:
    loss, far = config.CosFace(scale=10.0, margin=0.3), pytest.approx(cross_entropy(2.0, [10 * C1, 10 * C3]))
    near, zero = config.Filter(threshold=0.5), config.Filter(threshold=0.5, zero=True)
    assert value(by_hand(loss=loss, filter=near)) == far
    assert value(by_hand(loss=loss), taken=torch.tensor([0, 1, 3])) == far
    assert value(by_hand(loss=loss, filter=zero)) == pytest.approx(cross_entropy(2.0, [10 * C1, 0.0, 10 * C3]))
    # A zero is below cos(60 degrees + 0.3), so that it is not bent; the class at 80 degrees is above cos(60 + 63).
    bent = by_hand(loss=config.CurricularFace(scale=10.0, margin=1.1, momentum=0.1), filter=zero)
    expected = cross_entropy(10 * math.cos(degrees(60) + 1.1), [10 * C1 * (0.05 + C1), 0.0, 10 * C3])
    assert value(bent) == pytest.approx(expected)
    # Two classes of two rows: that of 60 and 80 degrees, and that of 30 and 200.
    assert value(by_hand(loss=loss, subcenters=2)) == pytest.approx(cross_entropy(2.0, [10 * C2]))


def test_equal_subcenters_give_the_gradient_to_the_first() -> None:
    head = DenseHead.initial(config.Head(loss=config.CosFace(), subcenters=2), torch.eye(2).repeat_interleave(2, 0))
    loss = head.loss(torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([1]))
    assert torch.autograd.grad(loss, head.weight)[0].any(1).tolist() == [True, False, True, False]


def test_taken_classes_are_a_smaller_head() -> None:
    for name in ("softmax", "arcface", "cosface-subcenters", "curricularface-filter"):
        head, x, labels, _ = random_head(name, classes=8)
        taken, labels = torch.tensor([1, 2, 4, 7]), torch.tensor([4, 1, 7])
        rows = head.weight.detach().unflatten(0, (8, -1))[taken].flatten(0, 1).requires_grad_()
        small = replace(head, weight=rows, bias=None if head.bias is None else head.bias.detach()[taken])
        expected = small.loss(x, torch.searchsorted(taken, labels), training=False)
        found = head.loss(x, labels, training=False, taken=taken)
        assert found.item() == pytest.approx(expected.item())
        gradient, of_rows = torch.autograd.grad(found + expected, [head.weight, rows])
        gradient = gradient.unflatten(0, (8, -1))
        close([gradient[taken].flatten(0, 1)], [of_rows])
        assert not gradient[[0, 3, 5, 6]].any()


WEAKER: list[tuple[Any, dict[str, float]]] = [
    (config.SphereFace(margin=4.0), {"margin": 1.75}),
    (config.SphereFaceR(margin=3.0), {"margin": 1.5}),
    (config.SphereFaceR(margin=3.0, version=2), {"margin": 1.5}),
    (config.CosFace(margin=0.4), {"margin": 0.1}),
    (config.ArcFace(margin=2.0), {"margin": 0.5}),
    (config.ArcFace(margin=2.0, straight_through=True), {"margin": 0.5}),
    (config.Combined(m1=3.0, m2=0.4, m3=0.2), {"m1": 1.5, "m2": 0.1, "m3": 0.05}),
    (config.AdaFace(margin=0.4), {"margin": 0.1}),
    (config.MagFace(**MAG, lower_norm=1.0), {"lower_margin": 0.05, "upper_margin": 0.25}),
    (config.CurricularFace(margin=0.8), {"margin": 0.2}),
    (config.MVSoftmax(margin=0.4), {"margin": 0.1}),
    (config.MVSoftmax(base="arcface", margin=0.8), {"margin": 0.2}),
    (config.SphereFace2(margin=0.4), {"margin": 0.1}),
    (config.UCE(margin=0.4), {"margin": 0.1}),
    (config.Circle(), {}),
]


@pytest.mark.parametrize(("loss", "weaker"), WEAKER)
def test_strength_weakens_the_margin(loss: config.Loss, weaker: dict[str, float]) -> None:
    heads = by_hand(loss=loss), by_hand(loss=loss.model_copy(update=weaker))
    for head in heads:
        # Where it starts depends on the margin.
        head.scalars = {name: torch.tensor(0.3, dtype=torch.float64) for name in head.scalars}
    assert value(heads[0], margin_scale=0.25) == pytest.approx(value(heads[1]), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_the_poles(name: str) -> None:
    head = DenseHead.initial(LOSSES[name], torch.eye(4).repeat_interleave(LOSSES[name].subcenters, 0))
    x, labels = torch.diag(torch.tensor([1, -1, 2, 1], dtype=torch.float64)), torch.arange(4)
    found = gradients(head, lambda head, x: head.loss(x, labels, margins=x.new_full((4,), 0.3)), x)
    assert all(gradient.isfinite().all() for gradient in found)


def test_drawn_margins() -> None:
    weaker = torch.tensor([0.05], dtype=torch.float64)
    for head in (by_hand(loss=config.ElasticFace(base="arcface")), by_hand(loss=config.ElasticFace(base="cosface"))):
        assert value(head, margin_scale=0.2) == pytest.approx(value(head, margins=weaker), rel=1e-12)
    # The smallest margin for the largest cosine.
    margins, cosine = torch.tensor([[0.40, 0.30, 0.43, 0.35, 0.32, 0.37], [0.1, 0.9, 0.5, 0.7, 0.3, 0.2]])
    assert ranked(margins, cosine).tolist() == pytest.approx([0.43, 0.30, 0.35, 0.32, 0.37, 0.40])


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in DETACHED])
def test_gradients_are_derivatives(name: str) -> None:
    head, x, labels, margins = random_head(name)
    scalars = list(head.scalars.values())

    def loss(x: Tensor, weight: Tensor, *scalars: Tensor) -> Tensor:
        at = replace(head, weight=weight, scalars=dict(zip(head.scalars, scalars, strict=True)))
        return at.loss(x, labels, step=3, margin_scale=0.9, training=False, margins=margins)

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), head.weight, *scalars))


@pytest.mark.parametrize("name", [name for name in LOSSES if "plus" not in name])
def test_loss_is_the_mean_of_each_sample_alone(name: str) -> None:
    head, x, labels, margins = random_head(name, batch=4)
    alone = [head.loss(x[i], labels[i], training=False, margins=margins[i]).item() for i in torch.eye(4).bool()]
    assert head.loss(x, labels, training=False, margins=margins).item() == pytest.approx(sum(alone) / 4)


@pytest.mark.parametrize("name", [name for name in DETACHED if name.startswith("adaface")])
def test_adaface_takes_the_norm_for_a_constant(name: str) -> None:
    head, x, labels, _ = random_head(name)
    norm, loss = x.norm(dim=1, keepdim=True), partial(DenseHead.loss, labels=labels, training=False)
    close(gradients(head, loss, x), differences(head, lambda head, x: loss(head, norm * F.normalize(x)), x))


@pytest.mark.parametrize("name", [name for name in DETACHED if name.startswith("circle")])
def test_circle_takes_its_weights_for_constants(name: str) -> None:
    head, x, labels, _ = random_head(name)
    loss, filtering = head.settings.loss, head.settings.filter
    assert isinstance(loss, config.Circle)
    own = F.one_hot(labels, 4).bool()

    def cosines(head: DenseHead, x: Tensor) -> Tensor:
        return (F.normalize(x) @ F.normalize(head.weight).T).unflatten(1, (4, -1)).amax(2)

    at = cosines(head, x).detach()
    alpha = torch.where(own, 1 + loss.margin - at, at + loss.margin).clamp(min=0)
    left_out = ~own & (at > (filtering.threshold if filtering else 1))
    optimum, scale = torch.where(own, 1 - loss.margin, loss.margin), loss.scale

    def frozen(head: DenseHead, x: Tensor) -> Tensor:
        logits = scale * alpha * (cosines(head, x) - optimum)
        return F.cross_entropy(logits.masked_fill(left_out, -torch.inf), labels)

    assert head.loss(x, labels).item() == pytest.approx(frozen(head, x).item())
    close(gradients(head, lambda head, x: head.loss(x, labels), x), differences(head, frozen, x))


def test_straight_through_is_a_shift_by_a_constant() -> None:
    head, x, labels, _ = random_head("arcface-straight-through")
    own = F.one_hot(labels, 4).bool()
    target = F.cosine_similarity(x, head.weight[labels]).detach()
    shift = own * ((target.acos() + 0.5).cos() - target)[:, None]

    def frozen(head: DenseHead, x: Tensor) -> Tensor:
        return F.cross_entropy(64 * (F.normalize(x) @ F.normalize(head.weight).T + shift), labels)

    close(gradients(head, lambda head, x: head.loss(x, labels), x), differences(head, frozen, x))


@pytest.mark.parametrize("name", STATEFUL)
def test_state_follows_a_batch_first_and_is_a_constant_of_it(name: str) -> None:
    head, x, labels, _ = random_head(name, classes=19, size=24, batch=10)
    before, batch = dict(head.state), x.norm(dim=1)
    found = gradients(head, lambda head, x: head.loss(x, labels), x)
    assert all(head.state[name] != before[name] and not head.state[name].requires_grad for name in before)
    close(found, gradients(head, lambda head, x: head.loss(x, labels, training=False), x), rtol=0, atol=0)
    if isinstance(head.settings.loss, config.AdaFace):
        momentum = head.settings.loss.momentum
        assert head.state["mean"] == pytest.approx((1 - momentum) * 1.5 + momentum * batch.mean().item())
        assert head.state["deviation"] == pytest.approx((1 - momentum) * 0.8 + momentum * batch.std().item())


def test_every_loss_and_option_has_a_setting() -> None:
    assert {type(settings.loss) for settings in LOSSES.values()} == set(config.Loss.variants())
    found = {}
    for name in LOSSES:
        head, x, labels, margins = random_head(name, classes=19, size=24, batch=10)
        loss = head.loss(x, labels, margins=margins)
        found[name] = loss.item(), torch.autograd.grad(loss, head.weight)[0].norm().item()
    same = [(a, b) for a in found for b in found if a < b and found[a] == pytest.approx(found[b], rel=1e-4)]
    assert not same


def test_softmax_of_normalised_weights_is_at_its_bound_on_a_simplex() -> None:
    # NormFace, proposition 2: log(1 + (C - 1) exp(-s C / (C - 1))), where all rows are equally far from one another.
    simplex = torch.eye(5, dtype=torch.float64) - 0.2
    head = DenseHead.initial(config.Head(loss=config.NormFace(scale=7.0)), simplex)
    assert head.loss(simplex, torch.arange(5)).item() == pytest.approx(math.log(1 + 4 * math.exp(-7 * 5 / 4)))


def test_adacos_begins_with_the_scale_of_orthogonal_classes() -> None:
    # The paper's fixed scale, sqrt(2) log(C - 1), is what it computes where negatives are orthogonal.
    head = DenseHead.initial(config.Head(loss=config.AdaCos()), torch.eye(6))
    assert head.state["scale"] == pytest.approx(math.sqrt(2) * math.log(5))
    head.loss(-torch.eye(6, dtype=torch.float64), torch.arange(6))
    assert head.state["scale"] == pytest.approx(math.sqrt(2) * math.log(5))
    # The angle is 0, and a median of two is the lower one.
    head.loss(torch.eye(6, dtype=torch.float64)[[0, 1]], torch.tensor([0, 3]))
    assert head.state["scale"] == pytest.approx(math.log((9 + 5 ** math.sqrt(2)) / 2), rel=1e-5)
    # A scale that would not be finite, and one below zero, are not taken over.
    for rows in ([0], [0, 1]):
        head.loss(-torch.eye(6, dtype=torch.float64)[[1]], torch.tensor([0]), taken=torch.tensor(rows))
        assert head.state["scale"] == pytest.approx(math.log((9 + 5 ** math.sqrt(2)) / 2), rel=1e-5)


def test_learned_scalars_start_as_their_papers_say() -> None:
    x, labels, rows = torch.eye(7, dtype=torch.float64)[:1], torch.tensor([2]), torch.eye(7)[1:]
    # Orthogonal to every class: sphereface2 balances the gradients of b from the target and the rest.
    head = DenseHead.initial(config.Head(loss=config.SphereFace2()), rows)
    head.loss(x, labels).backward()
    assert head.scalars["bias"].grad == pytest.approx(0, abs=1e-12)
    loss = DenseHead.initial(config.Head(loss=config.UCE(scale=10.0, margin=0.4)), rows).loss(x, labels)
    assert loss.item() == pytest.approx(math.log1p(60 * math.exp(4)) + 5 * math.log1p(1 / 60))


def test_falling_cosine_and_guard_go_on_falling() -> None:
    theta = torch.linspace(0, math.pi - 1e-9, 1001, dtype=torch.float64)
    psi = falling_cos(4 * theta)
    assert (psi.diff() <= 0).all()
    assert [psi[0].item(), psi[-1].item()] == pytest.approx([1, -7])
    assert psi[:251].numpy() == pytest.approx(eval_chebyt(4, theta[:251].cos().numpy()))
    assert (cos_of_sum(theta[1:].cos(), 0.5).diff() < 0).all()
