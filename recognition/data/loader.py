"""Interface of the loaders that decode and augment a batch of images: DALI and torchvision (`data.loader`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from recognition.randomness import Integers


@dataclass(frozen=True)
class EncodedBatch:
    """One rank's images of a step before they are decoded, and the parameters of their augmentation."""

    samples: Integers
    """[b] int64: numbers of the images in the index."""
    encoded: list[bytes]
    """b encoded images with valid headers."""
    arrays: dict[str, NDArray[Any]]
    """`resize`, bool [b]: true for images of another size than the model's; and the fields of `AugmentParameters` that
    are not None."""


@dataclass(frozen=True)
class LoaderOptions:
    """Options that hold for all batches of a loader."""

    batch: int
    """Number of images in a step, on this rank."""
    image_size: int
    """Height and width of the images that come out, in pixels."""
    fit: str
    """Treatment of images of another size, "resize" or "crop": see `recognition.images.fit`."""
    channels_last: bool
    """Memory format of the images: channels last, or contiguous."""
    device: torch.device
    """Device of the images that come out."""
    threads: int
    """Number of CPU threads that decode and augment."""
    prefetch: int
    """Number of steps that are made ahead of the one that is asked for."""


class Loader(Protocol):
    """Decoder and augmenter of one batch after another, some steps ahead of the one that is asked for.

    `batches` is endless, with one encoded batch per step; it is consumed in the caller's thread, within the
    constructor and `next_images`.
    """

    def __init__(self, batches: Iterator[EncodedBatch], options: LoaderOptions) -> None: ...

    def next_images(self) -> torch.Tensor:
        """Return the images of the next step, float32 [b, 3, H, W], RGB, (x - 127.5) / 127.5.

        Later calls do not overwrite them. Raises RuntimeError where an image does not decode; the loader cannot go on
        after that.
        """

    def can_decode(self, encoded: bytes) -> bool:
        """Tell whether an image decodes; works after `next_images` has failed, too."""

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """Tell whether an image with a valid header is of a kind that decodes to the pixels of `images.decode`."""

    def close(self) -> None:
        """Stop working ahead and free memory and threads."""
