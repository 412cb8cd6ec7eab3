"""Images without DALI, for systems that it does not exist for: Pillow decodes, torch and torchvision change.

Each step of the way is DALI's: levels are whole numbers of 0..255 after each change, so that the two makers' images
differ by rounding alone. `recognition.images` decodes rather than torchvision, whose decoder crashes on some broken PNG
files.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample
from torchvision.transforms.v2 import functional

from recognition.data.augment import MEAN_GRAY
from recognition.data.loader import EncodedBatch, LoaderOptions
from recognition.images import Undecodable, decode, fit

_TOGETHER = 8  # images that one thread changes at a time: their levels fit in a core's cache
_HALF_RANGE = 127.5


class TorchvisionLoader:
    """See `Maker`. Threads decode and change images in the CPU's memory; `next` moves them to the device."""

    def __init__(self, inputs: Iterator[EncodedBatch], making: LoaderOptions) -> None:
        self._inputs, self._making = inputs, making
        # As many threads as are asked for work side by side; none is to start others of its own.
        self._workers = ThreadPoolExecutor(making.threads, "images", initializer=torch.set_num_threads, initargs=(1,))
        self._ahead = deque(self._begin(next(inputs)) for _ in range(making.ahead))

    def next(self) -> Tensor:
        """The next step's images."""
        self._ahead.append(self._begin(next(self._inputs)))
        images, parts = self._ahead.popleft()
        try:
            for part in parts:
                part.result()
        except Undecodable as error:
            raise RuntimeError("an image does not decode") from error
        device = self._making.device
        if device.type == "cuda":
            return images.pin_memory().to(device, non_blocking=True)
        # On Apple's GPUs a copy that is not waited for may read memory that has been given back.
        return images.to(device)

    def decodes(self, encoded: bytes) -> bool:
        """Whether an image can be decoded."""
        try:
            decode(encoded)
        except Undecodable:
            return False
        return True

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """Every kind is: it is `images.decode` that decodes."""
        return True

    def close(self) -> None:
        """Stop working ahead."""
        self._workers.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _begin(self, inputs: EncodedBatch) -> tuple[Tensor, list[Future[None]]]:
        """A step's images, and the work that fills them."""
        size, layout = self._making.image_size, torch.contiguous_format
        if self._making.channels_last:
            layout = torch.channels_last
        images = torch.empty(len(inputs.encoded), 3, size, size, memory_format=layout)
        parts = [slice(start, start + _TOGETHER) for start in range(0, len(images), _TOGETHER)]
        how = self._making.fit
        return images, [self._workers.submit(_make, inputs, part, how, images[part]) for part in parts]


def _make(inputs: EncodedBatch, part: slice, how: str, images: Tensor) -> None:
    """Fill `images` [n, 3, S, S] with those of `part`. Runs in a worker's thread."""
    size = images.shape[-1]
    decoded = np.empty((len(images), size, size, 3), np.uint8)
    parameters = {name: array[part] for name, array in inputs.arrays.items()}
    for place, encoded in zip(decoded, inputs.encoded[part], strict=True):
        place[:] = fit(decode(encoded), size, how)
    images.copy_(changed(torch.from_numpy(decoded).permute(0, 3, 1, 2), parameters))
    images.sub_(_HALF_RANGE).div_(_HALF_RANGE)


def changed(levels: Tensor, parameters: Mapping[str, NDArray[Any]]) -> Tensor:
    """`levels` [n, 3, S, S] of 0..255, changed by what there is of the fields of `AugmentNumbers`."""
    if "matrix" in parameters:
        levels = warped(levels.float().contiguous(), torch.from_numpy(parameters["matrix"]))
    if "color" in parameters:
        levels = colored(levels.float(), torch.from_numpy(parameters["color"]))
    if "erase_shape" in parameters:
        rectangles = np.concatenate([parameters["erase_anchor"], parameters["erase_shape"]], axis=1).astype(int)
        gray = torch.tensor(int(MEAN_GRAY))  # rounded as DALI does
        for image, (top, left, height, width) in zip(levels, rectangles.tolist(), strict=True):
            functional.erase(image, top, left, height, width, gray, inplace=True)
    if "flip" in parameters:
        flips = torch.from_numpy(parameters["flip"].astype(bool))
        levels[flips] = functional.horizontal_flip(levels[flips])
    return levels


def warped(levels: Tensor, matrix: Tensor) -> Tensor:
    """`levels` float32 [n, 3, S, S] moved by `AugmentNumbers.matrix`; beyond the border, the border's pixels go on."""
    size = levels.shape[-1]
    centres = torch.arange(size) + 0.5
    x, y = centres, centres[:, None]
    rows = matrix[:, :, :, None, None]
    places = torch.stack([rows[:, i, 0] * x + rows[:, i, 1] * y + rows[:, i, 2] for i in range(2)], dim=-1)
    grid = places * (2 / size) - 1  # grid_sample's points run from -1 to 1 between the image's outer edges
    return grid_sample(levels, grid, padding_mode="border", align_corners=False).round_()


def colored(levels: Tensor, color: Tensor) -> Tensor:
    """`levels` float32 [n, 3, S, S] after `AugmentNumbers.color`, rounded and clamped to 0..255."""
    factors = color[:, :, :, None, None]
    red, green, blue = levels.unbind(1)
    out = torch.empty_like(levels)
    # One product and one sum at a time: an image's levels are then the same whatever stands beside it.
    for i in range(3):
        torch.mul(red, factors[:, i, 0], out=out[:, i])
        out[:, i] += green * factors[:, i, 1]
        out[:, i] += blue * factors[:, i, 2]
        out[:, i] += factors[:, i, 3]
    return out.round_().clamp_(0, 255)
