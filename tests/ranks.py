"""Runs a function on several ranks, each a process of its own, joined by gloo through a file."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.tensor"])


def _rank(function: Callable[..., Any], rank: int, world: int, store: str, results: Any, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        results.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 90) -> list[Any]:
    """Call `function(*args)` on `world` ranks and return what each returned, in rank order.

    `function` is a module-level function; what it returns is pickled (NumPy arrays rather than tensors).
    Raises AssertionError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _context.Queue()
        store = str(Path(folder) / "store")
        processes = [
            _context.Process(target=_rank, args=(function, rank, world, store, results, args), daemon=True)
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
