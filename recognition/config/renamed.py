"""Settings that had another name in files that earlier versions wrote."""

import copy
from typing import Any

from recognition.config.head import Head

_RENAMED = {
    "head": {"state": "row_format", "kernels": "backend", "untouched": "inactive_rows"},
    "training": {"accumulation": "accumulation_steps"},
}


def to_current(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree of settings, as a run wrote it, by the names that settings have today."""
    tree = copy.deepcopy(tree)
    if "row_format" not in Head.model_fields:
        return tree
    for section, names in _RENAMED.items():
        found = tree.get(section)
        if isinstance(found, dict):
            tree[section] = {names.get(name, name): value for name, value in found.items()}
    return tree
