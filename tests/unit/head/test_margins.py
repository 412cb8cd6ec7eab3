import math

import pytest
import torch

from recognition import config
from recognition.head.losses.base import Targets
from recognition.head.losses.build import build_loss

MARGINS = [
    config.Softmax(),
    config.NormFace(scale=30.0),
    config.CosFace(scale=64.0, margin=0.35),
    config.ArcFace(scale=64.0, margin=0.5),
    config.ArcFace(scale=1.0, margin=2.5),
    config.ArcFace(scale=64.0, margin=0.5, straight_through=True),
    config.Combined(scale=32.0, m1=1.0, m2=0.3, m3=0.2),
    config.Combined(scale=64.0, m1=1.35, m2=0.1, m3=0.0),
    config.Combined(scale=4.0, m1=4.0, m2=0.0, m3=0.0),
    config.SphereFaceR(),
    config.SphereFaceR(version=2),
]
names = [f"{margin.name}-{number}" for number, margin in enumerate(MARGINS)]


def logit(margin: config.Loss, cosine: torch.Tensor, margin_scale: float) -> torch.Tensor:
    loss = build_loss(margin, 10, seed=0, device=torch.device("cpu"))
    return loss.target(Targets(cosine, torch.ones_like(cosine), margin_scale, 0))


def by_the_paper(margin: config.Loss, cosine: float, margin_scale: float) -> float:
    """The logit as its paper writes it, one number at a time with the standard library."""
    theta = math.acos(cosine)
    match margin:
        case config.Softmax():
            return cosine
        case config.NormFace(scale=s):
            return s * cosine
        case config.CosFace(scale=s, margin=m):
            return s * (cosine - margin_scale * m)
        case config.ArcFace(scale=s, margin=m, straight_through=direct):
            m *= margin_scale
            if direct or theta + m <= math.pi:
                return s * math.cos(theta + m)
            return s * (cosine - math.sin(math.pi - m) * m)
        case config.Combined(scale=s, m1=m1, m2=m2, m3=m3):
            angle = (1 + margin_scale * (m1 - 1)) * theta + margin_scale * m2
            k = int(angle // math.pi)
            return s * ((-1) ** k * math.cos(angle) - 2 * k - margin_scale * m3)
        case config.SphereFaceR(scale=s, margin=m, version=1):
            return s * math.cos(min((1 + margin_scale * (m - 1)) * theta, math.pi))
        case config.SphereFaceR(scale=s):
            return s * cosine
    raise AssertionError(margin)


@pytest.mark.parametrize("margin", MARGINS, ids=names)
@pytest.mark.parametrize("margin_scale", [0.0, 0.5, 1.0])
def test_values_are_the_paper_s(margin: config.Loss, margin_scale: float) -> None:
    cosine = torch.linspace(-0.999, 0.999, 201, dtype=torch.float64)
    expected = torch.tensor([by_the_paper(margin, c, margin_scale) for c in cosine.tolist()], dtype=torch.float64)
    torch.testing.assert_close(logit(margin, cosine, margin_scale), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("margin", MARGINS, ids=names)
def test_gradient_is_the_derivative_of_the_value(margin: config.Loss) -> None:
    cosine = torch.linspace(-0.983, 0.987, 37, dtype=torch.float64).requires_grad_()
    if isinstance(margin, config.ArcFace) and margin.straight_through:
        (gradient,) = torch.autograd.grad(logit(margin, cosine, 1.0).sum(), cosine)
        torch.testing.assert_close(gradient, torch.full_like(cosine, margin.scale))
    else:
        assert torch.autograd.gradcheck(lambda c: logit(margin, c, 0.7), cosine)


def test_arcface_has_the_gradient_of_the_angle() -> None:
    cosine = torch.tensor([-0.8, -0.2, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(logit(config.ArcFace(scale=10.0), cosine, 1.0).sum(), cosine)
    theta = cosine.detach().acos()
    torch.testing.assert_close(gradient, 10 * torch.sin(theta + 0.5) / torch.sin(theta))


@pytest.mark.parametrize("margin", MARGINS, ids=names)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_poles_and_nan_stays(margin: config.Loss, dtype: torch.dtype) -> None:
    cosine = torch.tensor([1.0, -1.0, 1 + 1e-6, -1 - 1e-6, 0.0, torch.nan], dtype=dtype, requires_grad=True)
    found = logit(margin, cosine, 1.0)
    (gradient,) = torch.autograd.grad(found[:5].sum(), cosine)
    assert found[:5].isfinite().all()
    assert gradient[:5].isfinite().all()
    assert found[5].isnan()


# The authors' guard of ArcFace keeps the order up to m = 2.33 only; straight-through has no guard.
@pytest.mark.parametrize("margin", [m for n, m in enumerate(MARGINS) if n not in (4, 5)])
def test_a_smaller_angle_is_never_worse(margin: config.Loss) -> None:
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert (logit(margin, cosine, 1.0).diff() > -1e-9).all()


@pytest.mark.parametrize("margin", MARGINS[1:], ids=names[1:])
def test_strength_zero_is_no_margin(margin: config.Loss) -> None:
    cosine = torch.linspace(-0.99, 0.99, 11, dtype=torch.float64)
    assert isinstance(margin, config.ScaledLoss)
    torch.testing.assert_close(logit(margin, cosine, 0.0), margin.scale * cosine)
