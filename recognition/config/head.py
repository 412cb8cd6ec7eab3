"""The class-sharded head."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from recognition.config.base import Fraction, Section
from recognition.config.losses import ArcFace, Center, Contrastive, Filter, Loss, Triplet
from recognition.config.optimizers import Optimizer


class Head(Section):
    """The classification head: the loss, and the class weights, which are divided among the processes."""

    loss: Loss = ArcFace()
    """Loss over the classes; `docs/losses.md` compares them."""
    margin_warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the margin grows linearly from zero. Raise it when the loss does not fall at the start."""
    subcenters: PositiveInt = 1
    """Class weights per identity (K), of which the nearest counts (sub-center ArcFace, Deng et al. 2020). Use 3 for
    noisy labels; memory and time grow with it."""
    filter: Filter | None = None
    """Leaves out negatives that are probably the same person."""
    center: Center | None = None
    """Adds the center loss to the loss over the classes."""
    triplet: Triplet | None = None
    """Adds the triplet loss to the loss over the classes."""
    contrastive: Contrastive | None = None
    """Adds the contrastive loss to the loss over the classes."""
    sample_rate: Fraction = 1.0
    """Partial FC: fraction of the classes that take part in an update; those of the batch always do. Lower it, to
    0.1 for example, for 300,000 classes and more: time and memory of a step fall with it."""
    inactive_rows: Literal["sparse", "lazy"] = "sparse"
    """Treatment of the class weights that Partial FC leaves out of an update. `sparse`: they stay unchanged. `lazy`:
    momentum and weight decay of SGD apply to them, exactly as without Partial FC, when they next take part."""
    optimizer: Optimizer | None = None
    """Optimizer of the class weights. Default: the settings of `[optimizer]`."""
    row_format: Literal["float32", "split", "bfloat16"] = "float32"
    """Storage of the class weights. `float32`; `split`: the same precision in two 16-bit halves, so that bfloat16
    products read only the upper one; `bfloat16`: half the memory for weights and moments, with stochastic rounding."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the head's matrix products. `auto`: bfloat16 where the hardware supports it, else float32."""
    chunk: PositiveInt | None = None
    """Classes whose logits are in memory at a time. Lower it when the head runs out of memory. Default: chosen for
    the device."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the head. `auto`: Triton kernels on NVIDIA GPUs from Ampere on, else PyTorch."""
    workspace_mib: PositiveInt = 256
    """MiB for exponentials of logits that are kept from the forward to the backward pass, and for a chunk of the Triton
    backward pass. With `chunk` set, none are kept."""

    @model_validator(mode="after")
    def _consistent(self) -> "Head":
        mistakes = []
        if not (self.loss.unit_embeddings and self.loss.unit_rows):
            if self.filter is not None:
                mistakes.append(f"head.filter needs a loss on cosines, which {self.loss.name} is not")
            if self.subcenters > 1:
                mistakes.append(f"head.subcenters needs a loss on cosines, which {self.loss.name} is not")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self
