"""What makes images of bytes and numbers: the interface, which DALI and torchvision stand behind."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from recognition.randomness import Integers


@dataclass(frozen=True)
class EncodedBatch:
    """What one rank's images of a step are made of."""

    samples: Integers
    """[b] int64: which images of the index these are."""
    encoded: list[bytes]
    """b encoded images, whose headers are in order."""
    arrays: dict[str, NDArray[Any]]
    """`resize`, bool [b]: which images have another size than the wanted one; and the fields of `AugmentNumbers` that
    something is switched on for."""


@dataclass(frozen=True)
class LoaderOptions:
    """How the images are wanted."""

    batch: int
    """Images of a step, on this rank."""
    image_size: int
    """Pixels a side."""
    fit: str
    """What becomes of images of another size, "resize" or "crop": see `recognition.images.fit`."""
    channels_last: bool
    """Whether a pixel's channels stand together in memory."""
    device: torch.device
    """Where the images go."""
    threads: int
    """CPU threads that decode and change images."""
    ahead: int
    """Steps whose images are made ahead of the one that is asked for."""


class Loader(Protocol):
    """Makes the images of one step after another, ahead of the one that is asked for.

    `inputs` is endless: one per step, taken in the caller's thread, from within the constructor and `next`.
    """

    def __init__(self, inputs: Iterator[EncodedBatch], making: LoaderOptions) -> None: ...

    def next(self) -> torch.Tensor:
        """The next step's images [b, 3, H, W] float32, RGB, (x - 127.5) / 127.5.

        They stay what they are. Raises RuntimeError where one does not decode, and is then of no more use.
        """

    def decodes(self, encoded: bytes) -> bool:
        """Whether an image can be decoded; it can also be asked after `next` has failed."""

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """Whether an image whose header is in order is of a kind that becomes the same pixels as by `images.decode`."""

    def close(self) -> None:
        """Stop working ahead and free what that needs."""
