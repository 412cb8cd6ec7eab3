"""The random numbers of an image's augmentation: a pure function of (seed, epoch, sample).

Each triple starts a SplitMix64 generator of its own, and each use of a number owns a place in its output, so that
neither the batch, the rank and the step nor what else is switched on changes an image.
"""

from dataclasses import dataclass, fields
from enum import IntEnum, auto
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recognition import config
from recognition.randomness import GOLDEN, Integers, Words, keyed_hash, mix

Floats = NDArray[np.float32]

MEAN_GRAY = 127.5
"""What becomes 0 in the network's input; painted where an image has no pixels."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Share of R, G and B in a pixel's gray (ITU-R BT.601)."""

_AUGMENT = 2  # keeps these keys apart from those of other uses of the same seed
_SMALLEST_ERASED = 0.02  # smallest area and aspect ratio of Random Erasing (Zhong et al. 2017)
_NARROWEST_ERASED = 0.3


class _Use(IntEnum):
    """Places in an image's sequence of numbers. A place never changes, or runs could not be repeated."""

    FLIP = auto()
    SHIFT_X = auto()
    SHIFT_Y = auto()
    ZOOM = auto()
    ROTATION = auto()
    BRIGHTNESS = auto()
    CONTRAST = auto()
    SATURATION = auto()
    GRAY = auto()
    ERASE = auto()
    ERASE_AREA = auto()
    ERASE_ASPECT = auto()
    ERASE_X = auto()
    ERASE_Y = auto()


@dataclass(frozen=True)
class AugmentParameters:
    """What is done to each of n images, in this order; None where nothing of the kind is switched on."""

    matrix: Floats | None
    """[n, 2, 3]: from a point (x, y) of the changed image to a point of the original, in pixels from the outer corner
    of the first pixel, whose centre is (0.5, 0.5)."""
    color: Floats | None
    """[n, 3, 4]: from (R, G, B, 1) to (R, G, B), on the scale of 0..255, before clamping."""
    erase_anchor: Floats | None
    """[n, 2]: row and column where the painted rectangle begins, whole numbers."""
    erase_shape: Floats | None
    """[n, 2]: its height and width, whole numbers; zeros where nothing is painted."""
    flip: NDArray[np.int32] | None
    """[n]: 1 where the image is mirrored left to right, else 0."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def draw_parameters(
    augment: config.Augment, seed: int, epochs: Integers, samples: Integers, image_size: int
) -> AugmentParameters:
    """The numbers for `samples` [n] in `epochs` [n] (or one epoch) at `image_size` pixels a side."""
    state = keyed_hash(seed, _AUGMENT, epochs, samples)
    matrix = color = anchor = shape = flip = None
    if augment.shift or augment.zoom or augment.rotate_degrees:
        matrix = _affine(augment, state, image_size)
    if augment.brightness or augment.contrast or augment.saturation or augment.gray:
        color = _color(augment, state)
    if augment.erase and augment.erase_area:
        anchor, shape = _rectangle(augment, state, image_size)
    if augment.flip:
        flip = (_uniform(state, _Use.FLIP) < augment.flip).astype(np.int32)
    return AugmentParameters(matrix, color, anchor, shape, flip)


def _uniform(state: Words, use: _Use) -> NDArray[np.float64]:
    """Numbers in [0, 1) [n]: output number `use` of the SplitMix64 generators that start at `state`."""
    place = np.uint64(use * int(GOLDEN) % 2**64)
    return (mix(state + place) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _symmetric(state: Words, use: _Use, largest: float) -> NDArray[np.float64]:
    """Numbers in [-largest, largest) [n]."""
    return (2 * _uniform(state, use) - 1) * largest


def _affine(augment: config.Augment, state: Words, image_size: int) -> Floats:
    """The inverse of: rotate by the angle and scale by the zoom about the image's centre, then shift."""
    angle = np.deg2rad(_symmetric(state, _Use.ROTATION, augment.rotate_degrees))
    scale = 1 + _symmetric(state, _Use.ZOOM, augment.zoom)
    shift = np.stack([_symmetric(state, use, augment.shift * image_size) for use in (_Use.SHIFT_X, _Use.SHIFT_Y)], -1)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    centre = image_size / 2
    offset = centre - np.einsum("nij,nj->ni", linear, centre + shift)
    return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def _color(augment: config.Augment, state: Words) -> Floats:
    """Saturation about the pixel's own gray, then brightness about black, then contrast about the mean gray."""
    saturation = 1 + _symmetric(state, _Use.SATURATION, augment.saturation)
    saturation[_uniform(state, _Use.GRAY) < augment.gray] = 0
    brightness = 1 + _symmetric(state, _Use.BRIGHTNESS, augment.brightness)
    contrast = 1 + _symmetric(state, _Use.CONTRAST, augment.contrast)
    linear = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA
    linear *= (brightness * contrast)[:, None, None]
    offset = np.broadcast_to((MEAN_GRAY * (1 - contrast))[:, None, None], (len(state), 3, 1))
    return np.concatenate([linear, offset], axis=2).astype(np.float32)


def _rectangle(augment: config.Augment, state: Words, image_size: int) -> tuple[Floats, Floats]:
    """A rectangle as in Random Erasing, cut to the image's sides; every place in the image is as likely."""
    smallest = min(_SMALLEST_ERASED, augment.erase_area)
    area = smallest + _uniform(state, _Use.ERASE_AREA) * (augment.erase_area - smallest)
    aspect = np.exp(_symmetric(state, _Use.ERASE_ASPECT, -np.log(_NARROWEST_ERASED)))
    sides = image_size * np.sqrt(np.stack([area * aspect, area / aspect], -1))
    shape = np.clip(np.rint(sides), 1, image_size)
    place = np.stack([_uniform(state, _Use.ERASE_Y), _uniform(state, _Use.ERASE_X)], -1)
    anchor = np.floor(place * (image_size - shape + 1))
    shape[_uniform(state, _Use.ERASE) >= augment.erase] = 0
    return anchor.astype(np.float32), shape.astype(np.float32)
