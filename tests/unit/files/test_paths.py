"""Names that a file system can hold, through all that reads training data and all that is said of it."""

import io
import json
import logging
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recognition.data.derived_index import filter_index, merge_indexes
from recognition.data.index import Index, build_index, open_index
from recognition.data.insightface_rec import InsightFaceWriter, pack_image
from recognition.data.quarantine import Quarantine
from recognition.data.recordio import RecordWriter
from recognition.files.paths import runnable, shown

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools" / "index.py"))
NAMES = [
    b"0",
    b"caf\xe9",  # Latin-1
    b"\xff\xfe",
    b"\xed\xa0\x80",  # a surrogate in UTF-8
    "José".encode(),
    b"Jose\xcc\x81",  # the same in the normal form D
    "李小龍".encode(),
    "שלום".encode(),
    "a\u202eb".encode(),  # right-to-left override
    "a\u200bb".encode(),  # a blank without width
    "\U0001f600".encode(),
    b" leading",
    b"trailing ",
    b" ",
    b"two  blanks",
    b"tab\there",
    b"line\nend",
    b"\n",
    b"carriage\rreturn",
    b"escape\x1b[31mred",
    b"bell\x07",
    b"delete\x7f",
    b"~",
    b"~root",
    b"-rf",
    b"--help",
    b"'single'",
    b'"double"',
    b"back\\slash\\n",
    b"$HOME `id` ;&|",
    b"*?[a]{b}",
    b"%s %d {0}",
    b"[bold red]x",
    b"#hash",
    b"a=b,c",
    b"con.",
    b"UPPER",
    b"upper",
    b"n" * 255,
    "é".encode() * 127,
]


def name_of(number: int) -> str:
    return os.fsdecode(NAMES[number])


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(index: Index) -> list[tuple[str, bytes]]:
    return sorted((index.identities[int(index.labels[i])], index.read(i)) for i in range(len(index)))


def status(*arguments: object) -> int:
    """The exit status of the tool."""
    try:
        return int(TOOL["main"]([str(argument) for argument in arguments]))
    except SystemExit as ended:
        return int(str(ended.code))


def assert_plain(text: str) -> None:
    """One line that any terminal and any file takes."""
    text.encode()
    assert text.isprintable()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each name, and in the first a file for each name that leaves room for a suffix."""
    root = tmp_path_factory.mktemp("names") / "set"
    for number in range(len(NAMES)):
        (root / name_of(number)).mkdir(parents=True)
        (root / name_of(number) / "1.png").write_bytes(picture(number))
        # The suffix in place of the end of names that have no room for one; some of them then are equal.
        (root / "0" / (os.fsdecode(NAMES[number][:250]) + ".png")).write_bytes(picture(number))
    return root


@pytest.fixture(scope="module")
def index(faces: Path) -> Index:
    return build_index(faces)


def test_folders_and_files_of_any_name(faces: Path, index: Index) -> None:
    expected = [(name_of(number), picture(number)) for number in range(len(NAMES))]
    expected += [("0", picture(number)) for number in range(len(NAMES))]
    assert content(index) == sorted(expected)
    assert content(open_index(faces)) == content(index)
    for sample in range(len(index)):
        assert_plain(index.describe(sample))
    for note in index.notes:
        assert_plain(note)
    assert "other but for upper and lower case" in index.notes[0].replace("another", "other")


def test_filtered_and_merged(index: Index, tmp_path: Path) -> None:
    keep = index.labels != list(index.identities).index("0")
    filtered = filter_index(index, keep, tmp_path / name_of(1))
    assert content(open_index(tmp_path / name_of(1))) == content(filtered)
    assert [name for name, _ in content(filtered)] == sorted(name_of(number) for number in range(1, len(NAMES)))
    merged = merge_indexes([filtered, index], tmp_path / name_of(16), same_identities=True)
    assert content(open_index(tmp_path / name_of(16))) == sorted(content(filtered) + content(index))
    assert merged.num_identities == len(NAMES)


def test_what_is_said_of_bad_images_is_one_line_each(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name_of(1) / "quarantine.jsonl"
    quarantine = Quarantine(index, path)
    with caplog.at_level(logging.DEBUG):
        for sample in range(len(index)):
            if sample < len(index) - 1:
                quarantine.add(sample, "torn")
    assert len(caplog.messages) == len(index) - 1
    for message in caplog.messages:
        assert_plain(message)
    lines = path.read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["where"] for line in lines] == [index.describe(sample) for sample in range(len(index) - 1)]
    assert Quarantine(index, path, resumed=True).bad == quarantine.bad
    # The list leads to an index without those images.
    assert TOOL["main"](["filter", str(index.path), str(tmp_path / "out"), "--exclude-samples", str(path)]) == 0
    assert open_index(tmp_path / "out").num_images == 1


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: shown(name_of(number))[:20])
def test_a_set_of_any_name(number: int, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As the folder of a .rec file, as the .rec file with its .idx, and in the cache; shown by the tool."""
    name = name_of(number)
    folder = tmp_path / name
    with InsightFaceWriter(folder) as writer:
        for label in (0, 1, 1):
            writer.add(label, b"face %d" % label)
    expected = [("0", b"face 0"), ("1", b"face 1"), ("1", b"face 1")]
    assert content(open_index(folder)) == expected
    rec = folder / os.fsdecode(os.fsencode(name)[:250] + b".rec")
    for suffix in (".rec", ".idx"):
        shutil.copy(folder / f"train{suffix}", rec.with_suffix(suffix))
    index = open_index(rec)
    assert content(index) == expected
    assert index.folder == folder / ".recognition-index" / rec.name
    rec.with_suffix(".idx").write_text("8 0\n")
    capfd.readouterr()
    assert status("show", rec) == 2
    error = capfd.readouterr().err
    if any(character < " " and character != "\t" for character in str(rec)):
        # Refused by name at the beginning, on the command line as in a configuration.
        assert "a path cannot hold the character" in error
        return
    assert shown(rec) in error
    assert_plain(error.rstrip("\n"))
    shutil.copy(folder / "train.idx", rec.with_suffix(".idx"))
    folder.chmod(0o555)
    try:
        shutil.rmtree(folder / ".recognition-index")
        assert open_index(folder, tmp_path / "own" / name).folder.is_relative_to(tmp_path / "own" / name)
        capfd.readouterr()
        assert status("show", folder) == 0
    finally:
        folder.chmod(0o755)
    out = capfd.readouterr().out
    assert shown(folder / "train.rec") in out
    for line in out.split("\n"):
        assert_plain(line)


