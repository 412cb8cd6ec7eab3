"""Random parameters of augmentation, a pure function of (seed, epoch, sample).

Each triple starts a SplitMix64 generator of its own, and each random number has a fixed place in its output. So neither
the batch, the rank and the step nor the other kinds of augmentation change an image.
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
"""Level that becomes 0 in the network's input; the colour of erased rectangles."""

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of R, G and B in a pixel's gray (ITU-R BT.601)."""

_AUGMENT = 2  # keeps these keys apart from those of other uses of the same seed
_SMALLEST_ERASED = 0.02  # smallest area and aspect ratio of Random Erasing (Zhong et al. 2017)
_NARROWEST_ERASED = 0.3


class _Draw(IntEnum):
    """Places in an image's sequence of random numbers; they never change, or runs could not be repeated."""

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
    """Parameters of the augmentation of n images, in the order of its steps; None for steps that are switched off."""

    matrix: Floats | None
    """[n, 2, 3]: affine map from a point (x, y) of the augmented image to one of the original, in pixels from the outer
    corner of the first pixel, whose centre is (0.5, 0.5)."""
    color: Floats | None
    """[n, 3, 4]: affine map from (R, G, B, 1) to (R, G, B), on the scale of 0..255, before clamping."""
    erase_anchor: Floats | None
    """[n, 2]: first row and column of the erased rectangle, whole numbers."""
    erase_shape: Floats | None
    """[n, 2]: its height and width, whole numbers; zeros where nothing is erased."""
    flip: NDArray[np.int32] | None
    """[n]: 1 for an image that is mirrored left to right, else 0."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the fields that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def draw_parameters(
    augment: config.Augment, seed: int, epochs: Integers, samples: Integers, image_size: int
) -> AugmentParameters:
    """Draw the parameters for `samples` [n] in `epochs` [n] (or one epoch), at `image_size` pixels a side."""
    state = keyed_hash(seed, _AUGMENT, epochs, samples)
    matrix = color = anchor = shape = flip = None
    if augment.shift or augment.zoom or augment.rotate_degrees:
        matrix = _affine(augment, state, image_size)
    if augment.brightness or augment.contrast or augment.saturation or augment.gray:
        color = _color(augment, state)
    if augment.erase and augment.erase_area:
        anchor, shape = _rectangle(augment, state, image_size)
    if augment.flip:
        flip = (_uniform(state, _Draw.FLIP) < augment.flip).astype(np.int32)
    return AugmentParameters(matrix, color, anchor, shape, flip)


def _uniform(state: Words, draw: _Draw) -> NDArray[np.float64]:
    """Return numbers in [0, 1), [n]: output number `draw` of the SplitMix64 generators that start at `state` [n]."""
    place = np.uint64(draw * int(GOLDEN) % 2**64)
    return (mix(state + place) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _symmetric(state: Words, draw: _Draw, largest: float) -> NDArray[np.float64]:
    """Return numbers in [-largest, largest), [n]."""
    return (2 * _uniform(state, draw) - 1) * largest


def _affine(augment: config.Augment, state: Words, image_size: int) -> Floats:
    """Return the inverse of this map: rotate and zoom about the image's centre, then shift; [n, 2, 3]."""
    angle = np.deg2rad(_symmetric(state, _Draw.ROTATION, augment.rotate_degrees))
    scale = 1 + _symmetric(state, _Draw.ZOOM, augment.zoom)
    shift = np.stack(
        [_symmetric(state, draw, augment.shift * image_size) for draw in (_Draw.SHIFT_X, _Draw.SHIFT_Y)], -1
    )
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    centre = image_size / 2
    offset = centre - np.einsum("nij,nj->ni", linear, centre + shift)
    return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def _color(augment: config.Augment, state: Words) -> Floats:
    """Compose saturation about the pixel's gray, brightness about black and contrast about the mean gray; [n, 3, 4]."""
    saturation = 1 + _symmetric(state, _Draw.SATURATION, augment.saturation)
    saturation[_uniform(state, _Draw.GRAY) < augment.gray] = 0
    brightness = 1 + _symmetric(state, _Draw.BRIGHTNESS, augment.brightness)
    contrast = 1 + _symmetric(state, _Draw.CONTRAST, augment.contrast)
    linear = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA
    linear *= (brightness * contrast)[:, None, None]
    offset = np.broadcast_to((MEAN_GRAY * (1 - contrast))[:, None, None], (len(state), 3, 1))
    return np.concatenate([linear, offset], axis=2).astype(np.float32)


def _rectangle(augment: config.Augment, state: Words, image_size: int) -> tuple[Floats, Floats]:
    """Draw a rectangle as in Random Erasing, cut to the image's sides, anywhere with equal probability."""
    smallest = min(_SMALLEST_ERASED, augment.erase_area)
    area = smallest + _uniform(state, _Draw.ERASE_AREA) * (augment.erase_area - smallest)
    aspect = np.exp(_symmetric(state, _Draw.ERASE_ASPECT, -np.log(_NARROWEST_ERASED)))
    sides = image_size * np.sqrt(np.stack([area * aspect, area / aspect], -1))
    shape = np.clip(np.rint(sides), 1, image_size)
    place = np.stack([_uniform(state, _Draw.ERASE_Y), _uniform(state, _Draw.ERASE_X)], -1)
    anchor = np.floor(place * (image_size - shape + 1))
    shape[_uniform(state, _Draw.ERASE) >= augment.erase] = 0
    return anchor.astype(np.float32), shape.astype(np.float32)
