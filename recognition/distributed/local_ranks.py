"""Ranks on this machine that a program starts itself: processes, each with an object, which wait to be told what to do.

So several such groups can be measured in turns, under the same load of the machine, each with a memory of its own.
"""

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection as pipes
from typing import Any

import torch

from recognition import config, distributed

_TIMEOUT_SECONDS = 3600
_PATIENCE_SECONDS = 2.0
"""How long the other ranks' answers are waited for once one has failed."""


class OutOfMemory(config.UserError):
    """A GPU's memory has run out."""


class Processes:
    """One process per rank, each with what `make` returned there, which do what they are told."""

    def __init__(
        self, ranks: int, make: Callable[[torch.device], Any], *, device: str, threads: int, less: str, preload: str
    ) -> None:
        # Imports take seconds, so they are made once, and forked: by a process that has used neither threads nor a GPU.
        if "forkserver" not in multiprocessing.get_all_start_methods():
            raise config.UserError("processes are started here as Windows cannot: use Linux, macOS, or WSL on Windows")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload])
        self._less = less
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._connections: list[Any] = []
        self._processes = []
        for rank in range(ranks):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            here, there = context.Pipe()
            arguments = (there, environment, make, device, threads, less)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Have every rank's object do it; what each returned, in rank order.

        Raises UserError where a rank did or its process is gone, OutOfMemory for a GPU's memory, RuntimeError with
        the traceback of any other error.
        """
        for connection in self._connections:
            # Why a process is gone is found out below.
            with contextlib.suppress(BrokenPipeError):
                connection.send((name, arguments))
        answers: dict[int, Any] = {}
        failures: list[Exception] = []
        while len(answers) < len(self._connections):
            waiting = [each for rank, each in enumerate(self._connections) if rank not in answers]
            ready = pipes.wait(waiting, timeout=_PATIENCE_SECONDS if failures else None)
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    answers[rank] = self._answer(rank)
                except (config.UserError, RuntimeError) as error:
                    answers[rank] = None
                    failures.append(error)
            if failures and not ready:
                break
        if failures:
            # A rank whose peer is gone fails too; the reason is with the one that was stopped by something else.
            raise min(failures, key=_rank_of_reason)
        return [answers[rank] for rank in range(len(self._connections))]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=2)
            process.kill()
            process.join()

    def _answer(self, rank: int) -> Any:
        try:
            kind, value = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join()
            status = self._processes[rank].exitcode
            hint = f"; the memory may have run out: try {self._less}" if status == -9 else ""
            raise config.UserError(f"the process of rank {rank} ended with status {status}{hint}") from None
        if kind == "memory":
            raise OutOfMemory(value)
        if kind == "mistake":
            raise config.UserError(value)
        if kind == "failure":
            raise RuntimeError(f"rank {rank} failed:\n{value}")
        return value


def _rank_of_reason(error: Exception) -> int:
    return 0 if isinstance(error, OutOfMemory) else 1 if isinstance(error, config.UserError) else 2


@contextlib.contextmanager
def processes(
    ranks: int, make: Callable[[torch.device], Any], *, device: str, threads: int, less: str, preload: str
) -> Iterator[Processes]:
    """Start `ranks` processes with a process group, on `device` ("cpu" or "cuda"), and end them on exit.

    `make`: called on each rank with its device; it has to be picklable. `threads`: of torch in each on a CPU, 0 shares
    the cores out. `less`: what to try where the memory has run out. `preload`: the module that has what ranks import.
    """
    group = Processes(ranks, make, device=device, threads=threads, less=less, preload=preload)
    try:
        yield group
    finally:
        group.close()


def _serve(
    connection: Any,
    environment: dict[str, str],
    make: Callable[[torch.device], Any],
    device: str,
    threads: int,
    less: str,
) -> None:
    """What a rank's process does: make its object, then answer one call after the other."""
    os.environ |= environment
    backend = "nccl" if device == "cuda" else "gloo"
    settings = config.Distributed.model_validate({"backend": backend, "init_timeout_seconds": _TIMEOUT_SECONDS})
    try:
        made = make(distributed.start(settings, threads).device)
        while True:
            name, arguments = connection.recv()
            connection.send(("result", getattr(made, name)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        distributed.stop()
    except torch.OutOfMemoryError as error:
        connection.send(("memory", f"the GPU's memory has run out: try {less}\n{error}"))
    except config.UserError as error:
        connection.send(("mistake", str(error)))
    except Exception:
        connection.send(("failure", traceback.format_exc()))
