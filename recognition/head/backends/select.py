"""Selection of a backend: PyTorch, on any device, or Triton's kernels, on NVIDIA's GPUs."""

import importlib
import importlib.util
import os
from typing import Literal

import torch

from recognition.errors import UserError
from recognition.head.backends.problem import Backend
from recognition.head.backends.pytorch import PyTorchBackend

_AMPERE = (8, 0)


def select_backend(setting: Literal["auto", "torch", "triton"], device: torch.device) -> Backend:
    """Return the backend that `head.backend` and `device` ask for; "auto" takes Triton on a GPU where it runs.

    Raises UserError if Triton is asked for and unavailable.
    """
    reason = _unavailable_reason(device)
    if setting == "torch" or (setting == "auto" and (reason or device.type != "cuda")):
        return PyTorchBackend()
    if reason:
        raise UserError(
            f"head.backend is triton, but {reason}; set it to auto, which takes Triton where it runs, or to torch"
        )
    # Triton may be missing elsewhere, so nothing else imports this.
    backend: Backend = importlib.import_module("recognition.head.backends.triton_backend").TritonBackend()
    return backend


def _unavailable_reason(device: torch.device) -> str:
    """Return why Triton's kernels do not run on the device; nothing where they do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.cuda is None:
            return "this GPU is not NVIDIA's"
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return f"{torch.cuda.get_device_name(device)} is older than Ampere"
        return ""
    return "" if os.environ.get("TRITON_INTERPRET") == "1" else f"the device is {device}, not an NVIDIA GPU"
