"""The recipes that come with the program: configs/ of the repository, and the same files in an installed package."""

import difflib
import re
from pathlib import Path

from recognition.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Return the folder of the recipes: in an installed package `recognition/recipes`, in a clone `configs`."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def shipped(name: str) -> Path | None:
    """Return the file of the recipe `name`, with or without `.toml`; None where there is none of that name."""
    stem = name.removesuffix(".toml")
    return folder() / f"{stem}.toml" if stem in names() else None


def find(path: Path) -> Path:
    """Return `path` if it exists, else the recipe of that name: `demo`, `demo.toml` and `configs/demo.toml` are one.

    A path that names neither a file nor a recipe is returned as it is. Raises UserError for a bare name that is nearly
    a recipe's.
    """
    if path.exists() or path.parent not in (Path(), Path("configs")) or path.suffix not in ("", ".toml"):
        return path
    if (recipe := shipped(path.name)) is not None:
        return recipe
    near = difflib.get_close_matches(path.name.removesuffix(".toml"), names(), n=1)
    if near:
        raise UserError(f"{path}: No such file or directory; did you mean the recipe {near[0]}?")
    return path


def summary(name: str) -> str:
    """Return the first sentence of the comment that a recipe begins with."""
    comment = []
    for line in (folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"[.:](?: |$)", " ".join(comment))[0]
