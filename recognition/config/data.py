"""The training set: where it is, how it is read and changed, and faces that are rendered for it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from recognition.config.base import BelowOne, Fraction, InputPath, OutputPath, Section


class Augment(Section):
    """Random changes to a training image. Seed, epoch and image determine them; where images of an identity come
    together in a batch, seed, position and image do."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    shift: Fraction = 0.0
    """Largest random shift along each axis, as a fraction of the image's side."""
    zoom: BelowOne = 0.0
    """Largest random change of scale: 0.1 is 10 % larger or smaller."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest random rotation in degrees, clockwise or counter-clockwise."""
    brightness: Fraction = 0.0
    """Largest random change of brightness: 0.2 is 20 % brighter or darker."""
    contrast: Fraction = 0.0
    """Largest random change of contrast: 0.2 is 20 % more or less."""
    saturation: Fraction = 0.0
    """Largest random change of saturation: 0.2 is 20 % more or less."""
    gray: Fraction = 0.0
    """Probability of turning an image to greyscale."""
    erase: Fraction = 0.0
    """Probability of covering a random rectangle with mid-grey."""
    erase_area: Fraction = 0.2
    """Largest area of the erased rectangle, as a fraction of the image."""


class Data(Section):
    """The training set: its files, decoding and augmentation."""

    path: InputPath
    """Training images: a `.rec` file with its `.idx`, a folder that holds `train.rec`, or a folder with one folder
    of images per identity."""
    index_folder: OutputPath | None = None
    """Folder for the index of the data; set it when the data's own folder is read-only. Default: the user's cache
    folder."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """Library that decodes and augments images. `auto`: NVIDIA DALI where it is installed, else torchvision, which
    gives the same images up to rounding and is slower."""
    fit: Literal["exact", "resize", "crop"] = "resize"
    """Handling of images whose size is not `backbone.image_size`, in training and verification. `resize`: scale to
    that size, which distorts images that are not square; `crop`: cut out the largest square in the middle and scale
    it; `exact`: stop with an error. The number of changed images is reported."""
    threads: PositiveInt = 2
    """Threads per process that decode images. Raise it when the GPU waits for data."""
    prefetch: PositiveInt = 2
    """Batches decoded in advance, and also the number of threads that read ahead. Raise it for slow storage."""
    augment: Augment = Augment()
    """Augmentation of the training images."""
    images_per_identity: PositiveInt = 1
    """Images of an identity that come together in a batch (K), required above 1 by the triplet and contrastive
    losses; 1 is a plain random order. Identities with fewer images repeat some; an epoch still counts images."""


class Faces(Section):
    """Procedural faces, rendered into `data.path` by a run that finds none there: `train.rec` and `pairs.bin`."""

    identities: PositiveInt
    """Number of identities to render."""
    images_per_identity: PositiveInt
    """Number of images to render for each identity."""
    pairs: PositiveInt = 1200
    """Number of verification pairs, half of them genuine."""
    image_size: PositiveInt = 112
    """Height and width of the rendered images, in pixels."""
    seed: NonNegativeInt = 0
    """Seed of the rendered faces; another seed gives other identities."""
