"""The sections of a run's settings: frozen, described below each field, checked together in `Config`."""

import itertools
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from recognition.config import toml
from recognition.config.backbone import Backbone
from recognition.config.base import Fraction, InputPath, OutputPath, Section, as_list
from recognition.config.data import Data, Faces
from recognition.config.head import Head
from recognition.config.optimizers import SGD, Optimizer


class Run(Section):
    """Where a run lives and what its randomness is keyed by."""

    folder: OutputPath = Path("runs/run")
    """Output folder; a run found there is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Key of everything random: order, augmentation, initial weights, dropout."""


class Training(Section):
    """How long, how fast, how large."""

    epochs: PositiveFloat = 20.0
    """Passes over the data; fractions are allowed."""
    global_batch: PositiveInt = 1024
    """Images per update over all ranks."""
    accumulation_steps: PositiveInt = 1
    """Forward and backward passes per update; `global_batch` is split over them."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up; the first step already learns."""
    schedule: Literal["polynomial", "cosine", "multistep"] = "polynomial"
    """How the learning rate falls after the warm-up: to zero, or at `milestones`."""
    power: PositiveFloat = 1.0
    """Exponent of the polynomial."""
    milestones: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()
    """Epochs at which `multistep` multiplies the rate by `gamma`, rising."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What `multistep` multiplies by."""
    more_epochs: Literal["refuse", "stretch", "restart"] = "refuse"
    """What happens when a run is started again with more `epochs` than it had. `refuse`: an error. `stretch`: it goes
    on as if it had had them from the beginning. `restart`: the learning rate starts again, warm-up included, and falls
    over the added epochs."""
    clip_norm: NonNegativeFloat = 5.0
    """Largest global norm of the backbone's gradient; 0: no clipping."""
    decay_norms_and_biases: bool = False
    """Whether norms' and biases' parameters decay too, as in arcface_torch."""
    initial_loss_scale: PositiveFloat = 65536.0
    """What the loss is multiplied by at the start of a run in float16. A step in which a gradient overflows changes
    nothing but to halve it."""
    loss_scale_growth_steps: PositiveInt = 2000
    """Steps in a row without an overflow after which the loss's scale doubles."""
    max_nonfinite_steps: PositiveInt = 20
    """A step whose loss is not finite changes nothing; after so many in a row the run stops."""
    threads: NonNegativeInt = 0
    """CPU threads per process for torch; 0 shares the cores out evenly over the local processes."""


