"""What a message on training sets and lists of pairs says to do gets on: it is read from the message, and tried."""

import importlib
import io
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recognition import config
from recognition.data.derived_index import filter_index, merge_indexes
from recognition.data.index import build_index, check_trainable, open_index
from recognition.data.insightface_rec import InsightFaceWriter
from recognition.data.procedural.dataset import verification_pairs
from recognition.evaluation.verification_sets import open_sets
from tests.support.ways_out import picture, refusal, way_out


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for person in ("Ann", "Bob"):
        for image in range(2):
            picture(tmp_path / "people" / person / f"{image}.png", level=40 * image)
    return tmp_path / "people"


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    with InsightFaceWriter(tmp_path / "packed") as writer:
        for label in (0, 0, 1, 1):
            writer.add(label, b"image")
    return tmp_path / "packed/train.rec"


@pytest.mark.parametrize("content", ["", "a page\n", "1\n2\n", "1 2 3\n"])
def test_an_idx_is_removed(rec: Path, content: str) -> None:
    idx = rec.with_suffix(".idx")
    idx.write_text(content)
    found = way_out(refusal(lambda: open_index(rec)), r"(\S+\.idx): .* remove it")
    Path(found[1]).unlink()
    assert len(open_index(rec)) == 4


@pytest.mark.parametrize("kind", ["changed", "facts", "numbers"])
def test_a_derived_index_is_made_again(people: Path, tmp_path: Path, kind: str) -> None:
    derived = tmp_path / "derived"

    def make() -> object:
        source = open_index(people)
        return filter_index(source, np.ones(len(source), bool), derived)

    make()
    if kind == "changed":
        picture(people / "Ann/0.png", side=9)
    else:
        facts = next(path for path in derived.iterdir() if (path.suffix == ".json") == (kind == "facts"))
        facts.write_bytes(b"")
    way_out(refusal(lambda: open_index(derived)), "filter or merge again")
    make()
    assert len(open_index(derived)) == 4


def test_an_index_that_is_damaged_inside_is_deleted(rec: Path) -> None:
    index = open_index(rec)
    path = next(path for path in index.folder.iterdir() if "range" in path.name)
    ranges = np.lib.format.open_memmap(path, mode="r+")
    ranges["file"][1] = 9
    ranges.flush()
    index = open_index(rec)
    found = way_out(refusal(lambda: index.read(1)), r"^(.*?): the index is damaged .* delete it")
    shutil.rmtree(found[1])
    assert open_index(rec).read(1) == b"image"


def test_another_place_for_an_index(people: Path, tmp_path: Path) -> None:
    index = open_index(people)
    way_out(refusal(lambda: merge_indexes([index], people)), "choose another place")
    assert len(merge_indexes([index], tmp_path / "elsewhere")) == 4


def test_another_folder_for_the_index(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("recognition.data.source.Source.writable_places", lambda source: (source.places[1],))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = way_out(refusal(lambda: open_index(people)), r"(data\.index_folder)=.*\((--cache) of recognition index\)")
    file = tmp_path / "run.toml"
    file.write_text(f"[data]\npath = '{people}'\n")
    settings = config.load(file, [f"{found[1]}={tmp_path / 'cache'}"]).data
    assert len(build_index(settings.path, settings.index_folder)) == 4


def test_one_person_alone(tmp_path: Path) -> None:
    picture(tmp_path / "people/Ann/0.png")
    way_out(refusal(lambda: check_trainable(open_index(tmp_path / "people"))), "a folder .* of its own for each person")
    picture(tmp_path / "people/Bob/0.png")
    check_trainable(open_index(tmp_path / "people"))


@pytest.mark.parametrize(("pairs", "identities", "pattern"), [(30, 40, r"a multiple of (\d+)"), (20, 3, r"give (\d+)")])
def test_numbers_of_a_set_that_is_rendered(pairs: int, identities: int, pattern: str) -> None:
    number = int(way_out(refusal(lambda: verification_pairs(0, pairs, identities)), pattern)[1])
    verification_pairs(0, 2 * number if pairs % 20 else pairs, identities if pairs % 20 else number)


def test_notes_on_a_folder_of_people(people: Path) -> None:
    picture(people / "Ann/deeper/2.png")
    (people / "Cy").symlink_to(people / "Bob")
    picture(people / "ANN/3.png")
    notes = " ".join(build_index(people).notes)
    way_out(notes, r"move them up into the identity's own folder.*remove the link.*into one folder")
    (people / "Ann/deeper/2.png").rename(people / "Ann/2.png")
    (people / "Ann/deeper").rmdir()
    (people / "Cy").unlink()
    (people / "ANN/3.png").rename(people / "Ann/3.png")
    (people / "ANN").rmdir()
    index = build_index(people)
    assert not index.notes and len(index) == 6


@pytest.mark.parametrize("compressed", ["gzip", "bz2", "lzma"])
def test_a_compressed_file_is_unpacked(tmp_path: Path, compressed: str) -> None:
    compress = importlib.import_module(compressed).compress
    (tmp_path / "FILE").write_bytes(compress(b"[data]\npath = '.'\n"))
    command = way_out(refusal(lambda: config.load(tmp_path / "FILE")), r"unpack it with `([^`]+)`")[1]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"there is no {command.split()[0]}")
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    config.load(tmp_path / "NEW")


