"""Trainings of another commit and of this working tree, bit for bit: `make soak SOAK=golden` (GOLDEN_BASE=HEAD~1).

Each trains the runs of its own `tests/integration/test_golden_curve.py`, so settings may have other names in the two;
they have to mean the same. The losses of every step are equal, and every tensor of the last checkpoint. Two minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recognition.runs.checkpoint import read_tensors, step_folders

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = Path("tests/integration/test_golden_curve.py")
BASE = os.environ.get("GOLDEN_BASE", "HEAD~1")

# Today's names of tensors that are called otherwise at the base: prefixes of whole names, or whole names.
TODAY: dict[str, str] = {}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def train(tree: Path, folder: Path) -> None:
    """Train the recipes of the source in `tree`, by its own code."""
    # Before the tests were a package, their helpers were found beside them.
    places = os.pathsep.join((str(tree), str(tree / "tests")))
    command = [sys.executable, str(tree / RECIPES), "--train", str(folder)]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def today(name: str) -> str:
    """What the base's tensor `name` is called today."""
    for before, after in TODAY.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(step_folders(run / "checkpoints")[0])


@pytest.mark.timeout(0)
def test_this_tree_trains_as_the_base_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit, tree = git("rev-parse", BASE), tmp_path / "base"
    git("worktree", "add", "--quiet", "--detach", str(tree), commit)
    try:
        assert (tree / RECIPES).is_file(), f"{BASE} has no {RECIPES}: give a later commit in GOLDEN_BASE"
        train(tree, tmp_path / "before")
        train(REPOSITORY, tmp_path / "now")
    finally:
        git("worktree", "remove", "--force", str(tree))
    before, now = (json.loads((tmp_path / each / "curves.json").read_text()) for each in ("before", "now"))
    assert before.keys() == now.keys() and before
    for name, curve in before.items():
        assert now[name] == curve, name
    runs = sorted(path.name for path in (tmp_path / "before").glob("run-*"))
    assert len(runs) == len(before)
    count = 0
    for run in runs:
        expected = {today(name): tensor for name, tensor in tensors(tmp_path / "before" / run).items()}
        found = tensors(tmp_path / "now" / run)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            ours, theirs = (each.contiguous().reshape(-1).view(torch.uint8).numpy() for each in (found[name], tensor))
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{run}: {name}")
            count += 1
    with capsys.disabled():
        print(f"\ngolden: {len(runs)} runs, {count} tensors, every number as {commit[:7]} has it")
