"""Recipes that extend others: `extends = "other.toml"` at the top of a file.

The other is looked for beside the file, then among the recipes that come with the program, so that a copy of one of
those, or a file of one's own that extends it, may lie anywhere.

Tables are merged key by key, and a value of the file itself wins. A section that comes in variants, such as
`head.loss`, is replaced whole where the file gives it another `name`, as the settings of one variant mean nothing to
another.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recognition.config import recipes, toml

KEY = "extends"


def read_extended(path: Path, root: type[BaseModel]) -> dict[str, Any]:
    """Return the tree of the TOML file at `path` upon those that it extends. `root`: the model of a configuration.

    Raises ValueError, which names the file, where one is missing, is not TOML, or extends itself by way of others.
    """
    return _read(path, root, ())


def _read(path: Path, root: type[BaseModel], extending: tuple[Path, ...]) -> dict[str, Any]:
    own = path.resolve()
    if own in extending:
        chain = " extends ".join(str(each) for each in (*extending[extending.index(own) :], own))
        raise ValueError(f"{chain}: remove one of these lines")
    tree = toml.read(path)
    base = tree.pop(KEY, None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base.strip():
        raise ValueError(f'{path}: {KEY} is the path of one other file, as in {KEY} = "other.toml", not {base!r}')
    below = path.parent / Path(base).expanduser()
    if not below.exists():
        recipe = recipes.shipped(base)
        if recipe is None:
            raise ValueError(
                f"{path}: extends {below}, which does not exist; the path is relative to the file's folder, or "
                f"the name of one of the recipes {', '.join(recipes.names())}"
            )
        below = recipe
    return _merge(_read(below, root, (*extending, own)), tree, root, [])


def _merge(below: dict[str, Any], above: dict[str, Any], root: type[BaseModel], keys: list[str]) -> dict[str, Any]:
    """Return `below` with the values of `above` put upon it; `keys` lead from the root to both."""
    if "name" in above and above["name"] != below.get("name") and len(toml.models_at(keys, root)) > 1:
        return above
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            value = _merge(old, value, root, [*keys, key])
        merged[key] = value
    return merged
