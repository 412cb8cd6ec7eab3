"""The program `recognition`: its help, what a start costs, completion, and how it ends."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from recognition import __version__, errors
from recognition.cli import program
from recognition.cli.command import Command, _repeated
from recognition.cli.main import door, main, recognition
from recognition.config import recipes
from recognition.planning import run as planning

REPOSITORY = Path(__file__).resolve().parents[3]


def commands(group: click.Group = recognition, *above: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield " ".join([*above, name]), command
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)


COMMANDS = dict(commands())
LEAVES = {name: command for name, command in COMMANDS.items() if isinstance(command, Command)}


def test_all_programs_are_there() -> None:
    wanted = {"train", "faces", "evaluate", "export", "plan", "doctor", "tune", "settings", "recipes", "convert"}
    assert wanted | {"demo", "completion"} <= set(LEAVES)
    assert {f"index {name}" for name in ("build", "show", "filter", "merge")} <= set(LEAVES)
    assert {f"benchmark {name}" for name in ("head", "training", "data")} <= set(LEAVES)


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_into_80_columns(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: {' '.join(['recognition', *name.split()])}")
    assert max(map(len, out.splitlines())) <= 80
    # A list of subcommands is read at a glance: no description is cut off.
    assert "...\n" not in out.partition("Commands:")[2]
    assert name not in LEAVES or re.search(r"\nExamples?:\n  \S", out)


def examples() -> list[tuple[str, str]]:
    found = []
    for name, command in LEAVES.items():
        lines = command.examples.replace("\\\n", " ").splitlines()
        found += [(name, line) for line in lines]
    return found


@pytest.mark.parametrize(("name", "line"), examples())
def test_examples_are_understood(name: str, line: str) -> None:
    command_line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line).partition(" | ")[0].partition(" > ")[0]
    words = shlex.split(command_line)
    words = words[words.index("recognition") + 1 :]
    assert " ".join(words).startswith(name)
    rest = words[len(name.split()) :]
    context = LEAVES[name].make_context(name, rest)
    assert context.params
    if name == "train":
        # Neither an option nor anything else that is not a recipe, a file or a setting.
        first, *overrides = context.params["arguments"]
        assert first == "my.toml" or recipes.find(Path(first)).is_file()
        assert all("=" in override for override in overrides)


def test_the_plan_says_which_links_it_takes() -> None:
    (link,) = (param for param in LEAVES["plan"].params if param.name == "link")
    machine, network = planning.MACHINE_LINK / 1e9, planning.NETWORK_LINK / 1e9
    assert isinstance(link, click.Option) and link.help is not None
    assert f"{machine:g} on up to {planning.GPUS_PER_MACHINE} GPUs, {network:g} on more" in link.help


@pytest.mark.parametrize(
    ("arguments", "status"),
    [("--help", 0), ("benchmark head --help", 0), ("evaluate --nonsense", 2), ("train --help", 0), ("recipes", 0)],
)
def test_a_start_is_quick(arguments: str, status: int) -> None:
    heavy = ["torch", "onnx", "onnxruntime", "timm", "numpy", "PIL"]
    code = (
        f"import sys; from recognition.cli.main import main; status = main({arguments.split()});"
        f"print([name for name in {heavy} if name in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recognition {__version__}\n"


def test_without_arguments_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_every_status_has_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(program.STATUSES) == {0, 1, 2, 75, 130, 141}
    main(["--help"])
    told = capsys.readouterr().out.partition("Exit status:\n")[2]
    assert [int(line.split()[0]) for line in told.splitlines()] == sorted(program.STATUSES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_RECOGNITION_COMPLETE" in capsys.readouterr().out


def test_a_shell_gets_completions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_RECOGNITION_COMPLETE", "bash_complete")
    for words, number, expected in (
        ("recognition ev", 1, "plain,evaluate"),
        ("recognition plan --gp", 2, "plain,--gpus"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(number))
        main([])
        assert expected in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--pairs a b --json", "--pairs a --pairs b --json"),
        ("--pairs a --pairs b c", "--pairs a --pairs b --pairs c"),
        ("--pairs=a b", "--pairs=a --pairs b"),
        ("x --mean -1 2 -3.5 y", "x --mean -1 --mean 2 --mean -3.5 --mean y"),
        ("--pairs a -- b", "--pairs a -- b"),
        ("--pairs", "--pairs"),
        ("--batch 3 4", "--batch 3 4"),
    ],
)
def test_several_values(given: str, expected: str) -> None:
    assert list(_repeated(given.split(), {"--pairs", "--mean"})) == expected.split()


def test_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyboardInterrupt, click.Abort):

        def interrupted(error: type[BaseException] = error, **_: Any) -> None:
            raise error

        monkeypatch.setattr(LEAVES["recipes"], "callback", interrupted)
        assert main(["recipes"]) == program.INTERRUPTED


ENDLESS = """
import sys, click
from recognition.cli.main import main, recognition
def endless(name):
    while True:
        click.echo("x" * 999)
