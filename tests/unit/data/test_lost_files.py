"""Files that go away, are cut or cannot be read after they were indexed: borne as broken images are."""

import errno
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recognition.config import Augment, Data
from recognition.data import index_store
from recognition.data.data_files import DataFiles
from recognition.data.derived_index import filter_index
from recognition.data.index import Index, LostFile, open_index
from recognition.data.insightface_rec import pack_image
from recognition.data.pipeline import Pipeline
from recognition.data.quarantine import Quarantine
from recognition.data.recordio import RecordWriter
from recognition.errors import UserError

IMAGES = 6
Damage = Callable[[Path], object]


def picture(number: int, size: int = 16) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (size, size), (number * 40, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    for number in range(IMAGES):
        folder = tmp_path / "faces" / f"p{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "faces"


def pipeline(index: Index, batch: int = IMAGES, **options: Any) -> Pipeline:
    settings: dict[str, Any] = {
        "seed": 1,
        "rank": 0,
        "world": 1,
        "device": torch.device("cpu"),
        "image_size": 16,
        "channels_last": True,
    }
    data = Data(path=index.path, threads=1, augment=Augment(flip=0.0), loader="torchvision")
    return Pipeline(index, data, batch=batch, **(settings | options))


def samples(index: Index, **options: Any) -> list[int]:
    """Those of an epoch."""
    opened = pipeline(index, **options)
    try:
        return sorted(next(opened).samples.tolist())
    finally:
        opened.close()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_a_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("kept_open", [0, 64])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "No such file"),
        (cut, "shorter"),
        (lambda path: path.write_bytes(b""), "shorter"),
        (into_a_folder, "Is a directory"),
        (into_a_loop, "symbolic links"),
    ],
)
def test_a_file_that_cannot_be_read_is_replaced(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_open: int, damage: Damage, reason: str
) -> None:
    monkeypatch.setattr("recognition.data.data_files._KEPT_OPEN", kept_open)
    index = open_index(faces)
    damage(faces / "p1" / "2.png")
    with pytest.raises(LostFile, match=reason):
        index.read(2)
    assert samples(index, quarantine=tmp_path / "quarantine.jsonl") == [0, 1, 3, 3, 4, 5]
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    facts = json.loads(line)
    assert (facts["sample"], facts["label"], facts["lost"]) == (2, 1, True)
    assert reason in facts["error"] and "p1/2.png" in facts["where"]


@pytest.mark.parametrize(("number", "is_borne"), [(errno.EACCES, True), (errno.EIO, True), (errno.EMFILE, False)])
def test_what_is_not_the_files_fault_is_not_borne(
    faces: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_borne: bool
) -> None:
    index = open_index(faces)
    read = DataFiles.read

    def failing(self: DataFiles, file: int, offset: int, length: int) -> bytes:
        if file == 2:
            raise OSError(number, "reason")
        return read(self, file, offset, length)

    monkeypatch.setattr(DataFiles, "read", failing)
    if is_borne:
        assert samples(index) == [0, 1, 3, 3, 4, 5]
    else:
        with pytest.raises(UserError, match=r"p1/2\.png .*: reason"):
            samples(index)


def test_a_set_that_is_lost_ends_the_run_and_names_the_first(faces: Path, tmp_path: Path) -> None:
    index = open_index(faces)
    for number in range(IMAGES):
        (faces / f"p{number // 2}" / f"{number}.png").rename(tmp_path / f"{number}.png")
    path = tmp_path / "quarantine.jsonl"
    with pytest.raises(UserError, match=r"6 of 6 images cannot be used, .*\.png.*No such file.*Bring lost files back"):
        samples(index, quarantine=path)
    # The way out: once the files are back, the run goes on.
    for number in range(IMAGES):
        (tmp_path / f"{number}.png").rename(faces / f"p{number // 2}" / f"{number}.png")
    again = open_index(faces, resumed_fingerprint=index.fingerprint)
    assert samples(again, quarantine=path, start_step=1) == [*range(IMAGES)]


