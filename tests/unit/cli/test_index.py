"""tools/index.py: what it shows, filters and merges."""

import runpy
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from recognition.data.index import open_index

TOOL = runpy.run_path(str(Path(__file__).resolve().parents[3] / "tools" / "index.py"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """1, 2 and 3 images, of 8 x 8 but for Cy's, which are 12 x 6, 8 x 8 and broken."""
    for person, shapes in (("Al", [(8, 8)]), ("Bo", [(8, 8), (8, 8)]), ("Cy", [(12, 6), (8, 8), None])):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for number, shape in enumerate(shapes):
            buffer = BytesIO()
            if shape is not None:
                Image.new("RGB", shape).save(buffer, "PNG")
            (tmp_path / "faces" / person / f"{number}.png").write_bytes(buffer.getvalue())
    return tmp_path / "faces"


def call(*arguments: object) -> int:
    return int(TOOL["main"]([str(argument) for argument in arguments]))


def identities(folder: Path) -> dict[str, int]:
    index = open_index(folder)
    labels = index.labels.tolist()
    return {name: labels.count(label) for label, name in enumerate(index.identities)}


def test_show_samples_sizes_and_says_what_is_not_taken(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (faces / "Al" / "notes.txt").touch()
    for command in ("build", "show"):
        assert call(command, faces) == 0
        out = capsys.readouterr().out
        assert "width x height       8 x 8: 4, 12 x 6: 1, unusable: 1 (of 6 images)\n" in out
        assert "note                 not taken: 1 .txt file (Al/notes.txt)\n" in out
        assert "note                 1 of 3 identities have one image only\n" in out


def test_filter_by_number_and_by_name(faces: Path, tmp_path: Path) -> None:
    assert call("filter", faces, tmp_path / "two", "--min-images", 2) == 0
    assert identities(tmp_path / "two") == {"Bo": 2, "Cy": 3}
    (tmp_path / "names.txt").write_text("Cy\n\nAl\n")
    assert call("filter", faces, tmp_path / "one", "--exclude-identities", tmp_path / "names.txt") == 0
    assert identities(tmp_path / "one") == {"Bo": 2}
    assert call("filter", tmp_path / "two", tmp_path / "three", "--min-images", 3) == 0
    assert identities(tmp_path / "three") == {"Cy": 3}


def test_filter_by_what_could_not_be_used(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = open_index(faces)
    line = '{"sample": 5, "label": 2, "where": "%s", "error": "no bytes"}\n'
    (tmp_path / "bad.jsonl").write_text(line % index.describe(5) + line % index.describe(5))
    arguments = "filter", faces, tmp_path / "out", "--min-images", 2, "--exclude-samples", tmp_path / "bad.jsonl"
    assert call(*arguments) == 0
    assert identities(tmp_path / "out") == {"Bo": 2, "Cy": 2}
    for text, message in ((line % "elsewhere", "line 1 is about elsewhere"), ("\nno", "line 1 is not a line")):
        (tmp_path / "bad.jsonl").write_text(text)
        assert call(*arguments) == 2
        assert message in capsys.readouterr().err


def test_merge_keeps_people_apart_unless_told(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("merge", tmp_path / "apart", faces, faces) == 0
    assert identities(tmp_path / "apart") == {f"{i}/{name}": n for i in (0, 1) for name, n in identities(faces).items()}
    assert "1 of 3 identities have one image only" in capsys.readouterr().err
    assert call("merge", tmp_path / "same", faces, faces, "--same-identities") == 0
    assert identities(tmp_path / "same") == {"Al": 2, "Bo": 4, "Cy": 6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "gone"), "gone: no such file or folder"),
        (("filter", "faces", "out", "--min-images", "9"), "no samples are kept"),
        (("filter", "faces", "out", "--exclude-identities", "gone"), "gone: No such file"),
        (("filter", "faces", "out", "--exclude-identities", "faces"), "faces: Is a directory"),
        (("filter", "faces", "out", "--exclude-identities", "names.txt"), "1 of its names are no identities, as Di"),
        (("filter", "faces", "faces"), "exists and is no index"),
        (("merge", "names.txt", "faces", "faces"), "names.txt"),
        (("merge", "names.txt/out", "faces"), "names.txt"),
    ],
)
def test_mistakes_are_named(
    faces: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(faces.parent)
    Path("names.txt").write_text("Al\nDi\n")
    assert call(*arguments) == 2
    assert message in capsys.readouterr().err
    assert Path("names.txt").read_text() == "Al\nDi\n"
    assert (faces / "Al" / "0.png").exists()
