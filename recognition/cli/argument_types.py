"""Types of command-line arguments, for argparse, whose messages say what is wrong with a value."""

import argparse
from pathlib import Path

from recognition.errors import UserError
from recognition.files.paths import expanded


def path(text: str) -> Path:
    """Take a path, in which `~` is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; write . for the current folder")
    try:
        return expanded(Path(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """Take a whole number above 0."""
    return _whole(text, above=0)


def above_one(text: str) -> int:
    """Take a whole number above 1: BatchNorm needs two images, and a loss two classes."""
    return _whole(text, above=1)


def whole(text: str) -> int:
    """Take a whole number from 0."""
    return _whole(text, above=-1)


def above_zero(text: str) -> float:
    """Take a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _whole(text: str, *, above: int) -> int:
    # Digits of other scripts are decimal too, and a number of thousands of digits is more than Python converts.
    if not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) <= above:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number {f'above {above}' if above >= 0 else 'from 0'}")
    return int(text)
