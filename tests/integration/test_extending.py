"""The examples of docs/extending.md, carried out to the letter in a copy of the package, with their tests."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import REPOSITORY, blocks, carry_out, commands

DOCUMENT = REPOSITORY / "docs" / "extending.md"
COPIED = ("recognition", "tests", "pyproject.toml")
SUBJECTS = ("loss", "backbone", "container", "protocol")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of its tests' helpers, with all that the document adds."""
    root = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__", "fixtures", "test_*.py")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=ignored)
        else:
            shutil.copy(source, root)
    for block in blocks(DOCUMENT):
        if block.language in ("python", "diff"):
            carry_out(block, root)
    return root


def run(root: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.timeout(300)  # seconds on an idle machine; importing torch takes long on a busy one
def test_the_tests_of_the_document_pass(extended: Path) -> None:
    tests = commands(DOCUMENT, "pytest")
    code = [block for block in blocks(DOCUMENT) if block.language == "python"]
    written = [block.file for block in code if Path(block.file).name.startswith("test_")]
    assert tests == written
    assert len(tests) == len(SUBJECTS)
    done = run(extended, "pytest", "-q", "-rA", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    for test in tests:
        functions = re.findall(r"^def (test_\w+)", (extended / test).read_text(), re.MULTILINE)
        for function in functions:
            assert f"PASSED {test}::{function}" in done.stdout


def test_the_code_of_the_document_is_formatted_and_linted(extended: Path) -> None:
    files = sorted({block.file for block in blocks(DOCUMENT) if block.language in ("python", "diff")})
    for check in (("format", "--check"), ("check",)):
        done = run(extended, "ruff", *check, "--no-cache", *files)
        assert done.returncode == 0, done.stdout + done.stderr
