"""Triton beside the PyTorch code of a loss: the language, `jit`, and functions that it lacks.

Where Triton is missing, `jit` leaves functions as they are, and nobody calls them: a PyTorch backend needs none.
"""

from typing import Any

__all__ = ["Tile", "arccosine", "jit", "sine_and_cosine", "tl"]

try:
    import triton.language as tl
    from triton import jit
except ImportError:
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any) -> Any:
        """Return `function`."""
        return function


Tile = Any
"""A block of float32 numbers in registers; here [samples, classes], or [samples]."""


@jit
def arccosine(c: "Tile") -> "Tile":
    """Return the arc cosine to 2e-8: Abramowitz and Stegun 1964, 4.4.46, since Triton's interpreter has none."""
    u = tl.abs(c)
    p = 0.0066700901 - 0.0012624911 * u
    p = 0.0308918810 + u * (-0.0170881256 + u * p)
    p = 0.0889789874 + u * (-0.0501743046 + u * p)
    p = 1.5707963050 + u * (-0.2145988016 + u * p)
    root = p * tl.sqrt(1 - u)
    return tl.where(c < 0, 3.141592653589793 - root, root)


@jit
def sine_and_cosine(u: "Tile") -> "tuple[Tile, Tile]":
    """Return both for 0 <= u <= pi / 2, by Taylor series: `tl.sin` keeps a table in memory for angles of any size."""
    square = u * u
    sine = 1 / 120 + square * (-1 / 5040 + square * (1 / 362880 - square / 39916800))
    sine = u * (1 + square * (-1 / 6 + square * sine))
    cosine = -1 / 720 + square * (1 / 40320 - square * (1 / 3628800 - square / 479001600))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * cosine))
    return sine, cosine
