import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recognition.data import index as index_module
from recognition.data.derived_index import filter_index, merge_indexes
from recognition.data.index import Index, build_index, open_index
from recognition.data.insightface_rec import InsightFaceWriter
from recognition.errors import UserError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "index.py"
BESIDE = ".recognition-index"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "recognition"


def person_bytes(person: str, image: int) -> bytes:
    return f"{person} {image}".encode()


@pytest.fixture
def people(tmp_path) -> Path:
    """Three identities in folders, out of order, with what has to be passed over."""
    for person, count in (("Bo", 2), ("Al", 3), ("Cy", 1)):
        (tmp_path / "people" / person).mkdir(parents=True)
        for image, suffix in zip(range(count), ("jpg", "PNG", "webp"), strict=False):
            (tmp_path / "people" / person / f"{image}.{suffix}").write_bytes(person_bytes(person, image))
    for extra in ("Al/notes.txt", "Al/.hidden.jpg", "loose.jpg"):
        (tmp_path / "people" / extra).write_bytes(b"no sample")
    (tmp_path / "people" / "Empty").mkdir()
    (tmp_path / "people" / ".trash").mkdir()
    (tmp_path / "people" / ".trash" / "0.jpg").write_bytes(b"no sample")
    (tmp_path / "people" / "Al" / "deeper.jpg").mkdir()
    return tmp_path / "people"


@pytest.fixture
def recs(tmp_path) -> Path:
    with InsightFaceWriter(tmp_path / "recs") as writer:
        for label, count in enumerate((2, 1, 3)):
            for image in range(count):
                writer.add(label, person_bytes(f"R{label}", image))
    return tmp_path / "recs"


def samples(index: Index) -> list[tuple[bytes, str]]:
    return [(index.read(i), index.identities[int(index.labels[i])]) for i in range(index.num_images)]


def linked(rec: Path, folder: Path) -> Path:
    """A link to `rec` and its .idx, so that the index does not go beside the original."""
    for file in (rec, rec.with_suffix(".idx")):
        (folder / file.name).symlink_to(file)
    return folder / rec.name


def test_real_faces(shared_data, tmp_path):
    index = open_index(linked(shared_data / "lfw-split" / "train.rec", tmp_path).parent)
    assert (index.num_images, index.num_identities) == (4518, 341)
    counts = np.bincount(index.labels)
    listed = [line.split("\t") for line in (shared_data / "lfw-split" / "labels.txt").read_text().splitlines()]
    assert counts.tolist() == [int(line[2]) for line in listed]
    for sample in (0, 17, 2000, 4517):
        with Image.open(BytesIO(index.read(sample))) as image:
            assert image.convert("RGB").size == (112, 112)


def test_reads_divided_records(shared_data, tmp_path):
    expected = json.loads((shared_data / "formats" / "expected.json").read_text())["edge_hdr"]
    index = build_index(linked(shared_data / "formats" / "edge_hdr.rec", tmp_path))
    assert [index.read(i) for i in range(4)] == [bytes.fromhex(record["payload_hex"]) for record in expected]
    assert list(index.identities) == ["0", "1", "3", "16777216"]
    assert index.labels.tolist() == [2, 1, 0, 3]


def test_a_folder_of_identity_folders(people):
    index = build_index(people)
    expected = [
        (person_bytes(person, image), person) for person, n in (("Al", 3), ("Bo", 2), ("Cy", 1)) for image in range(n)
    ]
    assert samples(index) == expected
    assert index.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert index.files[3] == people / "Bo" / "0.jpg"
    assert index.files[-1:] == [people / "Cy" / "0.jpg"]
    assert index.folder.is_relative_to(people / BESIDE)
    assert str(people / "Bo" / "1.PNG") in index.describe(4) and "identity Bo" in index.describe(4)


def test_a_rec_file_and_its_folder_are_the_same(recs):
    index = open_index(recs)
    assert samples(index) == [
        (person_bytes(f"R{i}", n), str(i)) for i, count in enumerate((2, 1, 3)) for n in range(count)
    ]
    assert open_index(recs / "train.rec").folder == index.folder
    with pytest.raises(IndexError):
        index.read(6)


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9\nbar")
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.jpg").write_bytes(b"image")
    assert samples(open_index(tmp_path)) == [(b"image", name)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "neither train.rec nor a folder per identity"),
        (["a.jpg"], "images but no folder per identity"),
        (["Al/notes.txt", "Bo/notes.txt"], r"no images \(.jpg.* in its 2 folders"),
    ],
)
def test_a_folder_without_faces_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        open_index(tmp_path)


