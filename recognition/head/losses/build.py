"""Construction of a loss from its settings; no list of losses is kept, neither here nor elsewhere."""

import importlib
import pkgutil

import torch

from recognition import config
from recognition.head import losses
from recognition.head.losses.base import BY_SETTINGS, Loss

for _module in pkgutil.iter_modules(losses.__path__, f"{losses.__name__}."):
    # Classes of losses make themselves known as they are defined.
    importlib.import_module(_module.name)


def build_loss(settings: config.Loss, num_classes: int, *, seed: int, device: torch.device) -> Loss:
    """Build the loss that a `head.loss` section describes, over `num_classes` classes.

    `seed` keys what the loss draws; its scalars lie on `device`. Raises TypeError when no class has such settings.
    """
    kind = type(settings)
    if kind not in BY_SETTINGS:
        raise TypeError(f"no loss has settings {kind.__name__}: a class of recognition/head/losses must declare them")
    return BY_SETTINGS[kind](settings, num_classes, seed=seed, device=device)
