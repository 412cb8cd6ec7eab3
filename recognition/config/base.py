"""The base class of all sections, the types that their fields share, and ConfigError."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from recognition.errors import UserError
from recognition.files.paths import expanded


class ConfigError(UserError):
    """All mistakes of a configuration, one per line, each with the path of its key."""


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
    """Return a hint for a missing path: a similar one that exists, or its first folder that is missing; empty: none."""
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
    """Turn a single string into a list of one."""
    return [value] if isinstance(value, str) else value


# A path that has to exist when a run starts; reading an old run's settings does not check it.
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

    @classmethod
    def variants(cls) -> tuple[type["Section"], ...]:
        """Return the sections that a field of this type can hold."""
        return (cls,)
