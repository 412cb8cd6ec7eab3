"""What a rank does to have a head measured: it builds it, takes training steps on random embeddings, and looks on."""

import gc
import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.benchmarks.baseline_head import BaselineHead
from recognition.distributed import shard_rows
from recognition.hardware import product_type
from recognition.head.sharded_softmax import ShardedSoftmax
from recognition.planning.head import HeadPlan

_LR = 0.1
_NORM = 20.0
_COSINE = (0.6, 0.1)
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True)
class Rates:
    """What a rank can do while the others do the same."""

    flops: float
    """Floating-point operations per second in matrix products of the head's type, of the shape that suits best."""
    bytes: float
    """Bytes per second between memory and processor, read and written, of a sum over arrays larger than any cache."""


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    forward: float
    backward: float
    """With the update of the rows."""

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.forward + self.backward


class Bench:
    """A head in training on this rank. A process group has to exist; all ranks call together."""

    def __init__(self, plan: HeadPlan, device: torch.device, *, plain: bool = False) -> None:
        self.plan, self.device = plan, device
        self._step = 0
        if plain:
            # torch.optim does so in its first step: memory that is not the head's.
            importlib.import_module("torch._dynamo")
        self._memory = PeakMemory(device)
        self._head = (_Plain if plain else _Fused)(plan, device)

    def take(self, count: int) -> list[Step]:
        """Take so many steps; how long each took on this rank."""
        return [self._take() for _ in range(count)]

    def peak_bytes(self) -> int:
        """The most memory so far, above what there was before the head."""
        return self._memory.peak()

    def state_bytes(self) -> dict[str, int]:
        """Bytes of what lasts from step to step."""
        return self._head.state_bytes()

    def rates(self) -> Rates:
        """What this rank can do. It ends the measurement: the head is gone, to make room."""
        del self._head
        dtype = product_type(self.plan.settings.precision, self.device)
        gathered, size = self.plan.gathered, self.plan.embedding_size
        side = 4096 if self.device.type == "cuda" else 1024
        shapes = (gathered, size, side), (gathered, side, size), (side, size, side), (side, side, side)
        flops = max(self._product_rate(*shape, dtype) for shape in shapes)
        total, term = (torch.ones(1 << 26, device=self.device) for _ in range(2))
        return Rates(flops, 3 * total.nbytes / self._seconds(lambda: torch.add(total, term, out=total)))

    def _product_rate(self, m: int, k: int, n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(*shape, device=self.device).to(dtype) for shape in ((m, k), (k, n)))
        return 2 * m * k * n / self._seconds(lambda: a @ b)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """The median of how long it takes while all ranks do it, after a warm-up."""
        dist.barrier()
        seconds = []
        for _ in range(9):
            start = self._now()
            work()
            seconds.append(self._now() - start)
        return statistics.median(seconds[2:])

    def _take(self) -> Step:
        embeddings, labels = self._batch()
        dist.barrier()
        start = self._now()
        loss = self._head.forward(embeddings, labels, self._step)
        middle = self._now()
        self._head.backward(loss)
        end = self._now()
        if not math.isfinite(loss.item()):
            raise config.UserError(f"the loss is {loss.item()} in step {self._step}: nothing was updated")
        self._step += 1
        return Step(middle - start, end - middle)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _batch(self) -> tuple[Tensor, Tensor]:
        """This rank's embeddings [b, D], as near to their identities as those of a network half trained, and labels."""
        plan, rank = self.plan, dist.get_rank()
        generator = torch.Generator().manual_seed(self._step)
        labels = torch.randint(plan.classes, (plan.batch * plan.ranks,), generator=generator)
        noise = torch.randn(len(labels), plan.embedding_size, generator=generator)
        cosine = torch.empty(len(labels), 1).normal_(*_COSINE, generator=generator).clamp_(0, 0.9)
        shard = shard_rows(plan.classes, plan.ranks, rank)
        own = (labels >= shard.start) & (labels < shard.stop)
        rows = torch.zeros_like(noise)
        rows[own] = self._head.rows(labels[own].to(self.device) - shard.start).cpu()
        rows = rows.to(self.device)
        dist.all_reduce(rows)
        towards = F.normalize(rows.cpu())
        sideways = F.normalize(noise - (noise * towards).sum(1, keepdim=True) * towards)
        embeddings = _NORM * (cosine * towards + (1 - cosine.square()).sqrt() * sideways)
        part = slice(rank * plan.batch, (rank + 1) * plan.batch)
        return embeddings[part].to(self.device).requires_grad_(), labels[part].to(self.device)


class _Fused:
    def __init__(self, plan: HeadPlan, device: torch.device) -> None:
        self._head = ShardedSoftmax(
            plan.settings, plan.classes, plan.embedding_size, seed=0, device=device, optimizer=plan.optimizer
        )
        # Zeros take no memory before they are written, and sampled steps write only some of them.
        for moment in self._head.rows.moments.values():
            moment.zero_()

    def rows(self, positions: Tensor) -> Tensor:
        return self._head.rows.read(positions * (len(self._head.rows) // max(1, len(self._head.shard))))

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> Tensor:
        return self._head(embeddings, labels, lr=_LR, step=step).loss

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def state_bytes(self) -> dict[str, int]:
        rows = self._head.rows
        moments = sum(tensor.nbytes for tensor in rows.moments.values())
        return {"rows": sum(tensor.nbytes for tensor in rows.tensors().values()) - moments, "moments": moments}


class _Plain:
    def __init__(self, plan: HeadPlan, device: torch.device) -> None:
        self._head = BaselineHead(
            plan.classes,
            plan.embedding_size,
            seed=0,
            device=device,
            sample_rate=plan.settings.sample_rate,
            optimizer=plan.optimizer,
        )

    def rows(self, positions: Tensor) -> Tensor:
        return self._head.weight.detach()[positions]

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> Tensor:
        return self._head(embeddings, labels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._head.update(_LR)

    def state_bytes(self) -> dict[str, int]:
        state = self._head.state()
        rows = state.pop("weight").nbytes
        return {"rows": rows, "moments": sum(tensor.nbytes for tensor in state.values())}


class PeakMemory:
    """The most memory since this was made, above what there was then.

    On a CPU, the process's resident memory, as Linux keeps its maximum, or where that may not be reset, as a thread
    samples it. On a GPU, what torch has allocated there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._baseline = torch.cuda.memory_allocated(device)
            return
        self._sampled: list[int] | None = None
        try:
            # Linux forgets the maximum (proc_pid_clear_refs(5)).
            _CLEAR.write_text("5")
        except OSError:
            self._sampled = [0]
            threading.Thread(target=_sample, args=(self._sampled,), daemon=True).start()
        self._baseline = _field(_STATUS, "VmRSS")

    def peak(self) -> int:
        """In bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._baseline
        max_logit = _field(_STATUS, "VmHWM") if self._sampled is None else max(*self._sampled, _field(_STATUS, "VmRSS"))
        return max_logit - self._baseline


def available_memory() -> int:
    """Bytes of the machine's memory that can be had without swapping."""
    return _field(Path("/proc/meminfo"), "MemAvailable")


def _field(path: Path, name: str) -> int:
    """Bytes of a line of such a file, which says kB."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise config.UserError(f"memory is measured as Linux tells it: {error}") from None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _sample(max_logit: list[int]) -> None:
    while True:
        max_logit[0] = max(max_logit[0], _field(_STATUS, "VmRSS"))
        time.sleep(_SAMPLE_SECONDS)
