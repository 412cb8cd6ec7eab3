"""The device that a subcommand works on."""

import torch

from recognition.errors import UserError


def check_cuda(device: str) -> None:
    """Raise UserError if `device` is cuda and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