def test_an_archive_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[data]\npath = '.'\n")
    with tarfile.open(tmp_path / "FILE", "w") as archive:
        archive.add(tmp_path / "run.toml", "inside.toml")
    command = way_out(refusal(lambda: config.load(tmp_path / "FILE")), r"unpack it with `([^`]+)`")[1]
    subprocess.run([*command.split(), "FILE"], check=True, cwd=tmp_path)
    config.load(tmp_path / "inside.toml")


# --- verification sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of pairs, whose images lie elsewhere."""
    for image in range(4):
        picture(tmp_path / f"far/away/{image}.png", side=8 + 2 * image, level=50 * image)
    lines = [f"{first}.png {second}.png {label}\n" for first, second, label in ((0, 1, 1), (2, 3, 0))]
    (tmp_path / "list.txt").write_text("".join(lines * 10))
    return tmp_path / "list.txt"


def test_the_images_of_a_list(listed: Path, tmp_path: Path) -> None:
    message = refusal(lambda: open_sets([listed], 8))
    way_out(message, r"put the images' folder beside the file, or name it: evaluation\.image_folder, and --images")
    assert len(open_sets([listed], 8, folder=tmp_path / "far/away")[0]) == 20
    (tmp_path / "far/away").rename(tmp_path / "away")
    assert len(open_sets([listed], 8)[0]) == 20


@pytest.mark.parametrize("choice", [0, 1])
def test_images_of_another_size(listed: Path, tmp_path: Path, choice: int) -> None:
    def attempt(fit: str) -> Any:
        return open_sets([listed], 8, folder=tmp_path / "far/away", fit=fit)[0]

    found = way_out(refusal(lambda: attempt("exact")), r"set data\.fit to (\w+) or (\w+)")
    assert len(attempt(found[1 + choice])) == 20


def test_pairs_whose_images_are_missing(listed: Path, tmp_path: Path) -> None:
    with listed.open("a") as file:
        file.write("0.png gone.png 1\n")

    def attempt(missing: Any) -> Any:
        return open_sets([listed], 8, folder=tmp_path / "far/away", missing=missing)[0]

    found = way_out(refusal(lambda: attempt("refuse")), r"evaluation\.missing_images=(\w+)")
    assert len(attempt(found[1])) == 20


def test_a_list_that_is_called_as_a_pickle(listed: Path, tmp_path: Path) -> None:
    wrong = listed.rename(tmp_path / "list.bin")
    found = way_out(refusal(lambda: open_sets([wrong], 8)), r"a file with another suffix, such as (\.\w+)")
    assert len(open_sets([wrong.rename(wrong.with_suffix(found[1]))], 8, folder=tmp_path / "far/away")[0]) == 20


@pytest.mark.parametrize(
    ("wrong", "pattern", "right"),
    [
        (b"0.png 1.png 0\n2.png 3.png -1\n", "write 1 and 0", b"0.png 1.png 1\n2.png 3.png 0\n"),
        (
            "0.png 1.png 1\n2.png 3.png 0 \xe9\n".encode("latin-1"),
            "UTF-8|mend that line",
            b"0.png 1.png 1\n2.png 3.png 0\n",
        ),
        (b"0.png 1.png 1\n2.png 3.png\n", "mend that line", b"0.png 1.png 1\n2.png 3.png 0\n"),
        (b"0.png 1.png 1\n", "use a set with impostor pairs too", b"0.png 1.png 1\n2.png 3.png 0\n"),
    ],
)
def test_lines_of_a_list(listed: Path, tmp_path: Path, wrong: bytes, pattern: str, right: bytes) -> None:
    def attempt(lines: bytes) -> Any:
        listed.write_bytes(lines * 10)
        return open_sets([listed], 8, folder=tmp_path / "far/away")[0]

    way_out(refusal(lambda: attempt(wrong)), pattern)
    assert len(attempt(right)) == 20


def test_a_set_in_the_folder_that_was_given(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    (tmp_path / "sets").mkdir()
    content = [jpeg.getvalue()] * 40, [True, False] * 10
    (tmp_path / "sets/faces.bin").write_bytes(pickle.dumps(content))
    found = way_out(refusal(lambda: open_sets([tmp_path / "sets"], 8)), r"give a file in it, such as (\S+)")
    given = Path(found[1])
    assert len(open_sets([given], 8)[0]) == 20
    way_out(refusal(lambda: open_sets([given, given], 8)), "name it once")
    assert len(open_sets([given], 8)) == 1
