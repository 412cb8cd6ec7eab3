"""The numbers of one optimizer step, shared by the two implementations: PyTorch (`optimizer`) and Triton."""

from dataclasses import dataclass

from torch import Tensor

from recognition.head.class_weights.stochastic_rounding import RoundingKey


@dataclass(frozen=True)
class RowStep:
    """One optimizer step of some rows [n], without rows and gradient."""

    lr: float
    """Learning rate."""
    weight_decay: float
    betas: tuple[float, float]
    """Decay rates of the moments; of SGD, the momentum and 0."""
    eps: float
    """Term in AdamW's denominator; of SGD, 0."""
    rounding: RoundingKey
    """Key of the random bits, which the format `bfloat16` alone uses."""
    skip: Tensor
    """float32 scalar on the rows' device; where it is 1, nothing changes."""
    skip_flag: Tensor | None = None
    """`skip` as a boolean; None where the host knows that the step is not skipped."""
    counts: Tensor | None = None
    """[n] int32: the rows' counter after this step; None for an optimizer without one."""
