"""SGD and AdamW on some of a rank's rows; those that are not named are not read either."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from recognition import config
from recognition.head.class_weights import fused_update
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.lazy import History
from recognition.head.class_weights.shard import Part, RowFormat, WeightShard, moment_type, put, store, take

_UPDATE, _CATCH_UP, _FLUSH = range(3)


class RowOptimizer(ABC):
    """Changes some rows by their gradient. One of these belongs to one `WeightShard`, whose `moments` it made."""

    names: tuple[str, ...]
    """Of the moments that every number of a row has; those of the bias are called the same after `bias_`."""
    counter: str | None = None
    """Name of the whole number that every row has."""
    kernels: bool = False
    """Whether Triton's kernel updates the rows: `makers` knows where it can."""

    def __init__(self, weight_decay: float, betas: tuple[float, float], eps: float, seed: int) -> None:
        self.weight_decay, self.betas, self.eps, self.seed = weight_decay, betas, eps, seed

    def moments(
        self, rows: int, embedding_size: int, *, bias: bool, device: torch.device, state: RowFormat = "float32"
    ) -> dict[str, Tensor]:
        """What is kept of `rows` rows at the start, zeros, by name: for `WeightShard.moments`."""
        made = {}
        for name in self.names:
            made[name] = torch.zeros(rows, embedding_size, device=device, dtype=moment_type(state))
            if bias:
                made[f"bias_{name}"] = torch.zeros(rows, device=device)
        if self.counter is not None:
            made[self.counter] = torch.zeros(rows, device=device, dtype=torch.int32)
        return made

    def begin(self, rows: WeightShard, step: int, lr: float, skip: Tensor) -> None:  # noqa: B027
        """Say once for every step, before its first `update`, what it is; all rows have to know, also the others."""

    def catch_up(self, rows: WeightShard, part: Part, step: int) -> None:  # noqa: B027
        """Bring rows that sat steps out to where those leave them, before anything reads them in `step`."""

    def flush(self, rows: WeightShard) -> None:  # noqa: B027
        """Catch up with all rows, so that they and their moments are the whole state: before it is read or loaded."""

    def update(
        self,
        rows: WeightShard,
        part: Part,
        gradient: RowGradient | Tensor,
        lr: float,
        skip: Tensor,
        step: int,
        bias_gradient: Tensor | None = None,
    ) -> None:
        """Update `part` of `rows` in place by `gradient`, or a dense one [n, D] and `bias_gradient` [n], float32.

        `skip`: float32 scalar on the rows' device; where it is 1, nothing changes, and on a GPU the host need not know.
        `step` keys what is random in it.
        """
        if _skipped(skip):
            return
        flag = None if _host_knows(skip) else skip.bool()
        if isinstance(gradient, RowGradient):
            bias_gradient = gradient.bias
        before = None if self.counter is None else take(rows.moments[self.counter], part)
        count = None if before is None else self._counted(before)
        if self.kernels:
            self._launch(rows, part, gradient, lr, count, skip, step)
        else:
            self._move(rows, part, gradient, lr, count, flag, step)
        if rows.bias is not None and bias_gradient is not None:
            columns = [each[:, None] for each in (rows.bias, *(rows.moments[f"bias_{name}"] for name in self.names))]
            tensors = [take(each, part) for each in columns]
            tensors = self._changed(tensors, bias_gradient[:, None], lr, 0.0, count, flag)
            for storage, tensor in zip(columns, tensors, strict=True):
                put(storage, part, tensor)
        if self.counter is not None and before is not None and count is not None:
            put(rows.moments[self.counter], part, count if flag is None else torch.where(flag, before, count))

    def _move(
        self,
        rows: WeightShard,
        part: Part,
        gradient: RowGradient | Tensor,
        lr: float,
        count: Tensor | None,
        flag: Tensor | None,
        step: int,
    ) -> None:
        """Update the rows and their moments, without bias and counter."""
        noise = rows.noise(part, self.seed, step, _UPDATE)
        stored = [rows.moments[name] for name in self.names]
        read = gradient.weight if isinstance(gradient, RowGradient) else None
        tensors = [rows.read(part) if read is None else read, *(take(each, part).float() for each in stored)]
        values, *moments = self._changed(tensors, gradient, lr, self.weight_decay, count, flag)
        rows.write(part, values, noise, flag)
        for stream, (storage, moment) in enumerate(zip(stored, moments, strict=True), start=1):
            store(storage, part, moment, noise, stream)

    def _launch(
        self,
        rows: WeightShard,
        part: Part,
        gradient: RowGradient | Tensor,
        lr: float,
        count: Tensor | None,
        skip: Tensor,
        step: int,
    ) -> None:
        """The same by the kernel."""
        radial, remove_radial = None, False
        if isinstance(gradient, RowGradient):
            radial, remove_radial = gradient.radial, gradient.inverse_norm is not None
            gradient = gradient.product()
        fused_update.update(
            rows,
            part,
            gradient,
            radial,
            remove_radial,
            [rows.moments[name] for name in self.names],
            count,
            skip,
            lr=lr,
            decay=self.weight_decay,
            betas=self.betas,
            eps=self.eps,
            seed=self.seed,
            step=step,
            purpose=_UPDATE,
        )

    def _changed(
        self,
        tensors: list[Tensor],
        gradient: RowGradient | Tensor,
        lr: float,
        decay: float,
        count: Tensor | None,
        flag: Tensor | None,
    ) -> list[Tensor]:
        """The values and moments `tensors` [n, ...], float32, after the step: the same tensors, or new ones."""
        if flag is None:
            self._step(tensors, gradient, lr, decay, count)
            return tensors
        changed = [tensor.clone() for tensor in tensors]
        self._step(changed, gradient, lr, decay, count)
        return [torch.where(flag, old, new) for old, new in zip(tensors, changed, strict=True)]

    @abstractmethod
    def _step(
        self, tensors: list[Tensor], gradient: RowGradient | Tensor, lr: float, decay: float, count: Tensor | None
    ) -> None:
        """The optimizer's formula on values and moments, in place."""

    def _counted(self, before: Tensor) -> Tensor:
        """The counter [n] after an update."""
        return before + 1


