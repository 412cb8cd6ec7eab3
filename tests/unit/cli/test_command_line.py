"""What stands on the command line, and paths in settings."""

import logging
from pathlib import Path

import pytest

from recognition.config import Config, ConfigError, command_line, load

DEFAULT = Path("default.toml")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\npath = "{tmp_path}"\n')
    return path


def loaded(path: Path, *overrides: str) -> Config:
    return load(path, overrides, check_paths=False)


@pytest.mark.parametrize(
    ("arguments", "path", "overrides"),
    [
        ([], DEFAULT, []),
        (["a.toml", "run.seed=1"], Path("a.toml"), ["run.seed=1"]),
        (["run.seed=1"], DEFAULT, ["run.seed=1"]),
        # A folder may be named after its settings.
        (["runs/lr=0.1/config.toml"], Path("runs/lr=0.1/config.toml"), []),
        ([" run.seed = 1"], DEFAULT, [" run.seed = 1"]),
        (["run.folder=a=b"], DEFAULT, ["run.folder=a=b"]),
    ],
)
def test_a_file_and_overrides(arguments: list[str], path: Path, overrides: list[str]) -> None:
    assert command_line(arguments, DEFAULT) == (path, overrides)


def test_every_argument_that_is_neither_is_told() -> None:
    with pytest.raises(ConfigError) as caught:
        command_line(["a.toml", "--run.seed", "3", "b.toml", "-v"], DEFAULT)
    told = str(caught.value)
    for line in ("--run.seed: write run.seed=3,", "3: not section.key=value", "b.toml: not", "-v: no option"):
        assert f"\n  {line}" in told


def test_what_is_said_to_be_written_works() -> None:
    with pytest.raises(ConfigError, match=r"write training\.global_batch=64,") as caught:
        command_line(["--training.global-batch=64"], DEFAULT)
    advice = str(caught.value).partition("write ")[2].partition(",")[0]
    assert command_line([advice], DEFAULT) == (DEFAULT, ["training.global_batch=64"])


def test_a_key_that_is_given_twice_is_said(caplog: pytest.LogCaptureFixture, settings: Path) -> None:
    with caplog.at_level(logging.WARNING):
        path, overrides = command_line([str(settings), "run.seed=1", "run.seed =2"], DEFAULT)
    assert "given more than once, the last holds: run.seed" in caplog.text
    assert loaded(path, *overrides).run.seed == 2


@pytest.mark.parametrize(
    ("override", "folder"),
    [
        ("run.folder=~/runs/x", "HOME/runs/x"),
        ("run.folder='~/runs/x'", "HOME/runs/x"),
        ("run.folder = runs/x ", "runs/x"),
        ("run.folder=$HOME/x", "$HOME/x"),
        # Names that are numbers, dates or comments to TOML.
        ("run.folder=2024", "2024"),
        ("run.folder=1e3", "1e3"),
        ("run.folder=2024-01-01", "2024-01-01"),
        ("run.folder=3#4", "3#4"),
        ("run.folder=true", "true"),
        ("run.folder=x~", "x~"),
        ("run.folder=José", "José"),
    ],
)
def test_a_path(settings: Path, override: str, folder: str) -> None:
    expected = folder.replace("HOME", str(settings.parent / "home")) if folder.startswith("HOME") else folder
    assert loaded(settings, override).run.folder == Path(expected)


def test_home_in_every_path(settings: Path) -> None:
    found = loaded(
        settings, "data.path=~/a", "data.index_folder=~/b", "backbone.weights=~/c", 'evaluation.pairs=["~/d"]'
    )
    home = settings.parent / "home"
    assert (found.data.path, found.data.index_folder) == (home / "a", home / "b")
    assert (found.backbone.weights, found.evaluation.pairs) == (home / "c", (home / "d",))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.folder=a\nb", r"cannot hold the character '\\n'"),
        ("run.folder=a\0b", r"cannot hold the character '\\x00'"),
        ('data.path="C:\\faces"', "single quotes"),
        ("data.path=  ", "data.path: an empty path"),
        ("run.folder=\udce9", "not text in UTF-8"),
        ("training.epochs=1\nrun.seed=2", "training.epochs: input should be a valid number"),
        ("training.epochs=3#4", "training.epochs: input should be a valid number"),
    ],
)
def test_values_that_are_refused(settings: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(settings, override)


def test_faces_may_be_rendered_into_the_home_folder(settings: Path) -> None:
    rendered = [
        "data.path=~/faces",
        "faces.identities=4",
        "faces.images_per_identity=2",
        "evaluation.pairs=~/faces/pairs.bin",
    ]
    assert load(settings, rendered).data.path == settings.parent / "home/faces"


@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_as_windows_writes_them(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(f'{mark}[data]{end}path = "faces"{end}'.encode())
    assert loaded(path).data.path == Path("faces")
