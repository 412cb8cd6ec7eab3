"""The reference of all settings."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recognition import config
from recognition.config import reference
from recognition.errors import UserError

DOCUMENT = Path(__file__).parents[3] / "docs/settings.md"
HEADING = re.compile(r"^#+ `(?:\[(?P<section>[\w.]+)\]|name = \"(?P<variant>\w+)\")`$")


def rows() -> Iterator[tuple[str, str | None, list[str]]]:
    """Yield section, variant and cells of each setting in the document."""
    section, variant = "", None
    for line in DOCUMENT.read_text().splitlines():
        if heading := HEADING.match(line):
            section, variant = heading["section"] or section, heading["variant"]
        elif line.startswith("| `"):
            yield section, variant, [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, str | None, str, Any]]:
    """Yield section, variant, key and value of each setting of a run."""
    for key, value in tree.items():
        inner = f"{path}.{key}".strip(".")
        if isinstance(value, dict) and inner != "backbone.options":
            yield from leaves(value, inner)
        elif not (key == "name" and path != "backbone"):
            yield path, tree.get("name") if path != "backbone" else None, key, value


def whole_runs() -> Iterator[dict[str, Any]]:
    """Yield runs that have each loss and each optimizer, and all optional sections."""
    optional: dict[str, dict[str, float]] = {
        "center": {},
        "triplet": {},
        "contrastive": {},
        "filter": {"threshold": 0.4},
    }
    for loss in config.Loss.variants():
        for optimizer in ("sgd", "adamw"):
            name = loss.model_fields["name"].default
            head = {"loss": {"name": name}, "optimizer": {"name": optimizer}}
            on_cosines = name not in ("softmax", "sphereface")
            head |= optional if on_cosines else {}
            tree = {
                "data": {"path": "faces", "images_per_identity": 2},
                "faces": {"identities": 3, "images_per_identity": 4},
                "head": head,
                "optimizer": {"name": optimizer},
            }
            context = {"check_paths": False, "rendered": None}
            yield json.loads(config.Config.model_validate_json(json.dumps(tree), context=context).model_dump_json())


def test_the_document_is_current() -> None:
    printed = subprocess.run([sys.executable, "-m", reference.__name__], check=True, capture_output=True, text=True)
    assert printed.stdout == DOCUMENT.read_text(), "run `make docs`"


def test_every_setting_is_in_it_with_its_default() -> None:
    given = {"path", "identities", "threshold", "faces.images_per_identity", "data.images_per_identity"}
    found = {(section, variant, cells[0].strip("`")): cells for section, variant, cells in rows()}
    wanted = {leaf[:3]: leaf[3] for run in whole_runs() for leaf in leaves(run)}
    sections = {section for section, _, _ in wanted}
    # Optional sections that a run does without.
    wanted = {key: value for key, value in wanted.items() if f"{key[0]}.{key[2]}" not in sections}
    assert {"head.loss", "head.filter", "data.augment", "export"} <= sections
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key[2] in given or f"{key[0]}.{key[2]}" in given:
            continue
        default = found[key][2]
        assert (None if default == "none" else json.loads(default.strip("`"))) == value, key


def test_every_meaning_is_a_sentence() -> None:
    for section, _, cells in rows():
        assert len(cells) == 4, cells
        meaning = cells[3]
        assert meaning.endswith(".") and len(meaning.split()) > 2, (section, cells)
        assert meaning.split()[0].lower() not in ("what", "of", "likewise"), (section, cells)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("training.global_batch", "positive integer; default: 1024."),
        ("training.epochs", "positive number; default: 20.0."),
        ("training.clip_norm", "number, 0 or more; default: 5.0."),
        ("training.gamma", "number above 0 to below 1; default: 0.1."),
        ("training.milestones", "list of positive numbers; default: []."),
        ("head.row_format", 'one of float32, split, bfloat16; default: "float32".'),
        ("head.chunk", "positive integer; default: none."),
        ("backbone.compile", 'one of auto, true, false; default: "auto".'),
        ("backbone.dropout", "number from 0 to below 1; default: 0.0."),
        ("backbone.options", "table of keys and values; default: {}."),
        ("backbone.freeze", "list of texts; default: []."),
        ("data.path", "path; default: required."),
        ("data.augment.rotate_degrees", "number from 0 to 180; default: 0.0."),
        ("evaluation.pairs", "list of paths; default: []."),
        ("export.enabled", "true or false; default: true."),
        ("export.opset", "integer from 11 up; default: 18."),
        ("checkpoint.keep", "positive integer; default: 2."),
        ("optimizer.betas", "two numbers, each from 0 to below 1; default: [0.9, 0.999]."),
        ("head.loss.name", "one of softmax, normface,"),
        ("head.optimizer.name", "one of sgd, adamw."),
    ],
)
def test_types_and_defaults_in_words(key: str, part: str) -> None:
    assert reference.describe(key).startswith(f"{key}: {part}")


def test_settings_of_variants_and_sections() -> None:
    scales = reference.describe("head.loss.scale").split("\n\n")
    assert any("default: 256.0" in text and text.endswith("with name = circle") for text in scales)
    assert any("default: 64.0" in text and ", arcface, combined," in text for text in scales)
    tracking = reference.describe("tracking")
    assert tracking.startswith("[tracking] ") and "\n  every_steps: positive integer; default: 10. " in tracking
    assert "[optimizer] " in reference.describe("optimizer") and "name = adamw" in reference.describe("optimizer")


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("training.epoch", "did you mean training.epochs?"),
        ("head.los", "did you mean head.loss?"),
        ("optimizer.momentom", "did you mean optimizer.momentum?"),
        ("head.state", "head.state is called head.row_format now"),
        ("zzz", "docs/settings.md has all"),
        ("", "no setting"),
    ],
)
def test_unknown_keys(key: str, part: str) -> None:
    with pytest.raises(UserError, match=re.escape(part)):
        reference.describe(key)