recognition.commands["recipes"].callback = endless
sys.exit(main(["recipes"]))
"""


def test_a_pipe_that_is_closed() -> None:
    shell = '{ "$0" -c "$1"; echo "status $?" >&2; } | head -c 1'
    command = ["sh", "-c", shell, sys.executable, ENDLESS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stderr == f"status {program.CLOSED_PIPE}\n"


def test_doors_have_the_arguments_of_their_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert door("benchmark head")(["--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: recognition benchmark head")


def test_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = REPOSITORY / "configs/demo.toml"
    for name in ("demo", "demo.toml", "configs/demo.toml"):
        assert recipes.find(Path(name)).samefile(shipped)
    for name in ("nonsense", "other/demo.toml", "demo.txt"):
        assert recipes.find(Path(name)) == Path(name)
    # A file of the user's comes before a recipe.
    (tmp_path / "demo.toml").touch()
    assert recipes.find(Path("demo.toml")) == Path("demo.toml")
    assert recipes.names() == sorted(path.stem for path in (REPOSITORY / "configs").glob("*.toml"))
    assert all(recipes.summary(name) for name in recipes.names())


def test_recipes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == (REPOSITORY / "configs/demo.toml").read_text()
    assert main(["recipes", "demos"]) == 2
    assert "there is no recipe demos, but demo, " in capsys.readouterr().err


def test_settings_and_conversions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recognition.config import arcface_torch, reference

    monkeypatch.setattr(reference, "describe", lambda key: f"about {key}\n")
    monkeypatch.setattr(reference, "markdown", lambda: "all\n")
    for arguments, expected in (
        (["settings", "a.b"], "about a.b\n"),
        (["settings"], "all\n"),
        (["train", "--settings"], "all\n"),
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == expected
    given = tmp_path / "a.py"
    given.touch()
    converted = SimpleNamespace(toml="seed = 1\n", notes=["fp16 has no counterpart"])
    monkeypatch.setattr(arcface_torch, "convert_file", lambda path, gpus: converted if gpus == 4 else None)
    assert main(["convert", str(given), "--gpus", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "seed = 1\n" and captured.err == "note: fp16 has no counterpart\n"
    assert main(["convert", str(given), "--gpus", "4", "--output", str(tmp_path / "a.toml")]) == 0
    assert (tmp_path / "a.toml").read_text() == "seed = 1\n"
    assert main(["convert", str(given), "--output", str(given)]) == 2
    assert given.read_text() == ""


def test_extras_have_what_messages_say() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found: set[str] = set()
        for requirement in extras[extra]:
            match = re.match(r"(recognition\[(?P<extra>[\w-]+)\]|(?P<package>[\w-]+))", requirement)
            assert match is not None
            found |= packages(match["extra"]) if match["extra"] else {match["package"]}
        return found

    for extra, named in errors._EXTRAS.items():
        assert set(named) <= packages(extra)
    assert {"torch", "torchvision"}.isdisjoint(packages("evaluate")) and "torchvision" not in packages("export")
    assert "nvidia-dali-cuda130" in packages("train") and "nvidia-dali-cuda120" in packages("train-cuda12")
    assert packages("train") <= packages("all") <= packages("dev")
    told = errors.user_message(ModuleNotFoundError("", name="onnxscript"))
    assert told is not None and "the extra export has it" in told


def test_evaluation_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    command = [sys.executable, "-m", "recognition.cli.main", "evaluate", "--model", "none.onnx", "--pairs", "x.bin"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: none.onnx: no such file"
