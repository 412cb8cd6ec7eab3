"""Settings, options and files that the program's texts name: each is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from recognition.cli.main import recognition
from recognition.config import Config, renamed, toml

REPOSITORY = Path(__file__).parents[3]
SOURCES = [
    REPOSITORY / "train.py",
    *sorted(REPOSITORY.glob("recognition/**/*.py")),
    *sorted(REPOSITORY.glob("tools/*.py")),
]

SETTING = re.compile(rf"(?<![\w./-])(?:{'|'.join(Config.model_fields)})(?:\.\w+)+")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PROGRAM = rf"recognition (?P<name>{'|'.join(recognition.commands)})\b"
OF_A_PROGRAM = re.compile(rf"(?P<option>--[a-z][\w-]*) (?:for|of) {PROGRAM}")
COMMAND = re.compile(rf"{PROGRAM}(?P<rest>(?: [^\s`.;,)]+)*)")
SUBCOMMAND = re.compile(r"`recognition ([a-z][\w-]*)")
FILE = re.compile(r"(?<![\w./-])(?:configs|docs|recognition|tests|tools)/[\w/.-]*\w\.\w+")

NO_SETTINGS = {"backbone.pth", "faces.json", "distributed.start"}
"""A file of InsightFace's, a file of ours and a function."""
OF_OTHER_PROGRAMS = {
    *("--standalone", "--nproc_per_node", "--no-python", "--master_port", "--signals-to-handle"),  # torchrun
    *("--ntasks-per-node", "--signal"),  # srun and sbatch
    "--logdir",  # tensorboard
    *("--always", "--dirty"),  # git
}
FILES_OF_OTHERS = {"recognition/arcface_torch/eval/verification.py"}


def texts(source: str) -> Iterator[str]:
    """The strings of a program, docstrings among them; what is put into one stands in it as a NUL character."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def options(command: click.Command) -> set[str]:
    """All options of a program, those of its subcommands too."""
    found = {text for param in command.params for text in (*param.opts, *param.secondary_opts)} | {"--help"}
    commands = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*map(options, commands))


def is_setting(name: str) -> bool:
    *section, key = name.split(".")
    if section == ["backbone", "options"]:  # those of timm's models
        return True
    return any(key in model.model_fields for model in toml.models_at(section, Config))


def wrong_names(text: str, own: set[str], known: dict[str, set[str]]) -> list[str]:
    """What a text names that does not exist; `own` are the options of the program that it is of."""
    wrong = [name for name in SETTING.findall(text) if name not in NO_SETTINGS and not is_setting(name)]
    mine = own.union(OF_OTHER_PROGRAMS, *(known[found["name"]] for found in COMMAND.finditer(text)))
    wrong += [option for option in OPTION.findall(text) if option not in mine]
    for found in OF_A_PROGRAM.finditer(text):
        name, option = found["name"], found["option"]
        wrong += [f"{name}: {option}"] if option not in known[name] else []
    for found in COMMAND.finditer(text):
        name = found["name"]
        wrong += [f"{name}: {option}" for option in OPTION.findall(found["rest"]) if option not in known[name]]
    wrong += [f"recognition {name}" for name in SUBCOMMAND.findall(text) if name not in known]
    wrong += [name for name in FILE.findall(text) if name not in FILES_OF_OTHERS and not (REPOSITORY / name).exists()]
    return wrong


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return {name: options(command) for name, command in recognition.commands.items()}


def test_whatever_a_text_names_is_there(known: dict[str, set[str]]) -> None:
    wrong, settings = [], set()
    for path in SOURCES:
        old = set(renamed.RENAMED) if path == Path(renamed.__file__) else set()
        own = set.union(*known.values(), {"--version"})
        for text in texts(path.read_text(encoding="utf-8")):
            settings |= set(SETTING.findall(text))
            names = wrong_names(text, own, known)
            wrong += [f"{path.relative_to(REPOSITORY)}: {name}" for name in names if name not in old]
    assert not wrong
    assert len(settings) > 40 and "training.more_epochs" in settings  # they are found at all
    # Exceptions that are no longer needed go.
    assert settings >= NO_SETTINGS


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("set data.fitt=crop", "data.fitt"),
        ("set head.optimizer.momentom", "head.optimizer.momentom"),
        ("set optimizer.momentum and head.loss.margin", ""),
        ("say --nonsense", "--nonsense"),
        ("--skip-missing for recognition evaluate", ""),
        ("--skip-missing of recognition export", "export: --skip-missing"),
        ("`recognition index filter A B --same-identities`", ""),
        ("recognition index filter A B --which", "index: --which"),
        ("see docs/nonsense.md", "docs/nonsense.md"),
        ("python tools/nonsense.py", "tools/nonsense.py"),
        ("`recognition nonsense`", "recognition nonsense"),
    ],
)
def test_what_is_not_there_is_found(known: dict[str, set[str]], text: str, wrong: str) -> None:
    assert wrong_names(text, set.union(*known.values()), known) == ([wrong] if wrong else [])