def test_other_paths_are_refused(tmp_path):
    (tmp_path / "train.idx").touch()
    with pytest.raises(UserError, match="no such file or folder"):
        open_index(tmp_path / "gone")
    with pytest.raises(UserError, match=r"neither a \.rec file nor a folder"):
        open_index(tmp_path / "train.idx")


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """The paths that were built."""
    done: list[Path] = []
    original = index_module._build

    def build(path: Path, source: Any) -> Any:
        done.append(path)
        return original(path, source)

    monkeypatch.setattr(index_module, "_build", build)
    return done


@pytest.mark.parametrize("data", ["people", "recs"])
def test_an_index_is_built_once(data, request, builds):
    path = request.getfixturevalue(data)
    assert samples(open_index(path)) == samples(open_index(path))
    assert builds == [path]


def test_changed_images_are_indexed_anew(people, builds):
    before = open_index(people).fingerprint
    changes = [
        lambda: (people / "Al" / "new.jpg").write_bytes(b"new"),
        lambda: (people / "Al" / "new.jpg").write_bytes(b"longer"),
        lambda: (people / "Al" / "new.jpg").unlink(),
        lambda: os.utime(people / "Bo" / "0.jpg", ns=(0, 0)),
    ]
    fingerprints = []
    for number, change in enumerate(changes, 2):
        change()
        index = open_index(people)
        assert len(builds) == 2 * number - 2
        assert samples(index) == samples(build_index(people))
        fingerprints.append(index.fingerprint)
    assert len({before, fingerprints[0], fingerprints[1]}) == 3
    assert fingerprints[2:] == [before, before]


def test_changed_records_are_indexed_anew(recs, builds):
    open_index(recs)
    with InsightFaceWriter(recs) as writer:
        writer.add(0, b"other")
    assert samples(open_index(recs)) == [(b"other", "0")]
    (recs / "train.idx").unlink()
    assert samples(open_index(recs)) == [(b"other", "0")]
    os.utime(recs / "train.rec", ns=(0, 0))
    open_index(recs)
    assert len(builds) == 4


def test_a_shortened_file_is_named(recs):
    index = open_index(recs)
    os.truncate(recs / "train.rec", 100)
    with pytest.raises(UserError, match=r"sample 5 .*train\.rec at byte .*identity 2\).*shorter"):
        index.read(5)


def test_a_missing_image_is_named(people, monkeypatch):
    monkeypatch.setattr("recognition.data.data_files._KEPT_OPEN", 0)
    index = open_index(people)
    assert index.read(3) == person_bytes("Bo", 0)
    (people / "Bo" / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"sample 3 .*Bo/0\.jpg.*identity Bo\): No such file"):
        index.read(3)


