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
    """The run's output folder and seed."""

    folder: OutputPath = Path("runs/run")
    """Output folder for checkpoints, logs and the exported model. A run that is found there is resumed, so give each
    new run its own folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: initial weights, order of the images, augmentation, dropout. Change it to repeat an
    experiment with other random numbers."""


class Training(Section):
    """Length of the training, batch size, learning-rate schedule and numerical safety."""

    epochs: PositiveFloat = 20.0
    """Passes over the training set; fractions such as 0.5 are allowed."""
    global_batch: PositiveInt = 1024
    """Images per update, all processes and accumulation steps together; it does not change with the number of GPUs.
    Scale `optimizer.lr` with it."""
    accumulation_steps: PositiveInt = 1
    """Forward and backward passes per update, over which `global_batch` is split. Raise it when a batch does not fit
    in memory."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs over which the learning rate rises linearly to its peak, starting above zero. Raise it for large
    batches or when the loss diverges at the start."""
    schedule: Literal["polynomial", "cosine", "multistep"] = "polynomial"
    """Fall of the learning rate after the warm-up. `polynomial`: to zero, with exponent `power`; `cosine`: to zero
    along half a cosine; `multistep`: by the factor `gamma` at each of `milestones`."""
    power: PositiveFloat = 1.0
    """Exponent of the `polynomial` schedule; 1 is a linear fall."""
    milestones: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()
    """Epochs, in rising order, at which the `multistep` schedule multiplies the learning rate by `gamma`. Required
    by that schedule and refused by the others."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor on the learning rate at each milestone of the `multistep` schedule."""
    more_epochs: Literal["refuse", "stretch", "restart"] = "refuse"
    """Behaviour when a run is resumed with more `epochs` than before. `refuse`: an error. `stretch`: the schedule
    continues as if the run had had the larger number from the beginning. `restart`: a new schedule, warm-up
    included, runs over the added epochs."""
    clip_norm: NonNegativeFloat = 5.0
    """Largest norm of the backbone's gradient, all parameters together; larger gradients are scaled down to it. 0
    turns clipping off."""
    decay_norms_and_biases: bool = False
    """Whether weight decay also applies to biases and to the parameters of normalisation layers. Set it to true to
    train as arcface_torch does."""
    initial_loss_scale: PositiveFloat = 65536.0
    """Factor on the loss at the start of a run in float16, which keeps small gradients from vanishing. When a
    gradient overflows, the update is skipped and the factor is halved."""
    loss_scale_growth_steps: PositiveInt = 2000
    """Steps in a row without an overflow after which the loss scale of a float16 run doubles."""
    max_nonfinite_steps: PositiveInt = 20
    """Steps in a row with a loss of NaN or infinity after which the run stops with an error; each such step is
    skipped."""
    threads: NonNegativeInt = 0
    """CPU threads per process for PyTorch. 0 divides the cores evenly among the processes of the machine."""


class Evaluation(Section):
    """Face verification during and after the training."""

    pairs: Annotated[tuple[InputPath, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    """Verification sets: InsightFace's `.bin` files, or lists of pairs with an image folder (LFW's `pairs.txt`, the
    lists of CALFW and CPLFW, or lines `path path label`). Without one, nothing is verified."""
    image_folder: InputPath | None = None
    """Folder of the images that lists of pairs name. Default: a folder beside each list."""
    missing_images: Literal["refuse", "skip"] = "refuse"
    """Handling of pairs with an image that is missing or cannot be decoded, for example because alignment found no
    face. `refuse`: the run does not start; `skip`: these pairs are left out with a warning, so results are not
    comparable with published ones."""
    folds: Literal["file", "even"] = "file"
    """Division of the pairs into the ten folds of cross-validation. `file`: consecutive pairs, as in arcface_torch;
    `even`: equal shares of genuine and impostor pairs in each fold, for files whose order is unbalanced."""
    every_steps: NonNegativeInt = 2000
    """Updates between verifications; a checkpoint is written before each. 0: only at the end."""
    batch_per_rank: PositiveInt = 64
    """Images per forward pass in each process. Lower it when verification runs out of memory."""


class Checkpoint(Section):
    """Interval and number of the checkpoints."""

    every_steps: NonNegativeInt = 2000
    """Updates between checkpoints, the most that a crash can cost. 0: only at the end and on an interruption."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of newest checkpoints that are kept; the best one by verification is kept in addition."""


class Tracking(Section):
    """Records of metrics and images for TensorBoard and the run's log."""

    every_steps: PositiveInt = 10
    """Updates between two records of loss, learning rate and speed."""
    preview_images: NonNegativeInt = 32
    """Images of the first batch that are shown in TensorBoard, to check the augmentation. 0: none."""


class Distributed(Section):
    """Communication between the processes of a run."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library and devices. `auto`: NCCL when every process has a GPU, else Gloo on the CPU; a single
    process on a Mac runs the backbone on the GPU (MPS) and the head on the CPU. `gloo` keeps everything on the CPU."""
    init_timeout_seconds: PositiveInt = 300
    """Seconds that processes wait for each other until the first update is done. Raise it when start-up is slow, for
    example on cold storage."""
    timeout_seconds: PositiveInt = 120
    """Seconds that processes wait for each other after the first update; then the run stops with an error."""
    bucket_mib: PositiveInt = 25
    """MiB of backbone gradients that are summed over the processes at a time, during the backward pass."""


class Export(Section):
    """The ONNX model that is written at the end of a run."""

    enabled: bool = True
    """Whether `model.onnx` is written at the end of the run."""
    opset: Annotated[int, Field(ge=11)] = 18
    """ONNX operator set. Lower it for older runtimes such as TensorRT 7; below 17, PyTorch's older exporter is used,
    which supports IResNet, MobileFaceNet, ResNet, ConvNeXt and ViT down to 11."""
    max_difference: PositiveFloat = 1e-3
    """Largest allowed difference in any value of the embedding between ONNX Runtime and the backbone, relative to the
    embedding's norm; a larger one is an error."""
    min_cosine: Fraction = 0.9999
    """Smallest allowed cosine between ONNX Runtime's embedding and the backbone's; a smaller one is an error."""


class Config(Section):
    """All settings of a run."""

    run: Run = Run()
    data: Data
    faces: Faces | None = None
    backbone: Backbone = Backbone()
    head: Head = Head()
    optimizer: Optimizer = SGD()
    """Optimizer of the backbone, and of the class weights where `[head.optimizer]` is not given."""
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
        """The optimizer of the class weights."""
        return self.optimizer if self.head.optimizer is None else self.head.optimizer

    def to_toml(self) -> str:
        """Return the configuration as TOML, from which `load` reads an equal one."""
        return toml.dump(json.loads(self.model_dump_json(exclude_none=True)))


def _schedule_mistakes(training: Training) -> list[str]:
    """Return the mistakes in the milestones of the learning-rate schedule, one message each."""
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