def test_a_rec_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec") as writer:
        for number in range(IMAGES):
            writer.write(number, pack_image(number // 2, number, picture(number)))
    index = open_index(tmp_path)
    cut(tmp_path / "train.rec")
    assert samples(index) == [0, 0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"train\.rec: record with key 5 at byte .*copy or pack it again"):
        open_index(tmp_path, resumed_fingerprint=index.fingerprint)


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(b"")])
def test_a_run_goes_on_with_the_index_of_its_beginning(faces: Path, damage: Damage) -> None:
    begun = open_index(faces)
    damage(faces / "p1" / "2.png")
    index = open_index(faces, resumed_fingerprint=begun.fingerprint)
    assert index.fingerprint == begun.fingerprint
    assert index.notes[-1].startswith("1 of 6 files are gone or have become shorter")
    assert samples(index) == [0, 1, 3, 3, 4, 5]
    assert open_index(faces, resumed_fingerprint=begun.fingerprint).fingerprint == begun.fingerprint
    # Another run begins on what is there, and both go on.
    other = open_index(faces)
    assert other.num_images == 6 - (damage == Path.unlink)
    assert other.fingerprint != begun.fingerprint
    (faces / "p0" / "0.png").unlink()
    assert open_index(faces).num_images == other.num_images - 1
    index = open_index(faces, resumed_fingerprint=begun.fingerprint)
    assert index.fingerprint == begun.fingerprint
    assert index.notes[-1].startswith("2 of 6 files are gone")
    assert samples(index) == [1, 1, 3, 3, 4, 5]


def test_a_whole_identity_may_be_lost(faces: Path) -> None:
    begun = open_index(faces)
    for number in (0, 1):
        (faces / "p0" / f"{number}.png").unlink()
    (faces / "p0").rmdir()
    index = open_index(faces, resumed_fingerprint=begun.fingerprint)
    assert (index.num_identities, index.fingerprint) == (3, begun.fingerprint)
    assert samples(index) == [2, 2, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["added", "longer", "lost and added"])
def test_a_set_that_has_changed_otherwise_is_another(faces: Path, change: str) -> None:
    begun = open_index(faces)
    if change == "longer":
        (faces / "p1" / "2.png").write_bytes(picture(2) + b"more")
    else:
        (faces / "p1" / "7.png").write_bytes(picture(2))
    if change == "lost and added":
        (faces / "p2" / "5.png").unlink()
    assert open_index(faces, resumed_fingerprint=begun.fingerprint).fingerprint != begun.fingerprint


def test_an_index_of_other_origin_bears_losses_too(faces: Path, tmp_path: Path) -> None:
    begun = filter_index(open_index(faces), np.arange(IMAGES) != 0, tmp_path / "filtered")
    (faces / "p1" / "2.png").unlink()
    index = open_index(tmp_path / "filtered", resumed_fingerprint=begun.fingerprint)
    assert index.notes[-1].startswith("1 of 6 files are gone")
    assert samples(index, batch=5) == [0, 2, 2, 3, 4]
    with pytest.raises(UserError, match=r"2\.png: No such file"):
        open_index(tmp_path / "filtered")


def test_a_run_that_goes_on_keeps_its_quarantine(faces: Path, tmp_path: Path) -> None:
    (faces / "p1" / "2.png").write_bytes(b"no image")
    index, path = open_index(faces), tmp_path / "quarantine.jsonl"
    assert samples(index, quarantine=path) == [0, 1, 3, 3, 4, 5]
    listed = path.read_bytes()
    path.write_bytes(listed + b'{"sample": 3, "lab\n[1]\n{"sample": 900, "label": 0, "where": "", "error": ""}\n')
    before = path.read_bytes()
    assert Quarantine(index, path, resumed=True).bad == {2}
    assert samples(index, quarantine=path, start_step=1) == [0, 1, 3, 3, 4, 5]
    assert path.read_bytes() == before  # nothing is listed twice
    assert Quarantine(index, path).bad == set()
    assert Quarantine(index, tmp_path / "none.jsonl", resumed=True).bad == set()


def test_an_index_that_cannot_be_written_beside_the_data_goes_into_the_cache(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = index_store.save

    def full(folder: Path, content: index_store.IndexContent) -> None:
        if folder.is_relative_to(faces):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        save(folder, content)

    monkeypatch.setattr(index_store, "save", full)
    assert open_index(faces, tmp_path / "own").folder.parent == tmp_path / "own"
    assert open_index(faces, tmp_path / "own").num_images == IMAGES
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot write the index: .*: choose another folder for it, data\.index_folder="
    ):
        open_index(faces, tmp_path / "file")
