"""Runs a function on several ranks, each a process of its own."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# What a rank needs is imported once: importing takes seconds, forking milliseconds.
_context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "recognition.trainer"])


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
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def launch_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list[Any]:
    """As `run_ranks`, but as torchrun would: the function finds the launcher's variables and makes the group itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return _collect(_launched, function, world, port, args, timeout)


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = 90, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*args)` on `world` ranks and return what each returned, in rank order.

    `function` is a module-level function; what it returns is pickled (NumPy arrays rather than tensors).
    Raises AssertionError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _collect(_rank, function, world, (backend, str(Path(folder) / "store")), args, timeout)


def _collect(
    target: Callable[..., None], function: Callable[..., Any], world: int, meeting: Any, args: tuple, timeout: float
) -> list[Any]:
    results = _context.Queue()
    processes = [
        _context.Process(target=target, args=(function, rank, world, meeting, results, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        returned: dict[int, Any] = {}
        for _ in range(world):
            rank, value, error = results.get(timeout=timeout)
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            returned[rank] = value
        for process in processes:
            process.join(timeout=timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [returned[rank] for rank in range(world)]
