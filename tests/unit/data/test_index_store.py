"""Saved indexes: whatever is saved is what is loaded."""

import os
from dataclasses import fields
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from recognition.data.data_files import PackedNames
from recognition.data.index_store import RANGE, IndexContent, load, save

# Any bytes but NUL and the separator of folders, line ends included.
NAMES = st.binary(min_size=1, max_size=8).map(lambda name: os.fsdecode(name.translate(None, b"\0/") or b"x"))
SOME_NAMES = st.lists(NAMES, min_size=1, max_size=8)


@st.composite
def contents(draw: DrawFn) -> IndexContent:
    files, identities = draw(SOME_NAMES), draw(SOME_NAMES)
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=20))
    words = st.tuples(st.integers(0, len(files) - 1), st.integers(0, 2**63), st.integers(0, 2**32 - 1))
    labels = st.integers(0, len(identities) - 1)
    return IndexContent(
        starts=np.cumsum([0, *counts]),
        ranges=np.array(draw(st.lists(words, min_size=sum(counts), max_size=sum(counts))), RANGE),
        labels=np.array(draw(st.lists(labels, min_size=len(counts), max_size=len(counts)))),
        sizes=np.array(draw(st.lists(st.integers(0, 2**62), min_size=len(files), max_size=len(files)))),
        files=PackedNames.of(files),
        identities=PackedNames.of(identities),
        stamp=draw(st.text(max_size=9)),
        roots=tuple(draw(st.lists(st.tuples(st.just(Path("/data")), st.integers(0, 9)), max_size=2))),
        notes=tuple(draw(st.lists(st.text(max_size=9), max_size=2))),
    )


@settings(max_examples=8)  # each is flushed to the disk
@given(content=contents())
def test_what_is_saved_is_loaded(tmp_path: Path, content: IndexContent) -> None:
    save(tmp_path / "index", content)
    found = load(tmp_path / "index")
    assert found.fingerprint == content.compute_fingerprint() == found.compute_fingerprint()
    for field in fields(content):
        saved, loaded = getattr(content, field.name), getattr(found, field.name)
        if isinstance(saved, np.ndarray):
            assert np.array_equal(saved, loaded) and saved.dtype == loaded.dtype
        elif isinstance(saved, PackedNames):
            assert list(saved) == list(loaded)
        elif field.name != "fingerprint":
            assert saved == loaded
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
