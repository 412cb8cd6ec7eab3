"""Dynamic loss scaling, which keeps small gradients from vanishing in float16 (Micikevicius et al. 2018)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from recognition import config

_GROWTH, _BACKOFF = 2.0, 0.5


class LossScale:
    """The factor of the loss, which halves when a gradient overflows and doubles after many steps without.

    It is updated on the device, so the host does not wait; ranks that see the same flags have the same scale. Without
    `enabled` it stays 1. torch's GradScaler looks for overflows itself; here the flag is the trainer's, which is false
    for a loss that is not finite too.
    """

    def __init__(self, settings: config.Training, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.tensor(settings.initial_loss_scale if enabled else 1.0, device=device)
        """Scalar, float32."""
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._growth_steps = settings.loss_scale_growth_steps

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, (1 / self.value).to(gradients[0].device))

    def update(self, finite: Tensor) -> None:
        """Update the scale after a step; `finite`: whether all its gradients were (scalar bool, on the device)."""
        if not self.enabled:
            return
        good = torch.where(finite, self._good_steps + 1, 0)
        grown = self.value * _GROWTH
        grows = (good >= self._growth_steps) & grown.isfinite()
        self.value.copy_(torch.where(grows, grown, torch.where(finite, self.value, self.value * _BACKOFF)))
        self._good_steps.copy_(torch.where(good >= self._growth_steps, 0, good))

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, exactly; empty where there is no scaling. Waits for the device."""
        if not self.enabled:
            return {}
        return {"value": self.value.item(), "good_steps": self._good_steps.item()}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore `state`; an empty one leaves the scale as it is."""
        if self.enabled and state:
            self.value.fill_(state["value"])
            self._good_steps.fill_(int(state["good_steps"]))
