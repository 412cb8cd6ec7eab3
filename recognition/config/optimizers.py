"""The optimizers, of the backbone and of the head's class weights alike."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from recognition.config.base import BelowOne, Section


class SGD(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: BelowOne = 0.9
    """Momentum."""
    weight_decay: NonNegativeFloat = 5e-4
    """Weight decay."""


class AdamW(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay."""


Optimizer = Annotated[SGD | AdamW, Field(discriminator="name")]
