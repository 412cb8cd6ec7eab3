"""Drawing primitives: soft shapes on a grid of coordinates, and a canvas for colours."""

from dataclasses import dataclass

import numpy as np

from recognition.data.procedural.identity import Colour

Plane = np.ndarray
"""A float32 number per pixel, [h, w]."""


def inside(distance: Plane, softness: float = 1.0) -> Plane:
    """Return coverage in 0..1 from a signed distance in pixels, negative inside; the edge is `softness` wide."""
    return np.clip(0.5 - distance / softness, 0, 1)


def bump(x: Plane, y: Plane, width: float, height: float) -> Plane:
    """Return a smooth hill of height 1 at the origin, which is zero beyond twice `width` and `height`."""
    hill = np.maximum(1 - ((x / width) ** 2 + (y / height) ** 2) * 0.25, 0)
    hill *= hill
    hill *= hill
    return hill


def rise(value: Plane, low: float, high: float) -> Plane:
    """Return a smooth step from 0 at `low` to 1 at `high`; either may be the smaller."""
    share = np.clip((value - low) / (high - low), 0, 1)
    return share * share * (3 - 2 * share)


def line(distance: Plane, half_width: float, softness: float = 1.2) -> Plane:
    """Return the coverage of a stroke from the distance to its middle line."""
    return inside(np.abs(distance) - half_width, softness)


def scaled(colour: Colour, factor: float) -> Colour:
    """Multiply a colour by `factor`, which makes it darker or lighter."""
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


@dataclass(frozen=True)
class Patch:
    """Rows of the picture: float32 canvas [3, h, w], and the face coordinates x and y of its pixels, [h, w]."""

    canvas: np.ndarray
    x: Plane
    y: Plane
    side: Plane
    """|x|, for symmetric shapes."""

    def between(self, top: float, bottom: float) -> slice:
        """Return the rows with any part of the face between y = top and y = bottom."""
        seen = np.flatnonzero(((self.y > top) & (self.y < bottom)).any(axis=1))
        return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)

    def rows(self, top: float, bottom: float) -> "Patch":
        """Return the rows `between(top, bottom)` as a patch, a view of this one."""
        rows = self.between(top, bottom)
        return Patch(self.canvas[:, rows], self.x[rows], self.y[rows], self.side[rows])

    def paint(self, colour: Colour, mask: Plane) -> None:
        """Blend a colour over the canvas by `mask` in 0..1, in place."""
        for plane, value in zip(self.canvas, colour, strict=True):
            plane += mask * (value - plane)
