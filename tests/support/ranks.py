"""Runs a function on several ranks, each a process of its own."""

import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from recognition.distributed.local_ranks import start_ranks

# What a rank needs is imported once: importing takes seconds, forking milliseconds.
_PRELOAD = ("torch._dynamo", "torch.distributed.tensor", "recognition.training.trainer")


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 90, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on `world` ranks with a process group and return what each returned, in rank order.

    `function` is a module-level function; what it returns is pickled (NumPy arrays rather than tensors).
    Raises AssertionError with the traceback of the first rank that failed.
    """
    return launch_ranks(_with_group, world, backend, function, args, timeout=timeout)


def launch_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list[Any]:
    """As `run_ranks`, but as torchrun would: the function finds the launcher's variables and makes the group itself."""
    with launched(function, world, *args) as launch:
        return launch.collect(timeout)


@contextmanager
def launched(function: Callable[..., Any], world: int, *args: Any) -> Iterator["Launch"]:
    """Start the ranks of `launch_ranks`, to be watched while they work."""
    results = multiprocessing.get_context("forkserver").Queue()
    arguments = [(function, rank, results, args) for rank in range(world)]
    with start_ranks(_answer, arguments, preload=_PRELOAD) as processes:
        yield Launch(processes, results)


@dataclass
class Launch:
    """Ranks at work."""

    processes: list[Any]
    results: Any
    """A queue of (rank, what it returned, traceback of its error)."""

    def collect(self, timeout: float) -> list[Any]:
        """What each rank returns, in rank order, once all are done."""
        returned: dict[int, Any] = {}
        world = len(self.processes)
        for _ in range(world):
            rank, value, error = self.results.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            returned[rank] = value
        for process in self.processes:
            process.join(timeout=timeout)
        return [returned[rank] for rank in range(world)]


def _answer(function: Callable[..., Any], rank: int, results: Any, args: tuple[Any, ...]) -> None:
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _with_group(backend: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    return result
