"""Runs a function on several ranks, each a process of its own."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# What a rank needs is imported once: importing takes seconds, forking milliseconds.
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "recognition.training.trainer"])


def _rank(
    function: Callable[..., Any], rank: int, world: int, meeting: tuple[str, str], results: Any, args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, store = meeting
    try:
        dist.init_process_group(
            backend, store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _launched(function: Callable[..., Any], rank: int, world: int, port: int, results: Any, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # The ranks meet at a store of their launcher's, whose port nobody else can take meanwhile.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


@contextmanager
def launched(function: Callable[..., Any], world: int, *args: Any) -> Iterator["Launch"]:
    """Ranks started as torchrun would: the function finds the launcher's variables and makes the group itself."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _started(_launched, function, world, store.port, args) as launch:
        yield launch


def launch_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list[Any]:
    """As `run_ranks`, but as torchrun would: the function finds the launcher's variables and makes the group itself."""
    with launched(function, world, *args) as launch:
        return launch.collect(timeout)


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 90, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on `world` ranks and return what each returned, in rank order.

    `function` is a module-level function; what it returns is pickled (NumPy arrays rather than tensors).
    Raises AssertionError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = (backend, str(Path(folder) / "store"))
        with _started(_rank, function, world, meeting, args) as launch:
            return launch.collect(timeout)


@dataclass
class Launch:
    """Ranks at work."""

    processes: list[Any]
    results: Any

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


@contextmanager
def _started(
    target: Callable[..., None], function: Callable[..., Any], world: int, meeting: Any, args: tuple
) -> Iterator[Launch]:
    results = _context.Queue()
    processes = [
        _context.Process(target=target, args=(function, rank, world, meeting, results, args), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in processes:
            process.start()
        yield Launch(processes, results)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
