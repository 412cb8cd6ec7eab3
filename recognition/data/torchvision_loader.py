"""Loader without DALI, for systems on which DALI does not exist: Pillow decodes, torch and torchvision augment.

The steps are those of DALI's graph, with levels rounded to 0..255 after each, so that the images of the two loaders
differ by rounding alone. `recognition.images` decodes, because torchvision's decoder crashes on some broken PNG files.
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

_PART = 8  # images that a thread makes at a time: their levels fit in a core's cache
_HALF_RANGE = 127.5


class TorchvisionLoader:
    """Loader (see `loader.Loader`) whose threads decode and augment in CPU memory; `next_images` copies to the GPU."""

    def __init__(self, batches: Iterator[EncodedBatch], options: LoaderOptions) -> None:
        self._batches, self._options = batches, options
        # The threads share the cores, so none of them may start further threads within torch.
        self._workers = ThreadPoolExecutor(options.threads, "images", initializer=torch.set_num_threads, initargs=(1,))
        self._ahead = deque(self._submit(next(batches)) for _ in range(options.prefetch))

    def next_images(self) -> Tensor:
        """Return the images of the next step [b, 3, H, W]."""
        self._ahead.append(self._submit(next(self._batches)))
        images, parts = self._ahead.popleft()
        try:
            for part in parts:
                part.result()
        except Undecodable as error:
            raise RuntimeError("an image does not decode") from error
        device = self._options.device
        if device.type == "cuda":
            return images.pin_memory().to(device, non_blocking=True)
        # The copy blocks: on Apple's GPUs an asynchronous one may read memory that has been freed.
        return images.to(device)

    def can_decode(self, encoded: bytes) -> bool:
        """Tell whether `images.decode` decodes an image."""
        try:
            decode(encoded)
        except Undecodable:
            return False
        return True

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """Return true: `images.decode` decodes here."""
        return True

    def close(self) -> None:
        """Stop the threads."""
        self._workers.shutdown(cancel_futures=True)
        self._ahead.clear()

    def _submit(self, batch: EncodedBatch) -> tuple[Tensor, list[Future[None]]]:
        """Start the work on a step; return its images, and the futures that fill them."""
        size, layout = self._options.image_size, torch.contiguous_format
        if self._options.channels_last:
            layout = torch.channels_last
        images = torch.empty(len(batch.encoded), 3, size, size, memory_format=layout)
        parts = [slice(start, start + _PART) for start in range(0, len(images), _PART)]
        fit = self._options.fit
        return images, [self._workers.submit(_fill, batch, part, fit, images[part]) for part in parts]


def _fill(batch: EncodedBatch, part: slice, how: str, images: Tensor) -> None:
    """Decode and augment the images `part` of a batch into `images` [n, 3, S, S], in a worker's thread."""
    size = images.shape[-1]
    decoded = np.empty((len(images), size, size, 3), np.uint8)
    parameters = {name: array[part] for name, array in batch.arrays.items()}
    for place, encoded in zip(decoded, batch.encoded[part], strict=True):
        place[:] = fit(decode(encoded), size, how)
    images.copy_(augment(torch.from_numpy(decoded).permute(0, 3, 1, 2), parameters))
    images.sub_(_HALF_RANGE).div_(_HALF_RANGE)


def augment(levels: Tensor, parameters: Mapping[str, NDArray[Any]]) -> Tensor:
    """Augment `levels` [n, 3, S, S] of 0..255 by those fields of `AugmentParameters` that are there."""
    if "matrix" in parameters:
        levels = warp(levels.float().contiguous(), torch.from_numpy(parameters["matrix"]))
    if "color" in parameters:
        levels = transform_color(levels.float(), torch.from_numpy(parameters["color"]))
    if "erase_shape" in parameters:
        rectangles = np.concatenate([parameters["erase_anchor"], parameters["erase_shape"]], axis=1).astype(int)
        gray = torch.tensor(int(MEAN_GRAY))  # rounded as DALI does
        for image, (top, left, height, width) in zip(levels, rectangles.tolist(), strict=True):
            functional.erase(image, top, left, height, width, gray, inplace=True)
    if "flip" in parameters:
        flips = torch.from_numpy(parameters["flip"].astype(bool))
        levels[flips] = functional.horizontal_flip(levels[flips])
    return levels


def warp(levels: Tensor, matrix: Tensor) -> Tensor:
    """Warp `levels` float32 [n, 3, S, S] by `AugmentParameters.matrix`, with the border's pixels repeated beyond it."""
    size = levels.shape[-1]
    centres = torch.arange(size) + 0.5
    x, y = centres, centres[:, None]
    rows = matrix[:, :, :, None, None]
    places = torch.stack([rows[:, i, 0] * x + rows[:, i, 1] * y + rows[:, i, 2] for i in range(2)], dim=-1)
    grid = places * (2 / size) - 1  # grid_sample's points run from -1 to 1 between the image's outer edges
    return grid_sample(levels, grid, padding_mode="border", align_corners=False).round_()


def transform_color(levels: Tensor, color: Tensor) -> Tensor:
    """Apply `AugmentParameters.color` to `levels` float32 [n, 3, S, S]; round and clamp to 0..255."""
    factors = color[:, :, :, None, None]
    red, green, blue = levels.unbind(1)
    out = torch.empty_like(levels)
    # One product and one sum at a time, so that an image's levels do not depend on the others in the batch.
    for i in range(3):
        torch.mul(red, factors[:, i, 0], out=out[:, i])
        out[:, i] += green * factors[:, i, 1]
        out[:, i] += blue * factors[:, i, 2]
        out[:, i] += factors[:, i, 3]
    return out.round_().clamp_(0, 255)
