"""The training set: where it is, how it is read and changed, and faces that are rendered for it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from recognition.config.base import BelowOne, Fraction, InputPath, OutputPath, Section


class Augment(Section):
    """Random changes to a training image; all numbers are a function of (seed, epoch, sample), or (seed, position,
    sample) where images of an identity stand together."""

    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    shift: Fraction = 0.0
    """Largest shift, as a fraction of the image's side, in either direction and along both axes."""
    zoom: BelowOne = 0.0
    """Largest relative change of scale, in either direction."""
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation, in either direction."""
    brightness: Fraction = 0.0
    """Largest relative change of brightness, in either direction."""
    contrast: Fraction = 0.0
    """Largest relative change of contrast, in either direction."""
    saturation: Fraction = 0.0
    """Largest relative change of saturation, in either direction."""
    gray: Fraction = 0.0
    """Probability of dropping the colour."""
    erase: Fraction = 0.0
    """Probability of painting a rectangle with the mean grey."""
    erase_area: Fraction = 0.2
    """Largest area of that rectangle, as a fraction of the image."""


class Data(Section):
    """The training set."""

    path: InputPath
    """A .rec file with its .idx, a folder that holds `train.rec`, or a folder of identity folders."""
    index_folder: OutputPath | None = None
    """Where the index goes when the data's own folder is read-only. Default: the user's cache folder."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes and changes images. `auto`: NVIDIA DALI where it is installed, else torchvision, which gives the
    same images but for rounding, and decodes more slowly."""
    fit: Literal["exact", "resize", "crop"] = "resize"
    """What becomes of images that are not of `backbone.image_size`, in training and in verification alike. `resize`:
    scaled to it, which changes the proportions of an image that is not square; `crop`: the largest square in the middle
    is; `exact`: refused. What is changed is counted and said."""
    threads: PositiveInt = 2
    """Threads per process that decode."""
    prefetch: PositiveInt = 2
    """Batches decoded ahead, and threads that read ahead: more of them hide a slow storage."""
    augment: Augment = Augment()
    """Random changes to the images."""
    images_per_identity: PositiveInt = 1
    """K, images of an identity that stand together in a batch, for losses on pairs; 1 is a plain random order. An
    identity with fewer repeats some; epochs still count images."""


class Faces(Section):
    """Procedural faces, rendered into `data.path` by a run that finds none there: `train.rec` and `pairs.bin`."""

    identities: PositiveInt
    """Identities to train on."""
    images_per_identity: PositiveInt
    """Images of each."""
    pairs: PositiveInt = 1200
    """Verification pairs, half of them genuine."""
    image_size: PositiveInt = 112
    """Height and width of the images, in pixels."""
    seed: NonNegativeInt = 0
    """Key of all that is drawn."""
