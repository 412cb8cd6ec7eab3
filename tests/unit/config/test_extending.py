"""Recipes that extend others."""

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest

from recognition import config
from recognition.config.toml import dump

RECIPES = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
BASE = """
[data]
path = "faces"
threads = 3
[head.loss]
name = "cosface"
scale = 20.0
margin = 0.2
[training]
epochs = 7.0
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(path: Path, *overrides: str) -> config.Config:
    return config.load(path, overrides, check_paths=False)


def test_values_of_the_file_win_and_overrides_over_both(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", BASE)
    own = write(tmp_path / "more/own.toml", 'extends = "../base.toml"\n[data]\nthreads = 5\n[head]\nchunk = 9\n')
    found = load(own, "training.epochs=2.0", "head.loss.margin=0.3")
    assert (found.data.path, found.data.threads, found.head.chunk, found.training.epochs) == (Path("faces"), 5, 9, 2.0)
    assert found.head.loss == config.CosFace(scale=20.0, margin=0.3)


def test_a_chain_of_three_is_one_file_with_all(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", BASE)
    write(tmp_path / "b.toml", 'extends = "a.toml"\n[head.loss]\nmargin = 0.4\n')
    own = write(tmp_path / "c.toml", 'extends = "b.toml"\n[training]\nepochs = 9.0\n')
    whole = write(tmp_path / "whole.toml", BASE.replace("0.2", "0.4").replace("7.0", "9.0"))
    assert load(own) == load(whole)
    assert "extends" not in tomllib.loads(load(own).to_toml())


def test_another_variant_replaces_the_whole_section(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", BASE)
    own = write(tmp_path / "own.toml", 'extends = "base.toml"\n[head.loss]\nname = "arcface"\n')
    assert load(own).head.loss == config.ArcFace()
    same = write(tmp_path / "same.toml", 'extends = "base.toml"\n[head.loss]\nname = "cosface"\nmargin = 0.1\n')
    assert load(same).head.loss == config.CosFace(scale=20.0, margin=0.1)


def test_a_file_anywhere_extends_a_recipe_that_comes_with_the_program(tmp_path: Path) -> None:
    shipped = RECIPES[0].parent / "glint360k_r100.toml"
    copied = write(tmp_path / "copied.toml", shipped.read_text())
    assert load(copied) == load(shipped)
    own = write(tmp_path / "own.toml", 'extends = "glint360k_r100.toml"\n[training]\nepochs = 3.0\n')
    assert (load(own).backbone.name, load(own).training.epochs) == ("iresnet100", 3.0)
    # A file beside it comes first.
    write(tmp_path / "glint360k_r100.toml", BASE)
    assert load(own).head.loss == config.CosFace(scale=20.0, margin=0.2)


@pytest.mark.parametrize(
    ("extends", "part"),
    [
        (
            '"none.toml"',
            "none.toml, which does not exist; .* file's folder, or the name of one of the recipes demo, ",
        ),
        ("3", "extends is the path of one other file"),
        ('["a.toml", "b.toml"]', "extends is the path of one other file"),
        ('""', "extends is the path of one other file"),
        ('"own.toml"', "remove one of these lines"),
        ('"other.toml"', "own.toml extends .*other.toml extends .*own.toml: remove one of these lines"),
        ('"."', "is a folder"),
        ('"broken.toml"', "broken.toml: not valid TOML"),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, extends: str, part: str) -> None:
    write(tmp_path / "other.toml", 'extends = "own.toml"\n')
    write(tmp_path / "broken.toml", "[data\n")
    own = write(tmp_path / "own.toml", f"extends = {extends}\n" + BASE)
    with pytest.raises(config.ConfigError, match=part):
        load(own)


def leaves(tree: dict[str, Any], path: str = "") -> set[str]:
    """Return the settings of a tree, each with its value."""
    found = set()
    for key, value in tree.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key} = {value!r}"}
    return found


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(RECIPES, 2)), ids=lambda path: path.stem)
def test_no_two_recipes_write_more_alike_than_they_differ(one: Path, other: Path) -> None:
    written = [leaves(tomllib.loads(path.read_text())) for path in (one, other)]
    assert len(written[0] & written[1]) <= len(written[0] ^ written[1])


def test_that_measure_sees_a_copy() -> None:
    base = leaves(tomllib.loads(BASE))
    copy = leaves(tomllib.loads(BASE.replace("7.0", "8.0")))
    assert len(base & copy) > len(base ^ copy)
    assert leaves(tomllib.loads(dump(tomllib.loads(BASE)))) == base