class RowSGD(RowOptimizer):
    """SGD with momentum, as `torch.optim.SGD`. The bias does not decay.

    With `lazy`, rows that take no part in a step move and decay as they do under `torch.optim.SGD` with a gradient of
    zero, when they are next caught up with; `last` counts the steps of the history that a row has seen.
    """

    names = ("momentum",)

    def __init__(self, momentum: float, weight_decay: float, seed: int, *, lazy: bool = False) -> None:
        super().__init__(weight_decay, (momentum, 0.0), 0.0, seed)
        self.momentum = momentum
        self.counter = "last" if lazy else None
        self._history: History | None = None
        self._latest = 0

    def begin(self, rows: WeightShard, step: int, lr: float, skip: Tensor) -> None:
        """As in `RowOptimizer`; when the history is full, all rows are caught up with, every 1024th step."""
        if self.counter is None or _skipped(skip):
            return
        if self._history is None:
            self._history = History(self.momentum, self.weight_decay, rows.weight.device)
        self._latest = step
        if self._history.count == self._history.window:
            self.flush(rows)
        self._history.add(lr, skip.bool())

    def catch_up(self, rows: WeightShard, part: Part, step: int) -> None:
        """As in `RowOptimizer`."""
        for block in _blocks(rows, part):
            self._catch_up(rows, block, step, _CATCH_UP)

    def flush(self, rows: WeightShard) -> None:
        """As in `RowOptimizer`."""
        if self._history is None or self._history.count == 0:
            return
        for block in _blocks(rows, slice(None)):
            self._catch_up(rows, block, self._latest, _FLUSH)
        rows.moments["last"].zero_()
        self._history.clear()

    def _catch_up(self, rows: WeightShard, part: Part, step: int, purpose: int) -> None:
        history = self._history
        if history is None or history.count == 0:
            return
        if _host_knows(rows.weight):
            behind = take(rows.moments["last"], part) < history.count
            if not behind.all():
                part = rows.positions(part)[behind]
            if not behind.any():
                return
        last = rows.moments["last"]
        noise = rows.noise(part, self.seed, step, purpose)
        of_rows, of_bias = history.since(take(last, part))
        values, momentum = _moved(of_rows, rows.read(part), take(rows.moments["momentum"], part).float())
        rows.write(part, values, noise)
        store(rows.moments["momentum"], part, momentum, noise, 1)
        if rows.bias is not None:
            columns = rows.bias[:, None], rows.moments["bias_momentum"][:, None]
            for storage, tensor in zip(columns, _moved(of_bias, *(take(each, part) for each in columns)), strict=True):
                put(storage, part, tensor)
        put(last, part, torch.full_like(take(last, part), history.count))

    def _step(
        self, tensors: list[Tensor], gradient: RowGradient | Tensor, lr: float, decay: float, count: Tensor | None
    ) -> None:
        values, momentum = tensors
        if isinstance(gradient, RowGradient):
            gradient.add_to(momentum, values, self.momentum, decay)
        else:
            momentum.mul_(self.momentum).add_(gradient)
            if decay:
                momentum.add_(values, alpha=decay)
        values.add_(momentum, alpha=-lr)

    def _counted(self, before: Tensor) -> Tensor:
        known = 0 if self._history is None else self._history.count
        if _host_knows(before) and (before != known - 1).any():
            raise RuntimeError("rows are to be updated in a step that did not begin, or were not caught up with before")
        return torch.full_like(before, known)


