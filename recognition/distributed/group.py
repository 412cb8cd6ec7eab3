"""The process group: starting and stopping it, splitting work and rows, collectives, and signals as a flag.

One process is a group of one, so nothing else needs to ask whether it runs alone; the functions that exchange Python
objects and flags work even before `start`. Where a `group` may be given, None means all ranks. Every collective here
has to be called by all ranks of its group.
"""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from recognition import config as configuration
from recognition import hardware
from recognition.distributed import failures
from recognition.distributed.launcher import LaunchInfo, read_launcher

logger = logging.getLogger(__name__)
T = TypeVar("T")

_LARGEST_KEPT = 31 << 20
"""Largest block, in bytes, that glibc can be told to keep after it is freed; see `_keep_freed_memory`."""


@dataclass(frozen=True)
class ProcessInfo:
    """The place of this process among all ranks."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    """The device of the images and the backbone."""
    store: Store | None = field(default=None, compare=False, repr=False)
    """The store at which the ranks met; None for a rank that is alone."""

    @property
    def head_device(self) -> torch.device:
        """The device of the head and of everything that ranks exchange: `device`, but the CPU beside an Apple GPU, for
        which there are no collectives."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0


def start(config: configuration.Distributed, threads: int = 0) -> ProcessInfo:
    """Start the process group that torchrun, srun, mpirun or Kubeflow describes, or a group of one without them.

    `threads`: CPU threads of torch; 0 shares the cores out evenly over the local processes.
    Collectives are bounded by `config.init_timeout_seconds` until `set_timeout` is called. On GPUs, tensors of the
    CPU go through gloo and those of the GPU through NCCL.
    Raises UserError when the launcher's variables are incomplete or contradict each other, NCCL is asked for without
    enough GPUs, or the ranks do not find each other.
    """
    found = read_launcher()
    if found is not None:
        os.environ |= found.variables()
        if found.note and found.local_rank == 0:
            logger.warning("rank %d of %d %s", found.rank, found.world, found.note)
    place = found or LaunchInfo(rank=0, world=1, local_rank=0, local_world=1, address="", port=0)
    rank, world, local_rank, local_world = place.rank, place.world, place.local_rank, place.local_world
    device = _device(config.backend, local_rank, local_world, alone=world == 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.init_timeout_seconds)
    store = None if found is None else _rendezvous(found, timeout)
    with failures.shared(store, rank, world):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            rank=rank,
            world_size=world,
            # A group of one needs neither an address nor a port: its store is a table in memory.
            store=dist.HashStore() if store is None else store,  # type: ignore[attr-defined]
            device_id=device if device.type == "cuda" else None,
        )
    torch.set_num_threads(hardware.threads(threads, local_world))
    _keep_freed_memory()
    return ProcessInfo(rank, world, local_rank, local_world, device, store)


def _rendezvous(place: LaunchInfo, timeout: timedelta) -> Store:
    """Return the store at which the ranks meet. Raises UserError where they do not."""
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world, timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where, said = f"{place.address}:{place.port}", str(error)
        if "EADDRINUSE" in said:
            raise configuration.UserError(
                f"port {place.port} of {place.address} is taken, by another run perhaps: start torchrun with "
                "--standalone, which finds a free port, or set MASTER_PORT (torchrun --master_port) to another"
            ) from None
        raise configuration.UserError(
            f"rank {place.rank} of {place.world} has not met the others at {where} within {timeout.total_seconds():g} s"
            f" (distributed.init_timeout_seconds): {said.strip().splitlines()[0]}\nAll {place.world} processes have to "
            f"be started, and {where} has to be reachable from each machine"
        ) from None
    store.set_timeout(timeout)
    return store


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: float, group: dist.ProcessGroup | None = None) -> None:
    """Bound every later collective by `seconds`, so that a rank that hangs stops the others in that time."""
    # Older releases of torch have the same function under its second name only.
    set_group_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_group_timeout(timedelta(seconds=seconds), group)


def missing_ranks(ranks: ProcessInfo, seconds: float = 2.0) -> list[int]:
    """Return the ranks that do not call this within `seconds` of this rank: those that hang, after a timeout."""
    if ranks.store is None:
        return []
    with contextlib.suppress(RuntimeError):  # the store may be gone with its rank
        ranks.store.set(f"present/{ranks.rank}", "")
        time.sleep(seconds)
        return [rank for rank in range(ranks.world) if not ranks.store.check([f"present/{rank}"])]
    return []


