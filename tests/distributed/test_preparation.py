"""Ranks that wait for others: as long as those are seen to work."""

import os
import signal
import time
from typing import Any

import pytest

from recognition import distributed
from recognition.config import Distributed
from recognition.distributed.coordinator import Coordinator
from recognition.errors import FailedElsewhere, UserError
from recognition.tracking import progress
from tests.support.ranks import launch_ranks, launched

SILENCE = 1.0


def coordinator() -> Coordinator:
    return Coordinator(distributed.start(Distributed(backend="gloo", init_timeout_seconds=60), threads=1), SILENCE)


def compute(seconds: float) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))
    return "computed"


def wait_with_advances(seconds: float) -> str:
    """Work that other processes do."""
    with progress.task("rendering") as advance:
        for done in range(int(seconds / 0.2)):
            time.sleep(0.2)
            advance(done)
    return "waited"


def rank() -> dict[str, Any]:
    group = coordinator()
    me = group.ranks.rank
    order: list[float] = []
    found: dict[str, Any] = {}

    def note() -> int:
        order.append(time.monotonic())
        return me

    found["machines"] = group.local_first("a", note), order[0]
    found["shared"] = group.local_first("b", note, shared=True)
    found["long"] = group.on_each("c", None if me else lambda: compute(2.2 * SILENCE))
    found["waiting"] = group.on_each("d", None if me else lambda: wait_with_advances(2.2 * SILENCE))

    def fail() -> None:
        raise ValueError("a reason")

    try:
        group.on_main("e", fail)
    except (ValueError, FailedElsewhere) as error:
        found["failure"] = type(error).__name__
    return found


def test_ranks_wait_for_one_that_works_however_long_it_takes() -> None:
    first, second = launch_ranks(rank, 2)
    assert (first["machines"][0], second["machines"][0]) == (0, 1)
    assert first["machines"][1] < second["machines"][1], "a machine's first rank comes first"
    assert (first["shared"], second["shared"]) == (0, 1)
    assert (first["long"], second["long"]) == ("computed", None)
    assert (first["waiting"], second["waiting"]) == ("waited", None)
    assert (first["failure"], second["failure"]) == ("ValueError", "FailedElsewhere")


def silent(dies: bool) -> str:
    group = coordinator()

    def hang() -> None:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    try:
        group.on_main("indexing", hang)
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("dies", "said"),
    [(False, "indexing: rank 0 has shown no sign of work for 1 seconds"), (True, "the process of rank 0 has ended")],
)
def test_ranks_do_not_wait_for_one_that_is_silent_or_gone(dies: bool, said: str) -> None:
    with launched(silent, 2, dies) as launch:
        number, text, error = launch.results.get(timeout=60)
    assert (number, error) == (1, None)
    assert said in text
