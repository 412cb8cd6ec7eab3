"""Settings that had another name, or are gone: errors for users' files, a translation for what runs wrote."""

import copy
from typing import Any

RENAMED: dict[str, str | None] = {
    "data.cache": "data.index_folder",
    "faces.images": "faces.images_per_identity",
    "head.state": "head.row_format",
    "head.kernels": "head.backend",
    "head.untouched": "head.inactive_rows",
    "training.accumulation": "training.accumulation_steps",
    "training.extend": "training.more_epochs",
    "training.loss_scale": "training.initial_loss_scale",
    "evaluation.images": "evaluation.image_folder",
    "evaluation.batch": "evaluation.batch_per_rank",
    "tracking.images": "tracking.preview_images",
    "distributed.head_group": None,
}
"""Today's name of a setting by its old one; None for a setting that is gone."""
_VALUES = {"training.extend": {"no": "refuse"}}
"""Today's value by the old one, of settings whose values were renamed with them."""


def advice(key: str) -> str | None:
    """Return what to write in place of an old `section.key`; None where the key is no old one."""
    if key not in RENAMED:
        return None
    name = RENAMED[key]
    if name is None:
        return "is no setting any more: leave it out"
    changed = "".join(f"; {old} is {new} there" for old, new in _VALUES.get(key, {}).items())
    return f"is called {name} now{changed}"


def to_current(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `tree`, the settings as an earlier version wrote them, under the names of today.

    Users' own files are not translated: `load` refuses an old name and gives the new one.
    """
    tree = copy.deepcopy(tree)
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        settings = tree.get(section)
        if not isinstance(settings, dict) or key not in settings:
            continue
        value = settings.pop(key)
        if new is not None:
            settings.setdefault(new.partition(".")[2], _VALUES.get(old, {}).get(value, value))
    return tree
