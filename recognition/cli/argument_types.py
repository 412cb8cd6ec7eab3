"""Types of command-line arguments, whose messages say what is wrong with a value."""

from pathlib import Path
from typing import Any

import click

from recognition.errors import UserError
from recognition.files.paths import expanded


class _PathType(click.Path):
    """A path, in which `~` is the home folder; shells complete the names of files."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. Fails for an empty text."""
        if isinstance(value, Path):
            return value
        if not value.strip():
            self.fail("an empty path; write . for the current folder", param, ctx)
        try:
            return expanded(Path(value))
        except UserError as error:
            self.fail(str(error), param, ctx)


class _WholeType(click.ParamType):
    """A whole number from `least`."""

    name = "N"

    def __init__(self, least: int) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number. Fails for what is none, or below the least."""
        text = str(value)
        # Digits of other scripts are decimal too, and a number of thousands of digits is more than Python converts.
        if not text.isascii() or not text.isdecimal() or len(text) > 18 or int(text) < self.least:
            bound = f"above {self.least - 1}" if self.least else "from 0"
            self.fail(f"{text} is not a whole number {bound}", param, ctx)
        return int(text)


class _AboveZeroType(click.ParamType):
    """A finite number above 0."""

    name = "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Fails for what is none."""
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"{value} is not a number above 0", param, ctx)
        return number


PATH = _PathType(path_type=Path)
POSITIVE = _WholeType(1)
ABOVE_ONE = _WholeType(2)
"""BatchNorm needs two images, and a loss two classes."""
WHOLE = _WholeType(0)
ABOVE_ZERO = _AboveZeroType()
