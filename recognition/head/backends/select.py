"""Who goes over the class weights: PyTorch (`chunks`), on any device, or Triton's kernels (`triton_backend`)."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recognition import config
from recognition.head.backends import pytorch
from recognition.head.backends.problem import NegativeSums

_AMPERE = (8, 0)


@dataclass(frozen=True)
class Backend:
    """The two functions, as `chunks` describes them."""

    negative_sums: Callable[..., NegativeSums]
    backward: Callable[..., Tensor]
    kernels: bool
    """Whether they are made of Triton's kernels, which then update the rows as well."""


def select_backend(kernels: Literal["auto", "torch", "triton"], device: torch.device) -> Backend:
    """Whoever `head.backend` and the device ask for. Raises UserError where there are to be kernels and cannot be."""
    lacking = _unavailable_reason(device)
    if kernels == "torch" or (kernels == "auto" and (lacking or device.type != "cuda")):
        return Backend(pytorch.negative_sums, pytorch.backward, kernels=False)
    if lacking:
        raise config.UserError(f"head.backend is triton, but {lacking}; auto takes them where they run")
    triton_backend = importlib.import_module("recognition.head.backends.triton_backend")
    return Backend(triton_backend.negative_sums, triton_backend.backward, kernels=True)


def _unavailable_reason(device: torch.device) -> str:
    """Why the kernels do not run on the device; nothing where they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "this GPU is not NVIDIA's"
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
        return ""
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else f"the device is {device}, not an NVIDIA GPU"
