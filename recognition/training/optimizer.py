"""The backbone's optimizer, and an update that a flag on the device can skip."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recognition import config


def build_optimizer(
    backbone: nn.Module, optimizer: config.SGD | config.AdamW, *, decay_norms_and_biases: bool
) -> Optimizer:
    """Build SGD with momentum, or AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), over trainable parameters.

    Without `decay_norms_and_biases`, parameters of at most one dimension (the scales and shifts of norms, biases,
    slopes of PReLU) form a group of their own that does not decay. The state starts as zeros, laid out as
    the parameters are, so build this when the backbone is on its device and in its memory format.
    Frozen parameters are left out; an optimizer of no parameters does nothing.
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
    """Create the state that a first step would create, as zeros.

    torch creates it in the first step, too late for loading a checkpoint in place; and if that step is skipped, SGD's
    momentum is left as uninitialised memory. From zeros, SGD's first step is bitwise equal: 0 momentum + g = g.
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
    """Return the optimizer's whole state by the parameters' names: `momentum_buffer.<name>`; `exp_avg.<name>`, ...

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
    that is not finite makes the gradients so: the flag of `step_if_finite` has to include it.
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
