"""Training that is killed at random moments, and goes on: `make soak SOAK=kills` (ROUNDS=20 SEED=0).

In each round two ranks train, and one of them or both get SIGKILL: some time after the start, or in the midst of saving
a checkpoint. The same command goes on until the run is complete; its losses and all of its last checkpoint are those of
a run that nobody disturbed, bit for bit, in float32.
"""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recognition import config
from recognition.data.procedural.dataset import write_faces
from recognition.runs.checkpoint import Checkpoints, read_tensors, step_folders
from recognition.training import trainer
from tests.support.faults import fault, kill
from tests.support.ranks import launch_ranks, launched

TINY = Path(__file__).resolve().parents[1] / "integration" / "tiny.toml"
ROUNDS, SEED = int(os.environ.get("ROUNDS", "20")), int(os.environ.get("SEED", "0"))
STEPS, SAVED_EVERY, WORLD = 12, 2, 2
SETTINGS = (
    "run.seed=3",
    "backbone.name=resnet10t",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float32",
    "backbone.dropout=0.2",
    "head.loss.name=curricularface",
    "head.sample_rate=0.5",
    "head.chunk=5",
    "training.global_batch=24",
    f"training.epochs={STEPS * 24 / 60}",
    "data.augment={shift = 0.05, brightness = 0.2}",
    "data.threads=1",
    f"checkpoint.every_steps={SAVED_EVERY}",
    "tracking.every_steps=1",
    "export.enabled=false",
)
_TOO_LATE = "complete before"
POINTS = ("checkpoint shards", "checkpoint hashes", *(f"checkpoint {word}" for word in ("manifest", "name", "latest")))


def run(overrides: list[str], dying: tuple[int, int, str] | None = None) -> bool:
    """Train. `dying`: the rank that kills itself, in which save of its own, at which point of it."""
    if dying is None:
        return trainer.train(config.load(TINY, overrides))
    rank, save, point = dying
    saves: list[int] = []

    def kill_in_that_save(*, step: int, **_: Any) -> None:
        saves.append(step)
        if len(saves) >= save:
            kill()

    with fault(point, kill_in_that_save, rank=rank):
        return trainer.train(config.load(TINY, overrides))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in lines if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = Checkpoints(folder / "checkpoints", 2).find()
    assert found is not None and found == step_folders(folder / "checkpoints")[0]
    return {name: tensor.numpy() for name, tensor in read_tensors(found).items()}


def killed(overrides: list[str], chance: random.Random, seconds: float) -> str:
    """Start the run and let it die; says how it died, or that it was complete before."""
    everyone, in_a_save = chance.random() < 0.5, chance.random() < 0.5
    victim, moment = chance.randrange(WORLD), chance.uniform(0, seconds)
    # Rank 0 alone writes the manifest.
    point = chance.choice(POINTS[: None if victim == 0 else 2])
    dying = (victim, chance.randint(1, 3), point) if in_a_save else None
    with launched(run, WORLD, overrides, dying) as launch:

        def died() -> bool:
            return any(process.exitcode is not None for process in launch.processes)

        until = time.monotonic() + (10 * seconds if in_a_save else moment)
        while time.monotonic() < until and not died():
            time.sleep(0.01)
        if any(process.exitcode == 0 for process in launch.processes):
            return _TOO_LATE
        assert died() or not in_a_save, "the save never came"
        if not in_a_save:
            launch.processes[victim].kill()
        if everyone:
            for process in launch.processes:
                process.kill()
        # A rank whose peer is gone ends by itself, and not in any endless wait.
        for process in launch.processes:
            process.join(60)
            assert process.exitcode is not None, "a rank waits for one that is dead"
        return f"{'all' if everyone else 'one'} of the ranks, {f'at {point}' if in_a_save else 'at any moment'}"


@pytest.mark.timeout(0)
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faces = tmp_path / "faces"
    write_faces(faces, identities=15, images_per_identity=4, pairs=20, seed=1)

    def overrides(name: str) -> list[str]:
        return [*SETTINGS, f"data.path={faces}", f"run.folder={tmp_path / name}"]

    launch_ranks(run, WORLD, overrides("index"), timeout=600)  # what is built once is there
    start = time.monotonic()
    launch_ranks(run, WORLD, overrides("whole"), timeout=600)
    seconds = time.monotonic() - start
    expected_losses, expected = losses(tmp_path / "whole"), tensors(tmp_path / "whole")
    chance, deaths = random.Random(SEED), Counter[str]()
    for number in range(ROUNDS):
        again = overrides(f"{number}")
        for _ in range(chance.randint(1, 3)):
            deaths[killed(again, chance, seconds)] += 1
        assert all(launch_ranks(run, WORLD, again, timeout=600))
        assert losses(tmp_path / f"{number}") == expected_losses, f"round {number} of seed {SEED}"
        found = tensors(tmp_path / f"{number}")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=f"{name}, round {number} of seed {SEED}")
    told = "".join(f"\n  {count:3} {death}" for death, count in sorted(deaths.items()) if death != _TOO_LATE)
    total = deaths.total() - deaths[_TOO_LATE]
    with capsys.disabled():
        print(f"\nkills: {ROUNDS} rounds (seed {SEED}), {total} deaths, every run as the undisturbed{told}")