@pytest.mark.parametrize(
    "name", ["ranges.npy", "starts.npy", "labels.npy", "files.txt", "identities.npy", "recognition-index.json"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other"])
def test_a_damaged_index_is_built_anew(recs, builds, caplog, name, damage):
    index = open_index(recs)
    expected = samples(index)
    path = index.folder / name
    content = path.read_bytes()
    path.unlink()
    if damage == "other":
        path.write_bytes(b"[1]")
    elif damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert samples(open_index(recs)) == expected
    assert len(builds) == 2
    assert "damaged" in caplog.text


def test_fingerprint_is_independent_of_the_place_and_the_time(people, recs, tmp_path):
    for data in (people, recs):
        before = build_index(data)
        copy = Path(shutil.copytree(data, tmp_path / "elsewhere" / data.name, ignore=shutil.ignore_patterns(BESIDE)))
        for file in copy.rglob("*"):
            os.utime(file, ns=(0, 10**9))
        assert open_index(copy).fingerprint == before.fingerprint
    (recs / "train.idx").unlink()
    assert open_index(recs).fingerprint == before.fingerprint


def test_fingerprint_depends_on_what_a_sample_is(people, tmp_path):
    before = build_index(people).fingerprint
    (people / "Al" / "0.jpg").rename(people / "Bo" / "00.jpg")
    moved = build_index(people).fingerprint
    (people / "Bo" / "00.jpg").rename(people / "Bo" / "000.jpg")
    assert len({before, moved, build_index(people).fingerprint}) == 3


@pytest.mark.parametrize("explicit", [True, False])
def test_read_only_data_is_indexed_in_the_cache(people, cache, tmp_path, builds, explicit):
    people.chmod(0o555)
    try:
        chosen = tmp_path / "chosen" if explicit else None
        index = open_index(people, chosen)
        assert index.folder.parent == (chosen or cache)
        assert open_index(people, chosen).folder == index.folder
        assert not (people / BESIDE).exists()
    finally:
        people.chmod(0o755)
    assert len(builds) == 1


def test_an_index_beside_data_that_became_read_only_is_used(people, builds):
    index = open_index(people)
    people.chmod(0o555)
    try:
        assert open_index(people).folder == index.folder
    finally:
        people.chmod(0o755)
    assert len(builds) == 1


def test_builds_at_once_leave_a_whole_index(people):
    expected = samples(build_index(people))
    stop = threading.Event()

    def read() -> int:
        reads = 0
        while not stop.is_set() or not reads:
            assert samples(open_index(people)) == expected
            reads += 1
        return reads

    with ThreadPoolExecutor(8) as pool:
        reader = pool.submit(read)
        builders = [pool.submit(lambda: [samples(build_index(people)) == expected for _ in range(5)]) for _ in range(4)]
        try:
            assert all(all(builder.result()) for builder in builders)
        finally:
            stop.set()
        assert reader.result()
    assert [path.name for path in (people / BESIDE).iterdir()] == ["images"]


@pytest.mark.parametrize("kept_open", [0, 64])
def test_reading_from_threads(recs, people, monkeypatch, kept_open):
    monkeypatch.setattr("recognition.data.data_files._KEPT_OPEN", kept_open)
    for data in (recs, people):
        index = open_index(data)
        expected = [image for image, _ in samples(index)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(index.read, list(range(6)) * 50)) == expected * 50


def test_filter_rewrites_the_index_alone(recs, tmp_path):
    index = open_index(recs)
    keep = np.array([True, False, False, True, False, True])
    expected = [sample for sample, kept in zip(samples(index), keep, strict=True) if kept]
    filtered = filter_index(index, keep, tmp_path / "filtered")
    assert samples(filtered) == expected
    assert filtered.labels.tolist() == [0, 1, 1]
    assert list(filtered.identities) == ["0", "2"]
    opened = open_index(tmp_path / "filtered")
    assert samples(opened) == expected
    assert opened.fingerprint != index.fingerprint
    assert filter_index(index, np.ones(6, bool), tmp_path / "all").fingerprint == index.fingerprint


def test_filter_keeps_divided_records_whole(shared_data, tmp_path):
    index = build_index(linked(shared_data / "formats" / "edge_hdr.rec", tmp_path))
    filtered = filter_index(index, np.array([True, False, True, True]), tmp_path / "filtered")
    assert samples(filtered) == [sample for i, sample in enumerate(samples(index)) if i != 1]


def test_merge_joins_rec_files_and_folders(recs, people, tmp_path):
    one, two = open_index(recs), open_index(people)
    merged = merge_indexes([one, filter_index(two, np.arange(6) != 3, tmp_path / "filtered"), one], tmp_path / "merged")
    expected = [(image, f"0/{who}") for image, who in samples(one)]
    expected += [(image, f"1/{who}") for i, (image, who) in enumerate(samples(two)) if i != 3]
    expected += [(image, f"2/{who}") for image, who in samples(one)]
    assert samples(open_index(tmp_path / "merged")) == samples(merged) == expected
    assert merged.labels.max() + 1 == merged.num_identities == 9
    assert sorted(set(merged.labels.tolist())) == list(range(9))


def test_a_derived_index_notices_changed_data(recs, tmp_path):
    filter_index(open_index(recs), np.ones(6, bool), tmp_path / "filtered")
    with InsightFaceWriter(recs) as writer:
        writer.add(0, b"other")
    with pytest.raises(UserError, match=r"filtered: the data .* has changed"):
        open_index(tmp_path / "filtered")
    (recs / "train.rec").unlink()
    with pytest.raises(UserError, match=r"train\.rec: No such file"):
        open_index(tmp_path / "filtered")


def test_a_derived_index_does_not_replace_other_folders(recs, people):
    with pytest.raises(UserError, match="exists and is no index"):
        filter_index(open_index(recs), np.ones(6, bool), people)
    assert (people / "Al" / "0.jpg").exists()


@pytest.mark.parametrize("keep", [np.zeros(6, bool), np.ones(5, bool), np.arange(6)])
def test_filters_that_make_no_sense_are_refused(recs, tmp_path, keep):
    with pytest.raises(UserError, match=r"no samples are kept|6 booleans"):
        filter_index(open_index(recs), keep, tmp_path / "filtered")


def test_the_tool_shows_what_was_built(recs, capsys):
    program = runpy.run_path(str(TOOL))
    outputs = []
    for command in ("build", "show"):
        assert program["main"]([command, str(recs)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    for text in (
        "images               6\n",
        "min 1, median 2, mean 2.0, max 3",
        "1 identities",
        open_index(recs).fingerprint,
    ):
        assert text in outputs[0]


def test_the_tool_prints_mistakes_without_traceback(tmp_path):
    command = [sys.executable, str(TOOL), "show", "gone"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: gone: no such file or folder\n"