def test_identities_are_left_out_by_name(index: Index, tmp_path: Path) -> None:
    names = [name for name in NAMES if b"\n" not in name and name != b"0"]
    (tmp_path / "names.txt").write_bytes(b"\n".join(names) + b"\n")
    arguments = ["filter", str(index.path), str(tmp_path / "out"), "--exclude-identities", str(tmp_path / "names.txt")]
    assert TOOL["main"](arguments) == 0
    left = open_index(tmp_path / "out").identities
    assert sorted(map(os.fsencode, left)) == sorted({*NAMES} - {*names})


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: shown(name_of(number))[:20])
def test_a_name_is_shown_on_one_line(number: int) -> None:
    assert_plain(shown(name_of(number)))
    if shown(name_of(number)).startswith("$'"):
        return
    assert shown(name_of(number)) == name_of(number)


def test_bash_takes_what_is_shown_for_the_name() -> None:
    assert all(shown(name).startswith("$'") for name in (" leading", "trailing ", " "))
    quoted = [number for number in range(len(NAMES)) if shown(name_of(number)).startswith("$'")]
    assert len(quoted) >= 10
    command = "printf '%s\\0' " + " ".join(shown(name_of(number)) for number in quoted)
    printed = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert printed.split(b"\0")[:-1] == [NAMES[number] for number in quoted]


def test_chunks_of_any_name(tmp_path: Path) -> None:
    for number in (0, 1):
        with RecordWriter(tmp_path / f"{name_of(1)}\n_{number}.rec") as writer:
            writer.write(0, pack_image(number, 0, b"face"))
    index = open_index(tmp_path)
    assert np.array_equal(index.labels, [0, 1])
    assert_plain(index.notes[0])


def test_a_program_is_named_as_a_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my venv"
    folder.mkdir()
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runnable("tensorboard") == "tensorboard"
    program = folder / "tensorboard"
    program.write_text("#!/bin/sh\necho started\n")
    program.chmod(0o755)
    assert subprocess.run(runnable("tensorboard"), shell=True, capture_output=True, text=True).stdout == "started\n"
    monkeypatch.setenv("PATH", str(folder))
    assert runnable("tensorboard") == "tensorboard"
