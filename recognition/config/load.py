"""Reading a configuration: a TOML file, the recipes that it extends, and overrides; one error lists all mistakes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recognition.config import toml
from recognition.config.base import ConfigError
from recognition.config.extending import read_extended
from recognition.config.sections import Config


def load(path: Path | str, overrides: Sequence[str] = (), *, check_paths: bool = True) -> Config:
    """Read the TOML file at `path`, apply `section.key=value` overrides and validate.

    Values of overrides are TOML values; one that does not parse as TOML is a string. With `check_paths`, input
    paths must exist. Raises ConfigError, which lists every mistake.
    """
    path = Path(path)
    try:
        tree = read_extended(path, Config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    mistakes = toml.apply_overrides(tree, overrides, Config)
    try:
        context = {"check_paths": check_paths, "rendered": _rendered_folder(tree)}
        config = Config.model_validate_json(json.dumps(tree, default=str), context=context)
    except ValidationError as error:
        mistakes += [line for item in error.errors() for line in toml.explain(item, Config).splitlines()]
    if mistakes:
        count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{path}: {count}", *mistakes]))
    return config


def _rendered_folder(tree: dict[str, Any]) -> str | None:
    """Return the folder that the run itself fills with rendered faces, whose files need not exist yet; None: none."""
    data = tree.get("data")
    return str(data["path"]) if "faces" in tree and isinstance(data, dict) and "path" in data else None
