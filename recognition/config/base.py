"""What all sections share: their base, the kinds of their fields, and the errors."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


class UserError(ValueError):
    """A mistake in what the user gave. Programs print it without a traceback and exit with status 2."""


class ConfigError(UserError):
    """Every mistake of a configuration, one a line, each with its path."""


def _must_exist(path: Path, info: ValidationInfo) -> Path:
    if info.context and info.context["check_paths"] and not path.exists():
        rendered = info.context["rendered"]
        if rendered is None or not path.is_relative_to(rendered):
            raise ValueError(f"no such file or folder: {path}")
    return path


def as_list(value: Any) -> Any:
    """Take one string for a list of one."""
    return [value] if isinstance(value, str) else value


# A path that has to exist when a run starts; it is not looked for when an old run's settings are only read.
InputPath = Annotated[Path, Field(strict=False), AfterValidator(_must_exist)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
