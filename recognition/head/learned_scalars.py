"""The scalars that a loss learns: moved as the rows are, without decay, and equal on all ranks."""

import torch
from torch import Tensor

from recognition import config


class LearnedScalars:
    """Learned scalars with their gradients and moments; each gradient is that of the whole batch on every rank."""

    def __init__(self, values: dict[str, Tensor], optimizer: config.Optimizer) -> None:
        self._named, self._optimizer = values, optimizer
        self.gradients = [torch.zeros_like(value) for value in values.values()]
        """What the backward passes have added up since the last `apply`."""
        self._first = [torch.zeros_like(value) for value in values.values()]
        self._second = [torch.zeros_like(value) for value in values.values()]
        self._updates = [torch.zeros_like(value) for value in values.values()]

    @property
    def values(self) -> list[Tensor]:
        """The scalars themselves."""
        return list(self._named.values())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the values."""
        found: dict[str, Tensor] = {}
        for number, name in enumerate(self._named):
            if isinstance(self._optimizer, config.SGD):
                found[f"loss.{name}.momentum"] = self._first[number]
            else:
                found[f"loss.{name}.exp_avg"] = self._first[number]
                found[f"loss.{name}.exp_avg_sq"] = self._second[number]
                found[f"loss.{name}.updates"] = self._updates[number]
        return found

    def add(self, gradients: list[Tensor]) -> None:
        """Add a backward pass's gradients."""
        for total, gradient in zip(self.gradients, gradients, strict=True):
            total += gradient

    def apply(self, lr: float, skip: Tensor, scale: float = 1.0) -> None:
        """Move by `scale` times what was added up, unless `skip` is 1, and start anew."""
        for number, value in enumerate(self.values):
            gradient = self.gradients[number] * scale
            tensors = [value, self._first[number], self._second[number], self._updates[number]]
            for tensor, new in zip(tensors, self._moved(lr, gradient, *tensors), strict=True):
                tensor.copy_(torch.where(skip.bool(), tensor, new))
            self.gradients[number].zero_()

    def _moved(
        self, lr: float, gradient: Tensor, value: Tensor, first: Tensor, second: Tensor, updates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        match self._optimizer:
            case config.SGD(momentum=momentum):
                first = momentum * first + gradient
                return value - lr * first, first, second, updates
            case config.AdamW(betas=(beta1, beta2), eps=eps):
                first, second = torch.lerp(first, gradient, 1 - beta1), torch.lerp(second, gradient**2, 1 - beta2)
                updates = updates + 1
                mean, square = first / (1 - beta1**updates), second / (1 - beta2**updates)
                return value - lr * mean / (square.sqrt() + eps), first, second, updates
