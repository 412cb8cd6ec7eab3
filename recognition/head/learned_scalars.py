"""Optimizer of the scalars that a loss learns, equal on all ranks: as for the class weights, but without decay."""

import torch
from torch import Tensor

from recognition import config

_CHECKPOINT_NAMES = {
    config.SGD: {"momentum_buffer": "momentum"},
    config.AdamW: {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "updates"},
}
"""Keys of the state that torch's optimizer keeps for a scalar, and the names that checkpoints have for them."""


class LearnedScalars:
    """Learned scalars with their gradients and moments; each gradient is that of the whole batch on every rank."""

    def __init__(self, values: dict[str, Tensor], optimizer: config.Optimizer) -> None:
        self._named, self._checkpoint_names = values, _CHECKPOINT_NAMES[type(optimizer)]
        self._optimizer: torch.optim.Optimizer
        if not values:
            # torch's first optimizer imports its compiler: 40 MB that most losses do without.
            return
        group = {"params": self.values, "weight_decay": 0.0}
        # Fused, because only the fused kernels can skip an update on the device.
        if isinstance(optimizer, config.SGD):
            self._optimizer = torch.optim.SGD([group], lr=0.0, momentum=optimizer.momentum, fused=True)
        else:
            self._optimizer = torch.optim.AdamW([group], lr=0.0, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        for value in self.values:
            value.grad = torch.zeros_like(value)
            # torch makes the state in the first step, too late for a checkpoint to be loaded into it.
            self._optimizer.state[value] = {key: torch.zeros_like(value) for key in self._checkpoint_names}

    @property
    def values(self) -> list[Tensor]:
        """The scalars themselves."""
        return list(self._named.values())

    @property
    def gradients(self) -> list[Tensor]:
        """Sums of the backward passes' gradients since the last `apply`."""
        return [value.grad for value in self.values if value.grad is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by its names in a checkpoint; loading into the tensors loads it."""
        return {
            f"loss.{name}.{saved}": self._optimizer.state[value][key]
            for name, value in self._named.items()
            for key, saved in self._checkpoint_names.items()
        }

    def add(self, gradients: list[Tensor]) -> None:
        """Add a backward pass's gradients."""
        for total, gradient in zip(self.gradients, gradients, strict=True):
            total += gradient

    def apply(self, lr: float, skip: Tensor) -> None:
        """Move by the sums of the gradients, unless `skip` (scalar) is 1, and start the sums anew.

        The decision is taken in torch's kernels, so the host does not wait for it.
        """
        if not self._named:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # The protocol between torch.amp.GradScaler and fused optimizers: an attribute for the length of one step.
        self._optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        try:
            self._optimizer.step()
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
        for gradient in self.gradients:
            gradient.zero_()
