"""The class-sharded head."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from recognition.config.base import Fraction, Section
from recognition.config.losses import ArcFace, Center, Contrastive, Filter, Loss, Triplet
from recognition.config.optimizers import Optimizer


class Head(Section):
    """The class-sharded head."""

    loss: Loss = ArcFace()
    """The loss over classes."""
    margin_warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the margin grows linearly from zero."""
    subcenters: PositiveInt = 1
    """K, rows of each class; the nearest counts (sub-center ArcFace, Deng et al. 2020)."""
    filter: Filter | None = None
    """Inter-class filtering, with any loss on cosines."""
    center: Center | None = None
    """Center loss beside the loss over classes."""
    triplet: Triplet | None = None
    """Triplet loss beside the loss over classes."""
    contrastive: Contrastive | None = None
    """Contrastive loss beside the loss over classes."""
    sample_rate: Fraction = 1.0
    """Partial FC: the fraction of classes whose rows take part in a step; those of the batch always do."""
    inactive_rows: Literal["sparse", "lazy"] = "sparse"
    """What rows do that take no part in a step. `sparse`: nothing, they neither move nor decay. `lazy`: what SGD does
    to them, momentum and decay; it is caught up with, exactly, when they next take part."""
    optimizer: Optimizer | None = None
    """What moves the class weights. Default: what moves the backbone, with the same settings."""
    row_format: Literal["float32", "split", "bfloat16"] = "float32"
    """How rows are kept. `split`: as `float32`, in two halves of which bfloat16 products read the upper alone;
    `bfloat16`: rows and moments in half the memory, rounded at random."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products. `auto`: bfloat16 where the processor has units for it, else float32."""
    chunk: PositiveInt | None = None
    """Classes per chunk; logits exist for one chunk at a time. Default: what suits the device."""
    backend: Literal["auto", "torch", "triton"] = "auto"
    """What goes over the class weights. `auto`: Triton's kernels on NVIDIA's GPUs from Ampere on, elsewhere PyTorch."""
    workspace_mib: PositiveInt = 256
    """MiB for what the backward pass takes over from the forward pass, and for a chunk of the kernels' backward pass.
    Where `chunk` is given, nothing is taken over."""

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