def split(total: int, parts: int) -> list[int]:
    """Return sizes that add up to `total`, as even as possible, the larger ones first: how a batch is split."""
    size, larger = divmod(total, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def shard_rows(rows: int, world: int, rank: int) -> range:
    """Return the rows of a `DTensor` placed `Shard(0)` that are on `rank`.

    The rule of `torch.chunk`: ceil(rows / world) each; the last ranks may have fewer or none.
    """
    size = -(-rows // world)
    return range(min(rank * size, rows), min((rank + 1) * size, rows))


def any_rank(flag: bool) -> bool:
    """Return, on all ranks, whether `flag` is true on any of them. Costs one tiny all-reduce on the CPU."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag), dtype=torch.int32)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def broadcast_object(value: T) -> T:
    """Return rank 0's `value` on all ranks. It travels pickled."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return every rank's `value`, in rank order, on all ranks. They travel pickled."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(x: Tensor, sizes: Sequence[int] | None = None, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order: `x` [b, ...] to [B, ...]. Not differentiable.

    `sizes`: b of every rank, B in all; None when they are equal.
    """
    world = dist.get_world_size(group)
    sizes = _checked(sizes or [len(x)] * world, world)
    largest = max(sizes)
    gathered = x.new_empty(world * largest, *x.shape[1:])
    if gathered.numel():
        dist.all_gather_into_tensor(gathered, _padded(x.detach(), largest), group=group)
    if min(sizes) == largest:
        return gathered
    return torch.cat([block[:size] for block, size in zip(gathered.split(largest), sizes, strict=True)])


def reduce_scatter_rows(
    x: Tensor, sizes: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum `x` [B, ...] over the ranks and return this rank's rows [b, ...]. Not differentiable.

    `sizes`: b of every rank, which add up to B; None when they are equal.
    """
    return start_reduce_scatter_rows(x, sizes, group)()


def start_reduce_scatter_rows(
    x: Tensor, sizes: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
) -> Callable[[], Tensor]:
    """Start a `reduce_scatter_rows`; returns a function that waits for it and returns the rows.

    On a GPU the stream waits, and not the host.
    """
    world = dist.get_world_size(group)
    sizes = _checked(sizes or split(len(x), world), world)
    if sum(sizes) != len(x):
        raise ValueError(f"sizes {sizes} add up to {sum(sizes)}, but there are {len(x)} rows")
    largest = max(sizes)
    x = x.detach()
    if min(sizes) != largest:
        x = torch.cat([_padded(block, largest) for block in x.split(sizes)])
    own = x.new_empty(largest, *x.shape[1:])
    work = dist.reduce_scatter_tensor(own, x.contiguous(), group=group, async_op=True) if own.numel() else None

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return own[: sizes[dist.get_rank(group)]]

    return finish


ECHO_SECONDS = 3.0
"""Seconds in which a second SIGINT is taken for an echo of the first."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Interrupt:
    """A context in which signals set `requested` instead of ending the process: SIGINT, SIGTERM, SIGHUP (the terminal
    was closed) and SIGUSR1 (a scheduler's warning that time is up). A later SIGINT ends it. A SIGHUP that is ignored,
    as under nohup, stays so.

    A SIGINT that follows the first within `ECHO_SECONDS` is its echo: a terminal's Ctrl-C reaches a rank directly and
    once more through the launcher.

    To be entered in the main thread (ValueError elsewhere); the previous handlers come back on exit. The flag is this
    process's alone: `any_rank` on it before acting, because a signal may reach one rank only.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_sigint = math.inf
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has the first two
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            now = time.monotonic()
            self._first_sigint = min(self._first_sigint, now)
            if now - self._first_sigint > ECHO_SECONDS:
                signal.default_int_handler(number, frame)


def _device(backend: str, local_rank: int, local_world: int, *, alone: bool) -> torch.device:
    """Return the device of a process; `alone`: it is the only one of the run."""
    if backend == "auto" and alone and torch.backends.mps.is_available():
        return torch.device("mps")
    gpus = torch.cuda.device_count()
    if gpus and backend != "gloo" and os.environ.get("SLURM_GPUS_PER_TASK"):
        # SLURM shows each of its tasks the GPUs of that task alone.
        return torch.device("cuda", 0)
    if backend == "nccl" and gpus < local_world:
        raise configuration.UserError(
            f"distributed.backend is nccl, which needs a GPU per process: {local_world} processes here, {gpus} GPUs; "
            "start fewer processes, or set distributed.backend to auto"
        )
    if backend == "gloo" or gpus < local_world:
        if backend == "auto" and gpus:
            logger.warning("%d processes share %d GPUs: running on the CPU", local_world, gpus)
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def _keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees: page faults on new memory took a fifth of a head's step on a CPU.

    glibc gives memory back by thresholds that grow with the largest block that is freed, up to 32 MiB (mallopt(3)).
    """
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


def _checked(sizes: Sequence[int], world: int) -> list[int]:
    if len(sizes) != world:
        raise ValueError(f"{len(sizes)} sizes for {world} ranks")
    return list(sizes)


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    padded = x.new_zeros(rows, *x.shape[1:])
    padded[: len(x)] = x
    return padded