class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as `torch.optim.AdamW`. The bias does not decay.

    `updates` counts the updates of each row by itself; the moments' bias is corrected by it.
    """

    names = ("exp_avg", "exp_avg_sq")
    counter = "updates"

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
        super().__init__(weight_decay, betas, eps, seed)

    def _step(
        self, tensors: list[Tensor], gradient: RowGradient | Tensor, lr: float, decay: float, count: Tensor | None
    ) -> None:
        values, mean, square = tensors
        assert count is not None
        if isinstance(gradient, RowGradient):
            gradient = gradient.dense(values)
        mean.lerp_(gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        # In float64: at first 1 - beta ** count is far smaller than what it is the difference of.
        mean_known, square_known = (1 - beta ** count.double()[:, None] for beta in self.betas)
        rate = lr * square_known.sqrt() / mean_known
        direction = square.sqrt().add_((self.eps * square_known.sqrt()).float())
        torch.div(mean, direction, out=direction)
        if decay:
            values.mul_(1 - lr * decay)
        values.addcmul_(direction, -rate.float())


def build_row_optimizer(
    settings: config.SGD | config.AdamW, untouched: Literal["sparse", "lazy"] = "sparse", *, seed: int
) -> RowOptimizer:
    """The row optimizer that `settings` describe; `untouched`: what happens to rows that take no part in a step.

    Raises UserError where AdamW is to be `lazy`.
    """
    if isinstance(settings, config.SGD):
        return RowSGD(settings.momentum, settings.weight_decay, seed, lazy=untouched == "lazy")
    if untouched == "lazy":
        raise config.UserError("head.inactive_rows is lazy, which SGD alone can catch up with")
    return RowAdamW(settings.betas, settings.eps, settings.weight_decay, seed)


def _host_knows(tensor: Tensor) -> bool:
    """Whether the host can look at it without waiting."""
    return not tensor.is_cuda


def _skipped(skip: Tensor) -> bool:
    """Whether the step changes nothing, as far as the host knows."""
    return _host_knows(skip) and bool(skip.item())


def _blocks(rows: WeightShard, part: Part) -> Iterator[Part]:
    """`part` in pieces that are small beside the rows, and large beside the cost of a launch on a GPU."""
    size = 16384 if rows.weight.is_cuda else 512
    if isinstance(part, Tensor):
        yield from part.split(size)
        return
    start, stop, _ = part.indices(len(rows))
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _moved(matrix: Tensor, values: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` [2, 2, n, 1] times (values, momentum) [n, ...]; the momentum in place."""
    moved = (values * matrix[0, 0]).addcmul_(momentum, matrix[0, 1])
    return moved, momentum.mul_(matrix[1, 1]).addcmul_(values, matrix[1, 0])
