"""Ranks on this machine that a program starts itself, as torchrun would.

`start_ranks` starts one process per rank. `processes` starts ranks that each hold an object, whose methods
the caller calls, so that several such groups can be measured in turns, each with a memory of its own.
"""

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection as pipes
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from recognition import config, distributed

_TIMEOUT_SECONDS = 3600
_PATIENCE_SECONDS = 2.0
"""Seconds to wait for the other ranks' answers once one has failed."""


class OutOfMemory(config.UserError):
    """The memory of a GPU does not suffice."""


@contextlib.contextmanager
def start_ranks(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], *, preload: Sequence[str], patience: float = 0.0
) -> Iterator[list[BaseProcess]]:
    """Run `target(*arguments[rank])` in a process per rank, which has torchrun's variables; end them on exit.

    `preload`: modules that all ranks import, which happens once for the first call of this process. `patience`: seconds
    in which they may end by themselves on exit, before they are killed. Raises UserError on Windows.
    """
    # Imports take seconds, so a fork server, which has used neither threads nor a GPU, makes them once for all ranks.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise config.UserError("processes are started here as Windows cannot: use Linux, macOS, or WSL on Windows")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    # The ranks meet at a store of this process, so nobody else can take its port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    started: list[BaseProcess] = []
    try:
        for rank, given in enumerate(arguments):
            environment = _torchrun_variables(rank, len(arguments), store.port)
            process = context.Process(target=_run, args=(environment, target, given), daemon=True)
            process.start()
            started.append(process)
        yield started
    finally:
        for each in started:
            if patience:
                each.join(timeout=patience)
            each.kill()
            each.join()


def _torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun gives a rank; the ranks' store is in this process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run(environment: dict[str, str], target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    target(*arguments)


class Processes:
    """One process per rank, each with the object that `make` returned there; `call` calls a method of all of them."""

    def __init__(self, processes: list[BaseProcess], connections: list[Any], less: str) -> None:
        self._processes, self._connections, self._less = processes, connections, less

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Call the method `name` of every rank's object; returns the results in rank order.

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
    the cores out. `less`: advice in the message when memory runs out. `preload`: a module whose imports
    the ranks need.
    """
    with contextlib.ExitStack() as stack:
        ends = [multiprocessing.Pipe() for _ in range(ranks)]
        arguments = [(there, make, device, threads, less) for _, there in ends]
        started = stack.enter_context(start_ranks(_serve, arguments, preload=[preload], patience=2.0))
        for here, there in ends:
            there.close()
            stack.callback(here.close)  # which ends the rank
        yield Processes(started, [here for here, _ in ends], less)


def _serve(connection: Any, make: Callable[[torch.device], Any], device: str, threads: int, less: str) -> None:
    """Make a rank's object, then answer one call after the other."""
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