class Evaluation(Section):
    """Verification as training goes."""

    pairs: Annotated[tuple[InputPath, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    """Verification sets: InsightFace `.bin` files, or lists of pairs beside their image folder, such as LFW's
    `pairs.txt`, CALFW's, CPLFW's, or lines `path path label`."""
    image_folder: InputPath | None = None
    """The folder of the lists' images. Default: looked for beside each list."""
    missing_images: Literal["refuse", "skip"] = "refuse"
    """What becomes of pairs one of whose images is missing or cannot be decoded, as where alignment found no face.
    `refuse`: the run does not begin; `skip`: they are left out, which is said, and changes the set's numbers."""
    folds: Literal["file", "even"] = "file"
    """What the ten folds of a set are. `file`: consecutive pairs in the file's order, as arcface_torch has them;
    `even`: genuine and impostor pairs are spread evenly over them first."""
    every_steps: NonNegativeInt = 2000
    """Steps between verifications, each of which follows a checkpoint; 0: only at the end."""
    batch_per_rank: PositiveInt = 64
    """Images per forward pass, per rank."""


class Checkpoint(Section):
    """Saving and retention."""

    every_steps: NonNegativeInt = 2000
    """Steps between checkpoints; 0: only at the end and on an interruption."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints stay; the best is kept apart."""


class Tracking(Section):
    """What is recorded as training goes."""

    every_steps: PositiveInt = 10
    """Steps between two records."""
    preview_images: NonNegativeInt = 32
    """Images of the first batch that go to TensorBoard."""


class Distributed(Section):
    """Process groups."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """`auto`: NCCL when every process has a GPU, else gloo on the CPU; a run of one process on a Mac has its backbone
    on the GPU (MPS) and its head on the CPU. `gloo` keeps all on the CPU."""
    init_timeout_seconds: PositiveInt = 300
    """Bound on a collective until the first step is done."""
    timeout_seconds: PositiveInt = 120
    """Bound on a collective after that."""
    bucket_mib: PositiveInt = 25
    """MiB of the backbone's gradients that are summed over the ranks at a time, while the backward pass goes on."""


class Export(Section):
    """The deployable."""

    enabled: bool = True
    """Write `model.onnx` at the end of the run."""
    opset: Annotated[int, Field(ge=11)] = 18
    """ONNX operator set. Below 17 torch's older exporter writes the file, which knows fewer networks; IResNet,
    MobileFaceNet, ResNet, ConvNeXt and ViT go down to 11, for TensorRT 7 and the like."""
    max_difference: PositiveFloat = 1e-3
    """Largest allowed |difference| between ONNX Runtime's and the backbone's embedding, relative to its norm."""
    min_cosine: Fraction = 0.9999
    """Smallest allowed cosine between the two."""


class Config(Section):
    """A run, whole."""

    run: Run = Run()
    data: Data
    faces: Faces | None = None
    backbone: Backbone = Backbone()
    head: Head = Head()
    optimizer: Optimizer = SGD()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    distributed: Distributed = Distributed()
    export: Export = Export()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        training, mistakes = self.training, []
        if training.global_batch % training.accumulation_steps:
            batch, passes = training.global_batch, training.accumulation_steps
            mistakes.append(f"training.global_batch ({batch}) must divide by training.accumulation_steps ({passes})")
        if training.warmup_epochs >= training.epochs:
            warmup, epochs = training.warmup_epochs, training.epochs
            mistakes.append(f"training.warmup_epochs ({warmup}) must be below training.epochs ({epochs})")
        mistakes += _schedule_mistakes(training)
        together = self.data.images_per_identity
        if training.global_batch // training.accumulation_steps % together:
            batch = training.global_batch // training.accumulation_steps
            mistakes.append(f"a batch of {batch} images must divide by data.images_per_identity ({together})")
        on_pairs = [name for name in ("triplet", "contrastive") if getattr(self.head, name) is not None]
        if on_pairs and together == 1:
            names = " and ".join(f"head.{name}" for name in on_pairs)
            mistakes.append(f"{names} needs several images of an identity in a batch: set data.images_per_identity")
        if self.head.inactive_rows == "lazy" and self.head_optimizer.name != "sgd":
            mistakes.append(
                "head.inactive_rows is lazy, which SGD alone can catch up with: set head.optimizer.name to sgd"
            )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def head_optimizer(self) -> Optimizer:
        """What moves the class weights."""
        return self.optimizer if self.head.optimizer is None else self.head.optimizer

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `load` reads it back to an equal one."""
        return toml.dump(json.loads(self.model_dump_json(exclude_none=True)))


def _schedule_mistakes(training: Training) -> list[str]:
    """What is wrong with the milestones."""
    if training.schedule != "multistep":
        said = f"training.milestones is for training.schedule = multistep, not {training.schedule}"
        return [said] if training.milestones else []
    milestones, mistakes = training.milestones, []
    if not milestones:
        first, last = training.warmup_epochs, training.epochs
        example = [round(first + part * (last - first), 6) for part in (0.5, 0.8)]
        mistakes.append(f"training.schedule = multistep needs training.milestones, for example {example}")
    if any(after <= before for before, after in itertools.pairwise(milestones)):
        mistakes.append(f"training.milestones must rise, which {list(milestones)} do not")
    if out := [str(each) for each in milestones if not training.warmup_epochs < each < training.epochs]:
        between = f"training.warmup_epochs ({training.warmup_epochs}) and training.epochs ({training.epochs})"
        mistakes.append(f"training.milestones: {', '.join(out)} not between {between}")
    return mistakes
