"""Who goes over the class weights: PyTorch (`chunks`), on any device, or Triton's kernels (`fused`)."""

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
from recognition.head.backends.problem import Statistics

_AMPERE = (8, 0)


@dataclass(frozen=True)
class Maker:
    """The two functions, as `chunks` describes them."""

    statistics: Callable[..., Statistics]
    backward: Callable[..., Tensor]
    kernels: bool
    """Whether they are made of Triton's kernels, which then update the rows as well."""


def choose(kernels: Literal["auto", "torch", "triton"], device: torch.device) -> Maker:
    """Whoever `head.kernels` and the device ask for. Raises UserError where there are to be kernels and cannot be."""
    lacking = _lacking(device)
    if kernels == "torch" or (kernels == "auto" and (lacking or device.type != "cuda")):
        return Maker(pytorch.statistics, pytorch.backward, kernels=False)
    if lacking:
        raise config.UserError(f"head.kernels is triton, but {lacking}; auto takes them where they run")
    fused = importlib.import_module("recognition.head.backends.triton_backend")
    return Maker(fused.statistics, fused.backward, kernels=True)


def _lacking(device: torch.device) -> str:
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
