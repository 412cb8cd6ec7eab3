"""TOML that is written can be read, whatever it holds."""

import tomllib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.config.toml import dump

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(
    TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.lists(TEXT, max_size=3)
)
TREES = st.recursive(
    st.dictionaries(TEXT, VALUES, max_size=4),
    lambda inner: st.dictionaries(TEXT, VALUES | inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TREES)
def test_any_tree_comes_back(tree: dict[str, Any]) -> None:
    assert tomllib.loads(dump(tree)) == tree
