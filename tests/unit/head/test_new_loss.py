"""A loss is added by two classes, its settings and its computation; no list has to know of it."""

from dataclasses import dataclass
from inspect import isabstract
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from recognition import config
from recognition.head import ShardedSoftmax
from recognition.head.losses.base import BY_SETTINGS, CrossEntropy, Loss, MarginSoftmax, Targets
from recognition.head.losses.build import build_loss
from recognition.head.losses.logistic import BinaryCrossEntropy
from recognition.head.losses.negatives import Negatives
from tests.support.ranks import run_ranks
from tests.support.reference_head import data, error, errors_of_loss, fill, run

CLASSES, BATCH, SIZE, LR = 11, 9, 24, 0.3
SCALE, MARGIN, POWER = 12.0, 0.2, 3


@dataclass(frozen=True)
class PowerNegatives(Negatives):
    """`s c^n`."""

    scale: float
    power: int

    def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * cosine**self.power

    def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
        return self.scale * self.power * cosine ** (self.power - 1)


def add_loss() -> None:
    """Define `power`: `z_y = s (c_y - m)` and `z_j = s c_j^n`."""

    class Power(config.ScaledLoss):
        name: Literal["power"] = "power"
        margin: PositiveFloat = MARGIN
        power: int = 2

    class PowerLoss(CrossEntropy):
        settings: Power

        @property
        def bound(self) -> float:
            return self.settings.scale

        def negatives(self, margin_scale: float) -> PowerNegatives:
            return PowerNegatives(self.settings.scale, self.settings.power)

        def target(self, targets: Targets) -> Tensor:
            return self.settings.scale * (targets.product - targets.margin_scale * self.settings.margin)

    config.Head.model_rebuild(force=True)
    config.Config.model_rebuild(force=True)


def reference(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The mean loss in float64, from all logits."""
    cosine = F.normalize(x) @ F.normalize(weight).T
    own = F.one_hot(labels, CLASSES).bool()
    logits = SCALE * torch.where(own, cosine - MARGIN, cosine**POWER)
    return F.cross_entropy(logits, labels)


def step_with_a_new_loss(path: str) -> dict[str, float | str]:
    """Errors of a step, relative to the reference, and the message of a mistake in the new loss's settings."""
    add_loss()
    given = ["head.loss.name=power", f"head.loss.scale={SCALE}", f"head.loss.power={POWER}"]
    with pytest.raises(config.ConfigError) as mistake:
        config.load(path, [*given, "head.loss.margni=0.1"], check_paths=False)
    settings = config.load(path, given, check_paths=False)
    assert config.load(_written(path, settings.to_toml()), check_paths=False) == settings

    x, labels, weight, _ = data(CLASSES, BATCH, size=SIZE)
    head = ShardedSoftmax(
        settings.head, CLASSES, SIZE, seed=0, optimizer=config.SGD(momentum=0.0, weight_decay=0.0), device="cpu"
    )
    fill(head, weight)
    x.requires_grad_()
    weight.requires_grad_()
    expected = reference(x, labels, weight)
    expected.backward()
    assert x.grad is not None
    assert weight.grad is not None
    output, gradient = run(head, x.detach(), labels, [BATCH], lr=LR)
    moved = weight.detach() - LR * weight.grad
    return {
        "loss": errors_of_loss(output.loss, expected),
        "embeddings": error(gradient, x.grad),
        "update": error(head.rows.weight.double() - weight.detach(), moved - weight.detach()),
        "mistake": str(mistake.value),
    }


def _written(path: str, text: str) -> Path:
    again = Path(path).with_name("again.toml")
    again.write_text(text)
    return again


def test_two_classes_add_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\npath = "faces"\n\n[head]\nprecision = "float32"\nchunk = 4\n')
    (found,) = run_ranks(step_with_a_new_loss, 1, str(path))
    assert "head.loss.margni: unknown key; did you mean margin?" in found["mistake"]
    assert max(found["loss"], found["embeddings"], found["update"]) <= 1e-5


def test_every_loss_is_computed_by_the_class_of_its_name() -> None:
    found = {settings: loss.__name__ for settings, loss in BY_SETTINGS.items()}
    assert found == {settings: f"{settings.__name__}Loss" for settings in config.Loss.variants()}
    names = [get_args(settings.model_fields["name"].annotation)[0] for settings in config.Loss.variants()]
    assert len(set(names)) == len(names) >= 16


def test_a_loss_is_either_abstract_or_final() -> None:
    classes = [CrossEntropy, MarginSoftmax, BinaryCrossEntropy, *BY_SETTINGS.values()]
    assert isabstract(Loss)
    assert all(isabstract(loss) != getattr(loss, "__final__", False) for loss in classes)
    assert sum(isabstract(loss) for loss in classes) == 3


def test_settings_without_a_loss_are_refused() -> None:
    with pytest.raises(TypeError, match="no loss has settings ScaledLoss"):
        build_loss(config.ScaledLoss(), 10, seed=0, device=torch.device("cpu"))  # type: ignore[call-arg]


def test_a_name_and_settings_belong_to_one_loss() -> None:
    with pytest.raises(TypeError, match="two losses are called arcface: ArcFace and Again"):

        class Again(config.Loss):
            name: Literal["arcface"] = "arcface"

    with pytest.raises(TypeError, match="two losses have settings ArcFace: ArcFaceLoss, Second"):

        class Second(Loss):
            settings: config.ArcFace


def test_what_is_not_finite_stays_out_of_the_running_scalars() -> None:
    loss = build_loss(config.AdaFace(momentum=0.5), 10, seed=0, device=torch.device("cpu"))
    loss.observe(torch.zeros(2), torch.tensor([10.0, torch.nan]))
    assert (loss.running["mean"], loss.running["deviation"]) == (20.0, 100.0)
    loss.observe(torch.zeros(1), torch.tensor([10.0]))
    assert (loss.running["mean"], loss.running["deviation"]) == (15.0, 100.0)
