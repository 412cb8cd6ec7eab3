"""Faults as data: what happens, at which point of a run, in which step, on which rank; each has to happen."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch

from recognition.runs import faults


@contextlib.contextmanager
def fault(
    point: str, action: faults.Action, *, step: int | None = None, rank: int | None = None, times: int | None = None
) -> Iterator[None]:
    """Call `action` where this process reaches `point`; fails on leaving if that never was so.

    `step`: after so many updates only. `rank`: on this rank only, -1 for the last one. `times`: at most so often.
    """
    world, own = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if rank is not None and own not in (rank, rank + world):
        yield
        return
    reached: list[int] = []
    happened: list[int] = []

    def act(**values: Any) -> None:
        reached.append(values["step"])
        if step in (None, values["step"]) and (times is None or len(happened) < times):
            happened.append(values["step"])
            action(**values)

    with faults.inject(point, act):
        yield
    assert happened, f"the fault at {point!r} never happened: it was reached after {reached} updates"


@contextlib.contextmanager
def forbidden(point: str) -> Iterator[None]:
    """Fail where this process reaches `point`."""
    with faults.inject(point, raising(AssertionError(f"reached {point!r}"))):
        yield


def raising(error: BaseException) -> faults.Action:
    """Return an action that raises `error`."""

    def act(**_: Any) -> None:
        raise error

    return act


def kill(**_: Any) -> None:
    """End this process as SIGKILL does, with no chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt(*, trainer: Any, **_: Any) -> None:
    """Ask the run to stop, as a signal would."""
    trainer.interrupt.requested = True


def spoil(*, batch: Any, **_: Any) -> None:
    """Make all images of a batch NaN."""
    batch.images[:] = torch.nan
