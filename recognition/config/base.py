"""What all sections share: their base, the kinds of their fields, and the errors."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


class UserError(ValueError):
    """A mistake in what the user gave. Programs print it without a traceback and exit with status 2."""


class FailedElsewhere(UserError):
    """Another rank failed first, and tells the user why; this one stops for want of it."""

    is_far = False
    """Whether that rank is on another machine, whose messages this machine's user may not see."""
    status = 2
    """Its exit status."""


class ConfigError(UserError):
    """Every mistake of a configuration, one a line, each with its path."""


def expanded(path: Path) -> Path:
    """Put the home folder in the place of `~`, which shells leave alone behind a `=`. Raises UserError."""
    text = str(path)
    odd = next((character for character in text if character < " " and character != "\t"), None)
    if odd is not None:
        raise UserError(
            f"a path cannot hold the character {odd!r} here: {text!r}; rename it, or link it under another name. Where "
            "a \\ was meant, put the text in single quotes"
        )
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"no home folder is known for {path.parts[0]}: write {text} out") from None


def _not_empty(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("an empty path; write . for the current folder")
    return value


def _must_exist(path: Path, info: ValidationInfo) -> Path:
    if info.context and info.context["check_paths"]:
        rendered = info.context["rendered"]
        try:
            path.stat()
        except FileNotFoundError:
            if rendered is None or not path.is_relative_to(Path(rendered).expanduser()):
                raise ValueError(f"no such file or folder: {path}{_near(path)}") from None
        except OSError as error:
            raise ValueError(f"cannot be read: {path}: {error.strerror or error}") from None
    return path


def _near(path: Path) -> str:
    """What there is instead of a path: the folder where it ends, and names that are much like it."""
    folder, missing = path.parent, path.name
    try:
        while not folder.is_dir() and folder != folder.parent:
            folder, missing = folder.parent, folder.name
        near = difflib.get_close_matches(missing, [entry.name for entry in os.scandir(folder)], n=1)
    except OSError:
        return ""
    if near:
        return f"; did you mean {folder / near[0]}?"
    return "" if folder == path.parent else f"; there is no {missing} in {folder}"


def as_list(value: Any) -> Any:
    """Take one string for a list of one."""
    return [value] if isinstance(value, str) else value


# A path that has to exist when a run starts; it is not looked for when an old run's settings are only read.
InputPath = Annotated[
    Path, Field(strict=False), BeforeValidator(_not_empty), AfterValidator(expanded), AfterValidator(_must_exist)
]
OutputPath = Annotated[Path, Field(strict=False), BeforeValidator(_not_empty), AfterValidator(expanded)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
