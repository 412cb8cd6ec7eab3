"""The backbone's optimizer, its schedule as a function of the step, and an update that obeys a flag on the device."""

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recognition import config


def build_optimizer(
    backbone: nn.Module, optimizer: config.SGD | config.AdamW, *, decay_norms_and_biases: bool
) -> Optimizer:
    """SGD with momentum, or AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), over the trainable parameters.

    Without `decay_norms_and_biases`, parameters of at most one dimension (the scales and shifts of norms, biases,
    slopes of PReLU) form a group of their own that does not decay. The state starts as zeros, laid out as
    the parameters are, so build this when the backbone is on its device and in its memory format.
    Frozen ones are left out; where all are, it has nothing to do.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            (decayed if decay_norms_and_biases or parameter.ndim > 1 else undecayed).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decayed, optimizer.weight_decay), (undecayed, 0.0))
        if parameters
    ] or [{"params": []}]
    # Only the fused kernels can skip an update on the device; they are also the fastest, on a CPU too.
    built: Optimizer
    if isinstance(optimizer, config.SGD):
        built = torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, fused=True)
    else:
        built = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
    _start_state(built)
    return built


def _start_state(optimizer: Optimizer) -> None:
    """Make the state that a first step would make, as zeros.

    torch makes it in the first step, too late for loading a checkpoint in place; and if that step is skipped, SGD's
    momentum is left as uninitialised memory. SGD's first step from zeros is the same bit for bit: 0 momentum + g = g.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
            elif group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def optimizer_tensors(optimizer: Optimizer, backbone: nn.Module) -> dict[str, Tensor]:
    """The optimizer's whole state, by the names of the parameters: `momentum_buffer.<name>`; `exp_avg.<name>`, ...

    The tensors are the optimizer's own, so loading into them in place restores it, before the first step too.
    `backbone` is the module whose parameters were given to `build_optimizer`, without a wrapper that renames them.
    """
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    return {
        f"{key}.{names[parameter]}": tensor
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, tensor in optimizer.state[parameter].items()
    }


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their global 2-norm is at most `max_norm`; 0 leaves them as they are.

    Returns the norm before clipping, a scalar tensor on the gradients' device; nothing waits for the device. A norm
    that is not finite spoils the gradients: give `step_if_finite` a flag that knows it.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: Optimizer, finite: Tensor) -> None:
    """Update the parameters, unless `finite` (a scalar boolean tensor on their device) is false.

    The decision is taken in the kernel, so the host does not wait for it. A skipped update leaves parameters and state
    bit for bit as they were. The flag must be the same on all ranks.
    """
    # torch.amp.GradScaler's protocol with fused optimizers: attributes for the length of one step.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Schedule:
    """Learning rate and margin as functions of the step, t = 0 ... total_steps - 1; there is no state to save."""

    total_steps: int
    """Updates of the run."""
    warmup_steps: int
    """Updates before the peak; below `total_steps` - `offset`."""
    steps_per_epoch: float
    """Updates per pass over the data; not a whole number as a rule."""
    shape: Literal["polynomial", "cosine", "multistep"] = "polynomial"
    """How the rate falls from the peak, at t = warmup_steps: to zero at t = total_steps, or at each of `milestones`."""
    power: float = 1.0
    """Exponent of the polynomial."""
    milestones: tuple[int, ...] = ()
    """Steps of `multistep`, rising."""
    gamma: float = 0.1
    """What each of them multiplies by."""
    offset: int = 0
    """The step at which the rate starts again: it is that of a run that begins there, over the steps that are left."""

    @classmethod
    def of(cls, training: config.Training, steps_per_epoch: float, offset: int = 0) -> "Schedule":
        """The schedule that a configuration describes; epochs are rounded to the nearest step, and to one at least."""
        total_steps = max(1, round(training.epochs * steps_per_epoch))
        warmup_steps = max(0, min(round(training.warmup_epochs * steps_per_epoch), total_steps - offset - 1))
        return cls(
            total_steps,
            warmup_steps,
            steps_per_epoch,
            training.schedule,
            training.power,
            tuple(round(epochs * steps_per_epoch) for epochs in training.milestones),
            training.gamma,
            offset,
        )

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at `step`, in [0, 1].

        With W = warmup_steps and T = total_steps: (t + 1) / (W + 1) before W, so that the first step already learns
        and step W is the first at the peak; then, with p = (t - W) / (T - W), (1 - p) ** power or (1 + cos(pi p)) / 2,
        which are 0 from T on; or gamma ** n, with n the milestones at t or before it. Every step of the run learns.
        t and T count from `offset`.
        """
        step, total_steps = step - self.offset, self.total_steps - self.offset
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.shape == "multistep":
            return self.gamma ** bisect.bisect_right(self.milestones, step)
        left = max(0.0, (total_steps - step) / (total_steps - self.warmup_steps))
        if self.shape == "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        return left**self.power

    def margin_strength(self, step: int, epochs: float) -> float:
        """Fraction of the full margin: linear from 0 at the first step to 1 after `epochs`; 0 epochs: always 1."""
        steps = epochs * self.steps_per_epoch
        return min(1.0, step / steps) if steps > 0 else 1.0
