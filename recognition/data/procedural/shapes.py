"""What a face is drawn with: soft shapes on a grid of coordinates, and a canvas to lay colours on."""

from dataclasses import dataclass

import numpy as np

from recognition.data.procedural.identity import Colour

Plane = np.ndarray
"""One float32 number a pixel, [h, w]."""


def inside(distance: Plane, softness: float = 1.0) -> Plane:
    """Coverage in 0..1 from a signed distance in pixels, negative inside, over an edge of that softness."""
    return np.clip(0.5 - distance / softness, 0, 1)


def bump(x: Plane, y: Plane, width: float, height: float) -> Plane:
    """A smooth hill of height 1 at the origin, zero from twice that width and height."""
    hill = np.maximum(1 - ((x / width) ** 2 + (y / height) ** 2) * 0.25, 0)
    hill *= hill
    hill *= hill
    return hill


def rise(value: Plane, low: float, high: float) -> Plane:
    """A smooth step from 0 at `low` to 1 at `high`, which may be the smaller."""
    share = np.clip((value - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)


def line(distance: Plane, half_width: float, softness: float = 1.2) -> Plane:
    """Coverage of a stroke from the distance to its middle."""
    return inside(np.abs(distance) - half_width, softness)


def scaled(colour: Colour, factor: float) -> Colour:
    """A darker or lighter colour."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


@dataclass(frozen=True)
class Patch:
    """Some rows of the picture: float32 canvas [3, h, w], and the face coordinates x and y of its pixels [h, w]."""

    canvas: np.ndarray
    x: Plane
    y: Plane
    side: Plane
    """|x|, for what is mirrored."""

    def between(self, top: float, bottom: float) -> slice:
        """The rows that show anything of the face between y = top and y = bottom."""
        seen = np.flatnonzero(((self.y > top) & (self.y < bottom)).any(axis=1))
        return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)

    def rows(self, top: float, bottom: float) -> "Patch":
        """The same rows as a patch, a view of this one."""
        rows = self.between(top, bottom)
        return Patch(self.canvas[:, rows], self.x[rows], self.y[rows], self.side[rows])

    def paint(self, colour: Colour, mask: Plane) -> None:
        """Lay a colour over the canvas where the mask says, in place."""
        for plane, value in zip(self.canvas, colour, strict=True):
            plane += mask * (value - plane)
