"""Settings, options and files that the program's texts name: each is there."""

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recognition.config import Config, renamed, toml

REPOSITORY = Path(__file__).parents[3]
SOURCES = [
    REPOSITORY / "train.py",
    *sorted(REPOSITORY.glob("recognition/**/*.py")),
    *sorted(REPOSITORY.glob("tools/*.py")),
]
TOOLS = sorted(path.stem for path in REPOSITORY.glob("tools/*.py"))

SETTING = re.compile(rf"(?<![\w./-])(?:{'|'.join(Config.model_fields)})(?:\.\w+)+")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OF_A_TOOL = re.compile(r"(--[a-z][\w-]*) (?:for|of) tools/(\w+)\.py")
COMMAND = re.compile(r"tools/(\w+)\.py((?: [^\s`.;,)]+)*)")
FILE = re.compile(r"(?<![\w./-])(?:configs|docs|recognition|tests|tools)/[\w/.-]*\w\.\w+")

NO_SETTINGS = {"backbone.pth", "faces.json", "distributed.start", "tracking.progress"}
"""A file of InsightFace's, a file of ours, a function and a module."""
OF_OTHER_PROGRAMS = {
    *("--standalone", "--nproc_per_node", "--master_port", "--signals-to-handle"),  # torchrun
    *("--ntasks-per-node", "--signal"),  # srun and sbatch
    "--logdir",  # tensorboard
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


def parsers() -> dict[str, argparse.ArgumentParser]:
    """What reads each tool's command line."""
    found: dict[str, argparse.ArgumentParser] = {}

    def keep(parser: argparse.ArgumentParser, *_: Any) -> None:
        found[name] = parser
        raise SystemExit

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", keep)
        for name in TOOLS:
            specification = importlib.util.spec_from_file_location(f"named_{name}", REPOSITORY / f"tools/{name}.py")
            assert specification is not None and specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            patched.setitem(sys.modules, specification.name, module)
            specification.loader.exec_module(module)
            with pytest.raises(SystemExit):
                module.main([])
    return found


def options(parser: argparse.ArgumentParser) -> set[str]:
    """All options of a command line, those of its commands too."""
    found = {text for action in parser._actions for text in action.option_strings}
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found.union(*(options(each) for action in commands for each in action.choices.values()))


def is_setting(name: str) -> bool:
    *section, key = name.split(".")
    if section == ["backbone", "options"]:  # those of timm's models
        return True
    return any(key in model.model_fields for model in toml.models_at(section, Config))


def wrong_names(text: str, own: set[str], known: dict[str, set[str]]) -> list[str]:
    """What a text names that does not exist; `own` are the options of the program that it is of."""
    everywhere = set.union(*known.values())
    wrong = [name for name in SETTING.findall(text) if name not in NO_SETTINGS and not is_setting(name)]
    mine = own.union(OF_OTHER_PROGRAMS, *(known.get(tool, ()) for tool, _ in COMMAND.findall(text)))
    wrong += [option for option in OPTION.findall(text) if option not in mine]
    wrong += [f"{tool}: {option}" for option, tool in OF_A_TOOL.findall(text) if option not in known.get(tool, ())]
    for tool, rest in COMMAND.findall(text):
        wrong += [f"{tool}: {option}" for option in OPTION.findall(rest) if option not in known.get(tool, everywhere)]
    wrong += [name for name in FILE.findall(text) if name not in FILES_OF_OTHERS and not (REPOSITORY / name).exists()]
    return wrong


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return {name: options(parser) for name, parser in parsers().items()}


def test_whatever_a_text_names_is_there(known: dict[str, set[str]]) -> None:
    wrong, settings = [], set()
    for path in SOURCES:
        old = set(renamed.RENAMED) if path == Path(renamed.__file__) else set()
        own = known[path.stem] if path.parent.name == "tools" else set.union(*known.values())
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
        ("--skip-missing for tools/evaluate.py", ""),
        ("--skip-missing of tools/export.py", "export: --skip-missing"),
        ("`python tools/index.py filter A B --same-identities`", ""),
        ("python tools/index.py filter A B --which", "index: --which"),
        ("see docs/nonsense.md", "docs/nonsense.md"),
        ("python tools/nonsense.py", "tools/nonsense.py"),
    ],
)
def test_what_is_not_there_is_found(known: dict[str, set[str]], text: str, wrong: str) -> None:
    assert wrong_names(text, set.union(*known.values()), known) == ([wrong] if wrong else [])
