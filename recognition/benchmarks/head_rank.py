"""One rank's part in the measurement of a head: build it, run training steps on random embeddings, and time them."""

import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recognition import config
from recognition.benchmarks.baseline_head import BaselineHead
from recognition.benchmarks.memory import PeakMemory
from recognition.distributed import shard_rows
from recognition.hardware import product_type
from recognition.head.sharded_softmax import ShardedSoftmax
from recognition.planning.head import HeadPlan

_LR = 0.1
_NORM = 20.0
"""Length of the embeddings."""
_COSINE = (0.6, 0.1)
"""Mean and standard deviation of the cosine between an embedding and its class, as in the middle of a training."""
_BASELINE_LIBRARY = "torch._dynamo"
"""Imported by the first step of `torch.optim`: memory that is not the baseline head's."""


@dataclass(frozen=True)
class Rates:
    """Speed of a rank while all ranks work."""

    flops: float
    """Floating-point operations per second of matrix products of the head's type, at the fastest of several shapes."""
    bytes: float
    """Bytes per second read and written between memory and processor, in a sum of arrays larger than any cache."""


@dataclass(frozen=True)
class Step:
    """Seconds that a training step took."""

    forward: float
    backward: float
    """Includes the update of the rows."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.forward + self.backward


class RankBenchmark:
    """A head, or the baseline head, in training on this rank. A process group has to exist; all ranks call together."""

    def __init__(self, plan: HeadPlan, device: torch.device, *, baseline: bool = False) -> None:
        self.plan, self.device = plan, device
        self._step = 0
        if baseline:
            importlib.import_module(_BASELINE_LIBRARY)
        self._memory = PeakMemory(device)
        self._head = (_Baseline if baseline else _Head)(plan, device)

    def run_steps(self, count: int) -> list[Step]:
        """Run `count` training steps and return how long each took on this rank.

        Raises UserError where a loss is not finite.
        """
        return [self._run_step() for _ in range(count)]

    def peak_bytes(self) -> int:
        """Return the peak memory so far, in bytes, above what was in use before the head."""
        return self._memory.peak()

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes that persist from step to step: of `rows` with their norms, and of `moments`."""
        return self._head.state_bytes()

    def rates(self) -> Rates:
        """Measure the speed of this rank. No steps can follow: the head is dropped to make room."""
        del self._head
        dtype = product_type(self.plan.settings.precision, self.device)
        batch, size = self.plan.global_batch, self.plan.embedding_size
        side = 4096 if self.device.type == "cuda" else 1024
        shapes = (batch, size, side), (batch, side, size), (side, size, side), (side, side, side)
        flops = max(self._product_rate(*shape, dtype) for shape in shapes)
        total, term = (torch.ones(1 << 26, device=self.device) for _ in range(2))
        return Rates(flops, 3 * total.nbytes / self._seconds(lambda: torch.add(total, term, out=total)))

    def _product_rate(self, m: int, k: int, n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(*shape, device=self.device).to(dtype) for shape in ((m, k), (k, n)))
        return 2 * m * k * n / self._seconds(lambda: a @ b)

    def _seconds(self, work: Callable[[], Any]) -> float:
        """Return the median time of `work` while all ranks do it, after a warm-up."""
        dist.barrier()
        seconds = []
        for _ in range(9):
            start = self._now()
            work()
            seconds.append(self._now() - start)
        return statistics.median(seconds[2:])

    def _run_step(self) -> Step:
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
        """Draw this rank's labels, and embeddings [b, D] with cosines as in the middle of a training."""
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


class _Head:
    """The package's own head."""

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


class _Baseline:
    """The baseline head."""

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
