"""Whichever rank fails first: its reason is the one for the user, on every rank, once."""

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from recognition import config, distributed
from recognition.distributed import failures
from recognition.errors import UserError
from recognition.training import trainer
from tests.support.faults import fault, raising
from tests.support.ranks import launch_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
REASON = "sample 20 (p003/002.jpg): No such file or directory"


def outcome(error: BaseException) -> tuple[str, str, list[str]]:
    return type(error).__name__, str(error), getattr(error, "__notes__", [])


def fail(how: str, rank: int) -> Any:
    """What `rank` does ends in an error, while the other waits for it; returns this rank's error."""
    failures.PATIENCE_SECONDS = 2.0
    try:
        # One rank may fail while the other still joins the group.
        ranks = distributed.start(config.Distributed(backend="gloo", init_timeout_seconds=20), threads=1)
        with failures.shared(ranks.store, ranks.rank, ranks.world):
            if ranks.rank == rank and how == "mistake":
                raise UserError(REASON)
            if ranks.rank == rank and how == "defect":
                raise KeyError("state")
            if ranks.rank == rank and how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "both":
                raise UserError(f"{REASON} on rank {ranks.rank}")
            dist.all_reduce(torch.zeros(1))
    except Exception as error:
        assert not dist.is_initialized()
        return outcome(error), getattr(error, "status", None)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_learns_the_reason(rank: int) -> None:
    told = launch_ranks(fail, 2, "mistake", rank)
    (kind, message, notes), _ = told[rank]
    assert (kind, message) == ("UserError", REASON)
    assert notes and notes[0].startswith(f"(rank {rank} of 2, on ")
    (kind, message, notes), status = told[1 - rank]
    assert (kind, status, notes) == ("FailedElsewhere", 2, [])
    assert message.startswith(f"{REASON}\n(rank {rank} of 2, on ")


def test_a_defect_stays_one() -> None:
    told = launch_ranks(fail, 2, "defect", 1)
    assert told[1][0][0] == "KeyError"
    assert told[0][0][:2] == ("FailedElsewhere", told[0][0][1])
    assert "KeyError: 'state'" in told[0][0][1] and told[0][1] == 1


def test_of_two_that_fail_at_once_one_tells() -> None:
    told = launch_ranks(fail, 2, "both", 1)
    assert sorted(kind for (kind, _, _), _ in told) == ["FailedElsewhere", "UserError"]
    (first,) = [message for (kind, message, _), _ in told if kind == "UserError"]
    (second,) = [message for (kind, message, _), _ in told if kind == "FailedElsewhere"]
    assert second.startswith(first + "\n")


def in_slurm(rank: int, job: str, function: Any, arguments: tuple[Any, ...], answers: Any) -> None:
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    os.environ |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NODELIST": "node7", "SLURM_TASKS_PER_NODE": "2"}
    answers.put((rank, function(*arguments)))


def srun(function: Any, *arguments: Any, answering: int = 2) -> dict[int, Any]:
    """Call the function in two processes that know each other by SLURM's variables alone."""
    context = multiprocessing.get_context("forkserver")
    answers, job = context.Queue(), str(secrets.randbelow(10**6))
    processes = [context.Process(target=in_slurm, args=(rank, job, function, arguments, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return dict(answers.get(timeout=60) for _ in range(answering))
    finally:
        for process in processes:
            process.kill()
            process.join()


def meet() -> tuple[int, int, int, int, float]:
    ranks = distributed.start(config.Distributed(backend="gloo"), threads=1)
    total = torch.tensor(float(ranks.rank + 1))
    dist.all_reduce(total)
    distributed.stop()
    return ranks.rank, ranks.world, ranks.local_rank, ranks.local_world, float(total)


def test_ranks_that_srun_starts_meet() -> None:
    assert srun(meet) == {0: (0, 2, 0, 2, 3.0), 1: (1, 2, 1, 2, 3.0)}


def test_a_reason_outlives_the_rank_that_keeps_the_store() -> None:
    told = srun(fail, "mistake", 0)
    assert told[0][0][:2] == ("UserError", REASON)
    assert told[1][0][1].startswith(REASON)


def test_a_rank_that_is_killed_leaves_a_sentence() -> None:
    (kind, message, _), _ = srun(fail, "killed", 1, answering=1)[0]
    assert kind == "_ConnectionLost"
    assert "the connection to another rank is lost" in message and "for want of memory" in message


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for person in range(4):
        (folder / str(person)).mkdir()
        for image in range(4):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(person) / f"{image}.png")
    return folder


def train(where: str, settings: list[str]) -> Any:
    """Train; fails on rank 1 as the run is prepared or in its second step."""
    lost = raising(UserError(REASON))
    if where == "preparation" and os.environ["RANK"] == "1":
        module: Any = trainer
        module.open_index = lambda *_, **__: lost()
    try:
        with fault("step", lost, step=1, rank=1) if where == "step" else contextlib.nullcontext():
            return trainer.train(config.load(REPOSITORY / "tests/integration/tiny.toml", settings))
    except Exception as error:
        return outcome(error)


@pytest.mark.parametrize("where", ["preparation", "step"])
def test_a_run_that_fails_on_one_rank(where: str, faces: Path, tmp_path: Path) -> None:
    settings = [f"data.path={faces}", f"run.folder={tmp_path / 'run'}", "backbone.name=resnet10t", "data.threads=1"]
    settings += ["backbone.image_size=32", "backbone.embedding_size=32", "backbone.precision=float32"]
    settings += ["training.global_batch=8", "training.threads=1", "data.loader=torchvision", "export.enabled=false"]
    first, second = launch_ranks(train, 2, where, settings)
    assert second[:2] == ("UserError", REASON)
    assert first[0] == "FailedElsewhere" and first[1].startswith(REASON)


SCRIPT = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from recognition import config, distributed
from recognition.cli import program
from recognition.distributed import failures
def main():
    ranks = distributed.start(config.Distributed(backend="gloo"), 1)
    with failures.shared(ranks.store, ranks.rank, ranks.world):
        if ranks.rank == 1:
            raise config.UserError({REASON!r})
        distributed.any_rank(True)
sys.exit(program.run(main))
"""


def test_under_torchrun_the_reason_stands_last(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "program.py")], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.returncode != 0
    before, found, report = done.stderr.partition("Root Cause")
    assert found
    assert before.count(f"error: {REASON}\n") == 1
    assert "Traceback" not in before.partition("torch/distributed/elastic")[0]
    *_, reason, rank, line = report.strip().splitlines()
    assert reason.endswith(f": error: {REASON}")
    assert "(rank 1 of 2, on " in rank and set(line) == {"="}
