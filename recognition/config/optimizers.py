"""The optimizers, of the backbone and of the head's class weights alike."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from recognition.config.base import BelowOne, Section


class SGD(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    """Peak learning rate, reached after the warm-up. Scale it with `training.global_batch`."""
    momentum: BelowOne = 0.9
    """Momentum, the fraction of the previous update that is kept."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay, multiplied by the learning rate in each update."""


class AdamW(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate, reached after the warm-up. Scale it with `training.global_batch`."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: PositiveFloat = 1e-8
    """Constant added to the denominator, for numerical stability."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay, multiplied by the learning rate in each update."""


Optimizer = Annotated[SGD | AdamW, Field(discriminator="name")]
