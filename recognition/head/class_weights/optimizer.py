"""SGD and AdamW for some of a rank's rows at a time; rows that are not selected are not even read.

Of a row w with gradient g, one step at learning rate lr and weight decay d is

    SGD      v = momentum v + g + d w
             w = w - lr v

    AdamW    m = beta1 m + (1 - beta1) g,   s = beta2 s + (1 - beta2) g^2
             w = (1 - lr d) w - lr (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps)

element by element, as in `torch.optim`; t counts the updates of this row alone. Biases have moments of their own and do
not decay. Inactive rows, which take part in no gradient of a step, stay as they are, except with `LazyRowSGD`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from recognition import config
from recognition.head.class_weights import fused_update
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.lazy import History
from recognition.head.class_weights.shard import (
    RowFormat,
    RowSelection,
    WeightShard,
    assign_rounded,
    assign_rows,
    moment_type,
    select_rows,
)
from recognition.head.class_weights.step import RowStep
from recognition.head.class_weights.stochastic_rounding import RoundingKey

_UPDATE, _CATCH_UP, _FLUSH = range(3)


class RowOptimizer(ABC):
    """Optimizer of the rows of one `WeightShard`, whose `moments` it created.

    In each step, callers call `catch_up` for rows that they are about to read, `begin` once, and `update` for each
    selection of active rows; and `flush` before they read, save or load all rows.
    """

    names: tuple[str, ...]
    """Names of the moments [r, D]; those of the bias, [r], have the prefix `bias_`."""
    counter: str | None = None
    """Name of the rows' int32 counter [r], if they have one."""
    kernels: bool = False
    """Whether the Triton kernel updates the rows; the head sets it by its backend."""

    def __init__(self, weight_decay: float, betas: tuple[float, float], eps: float, seed: int) -> None:
        self.weight_decay, self.betas, self.eps, self.seed = weight_decay, betas, eps, seed

    def moments(
        self, rows: int, embedding_size: int, *, bias: bool, device: torch.device, row_format: RowFormat = "float32"
    ) -> dict[str, Tensor]:
        """Return the moments and the counter of `rows` rows, all zero, by name, for `WeightShard.moments`."""
        made = {}
        for name in self.names:
            made[name] = torch.zeros(rows, embedding_size, device=device, dtype=moment_type(row_format))
            if bias:
                made[f"bias_{name}"] = torch.zeros(rows, device=device)
        if self.counter is not None:
            made[self.counter] = torch.zeros(rows, device=device, dtype=torch.int32)
        return made

    def begin(self, rows: WeightShard, step: int, lr: float, skip: Tensor) -> None:
        """Announce a step before its first `update`. Does nothing where inactive rows stay as they are."""
        return

    def catch_up(self, rows: WeightShard, part: RowSelection, step: int) -> None:
        """Apply to some rows the steps they were inactive in, before `step` reads them. Does nothing by default."""
        return

    def flush(self, rows: WeightShard) -> None:
        """Apply to all rows the steps they were inactive in, so that the tensors are the whole state.

        Does nothing by default.
        """
        return

    def update(
        self,
        rows: WeightShard,
        part: RowSelection,
        gradient: RowGradient | Tensor,
        lr: float,
        skip: Tensor,
        step: int,
        bias_gradient: Tensor | None = None,
    ) -> None:
        """Update `part` of the rows in place by their gradient, in factors or as [n, D] with `bias_gradient` [n].

        `skip`: float32 scalar on the rows' device; where it is 1, nothing changes, and the host does not wait for a
        GPU to learn it. `step` keys the random rounding. Raises RuntimeError for lazy rows in a step that did not
        begin, or that were not caught up.
        """
        if _skipped(skip):
            return
        flag = None if _host_knows(skip) else skip.bool()
        if isinstance(gradient, RowGradient):
            bias_gradient = gradient.bias
        before = None if self.counter is None else select_rows(rows.moments[self.counter], part)
        counts = None if before is None else self._count(before)
        key = RoundingKey(self.seed, step, _UPDATE)
        row_step = RowStep(lr, self.weight_decay, self.betas, self.eps, key, skip, flag, counts)
        if self.kernels:
            fused_update.update(rows, part, gradient, [rows.moments[name] for name in self.names], row_step)
        else:
            self._update_rows(rows, part, gradient, row_step)
        if rows.bias is not None and bias_gradient is not None:
            self._update_bias(rows, rows.bias, part, bias_gradient, row_step)
        if self.counter is not None and before is not None and counts is not None:
            counts = counts if flag is None else torch.where(flag, before, counts)
            assign_rows(rows.moments[self.counter], part, counts)

    def _update_rows(
        self, rows: WeightShard, part: RowSelection, gradient: RowGradient | Tensor, step: RowStep
    ) -> None:
        """Update rows and moments in PyTorch, as `fused_update.update` does by the kernel."""
        noise = rows.noise(part, step.rounding)
        stored = [rows.moments[name] for name in self.names]
        read = gradient.weight if isinstance(gradient, RowGradient) else None
        tensors = [rows.read(part) if read is None else read, *(select_rows(each, part).float() for each in stored)]
        values, *moments = self._after_step(tensors, gradient, step)
        rows.write(part, values, noise, step.skip_flag)
        for stream, (storage, moment) in enumerate(zip(stored, moments, strict=True), start=1):
            assign_rounded(storage, part, moment, noise, stream)

    def _update_bias(
        self, rows: WeightShard, bias: Tensor, part: RowSelection, gradient: Tensor, step: RowStep
    ) -> None:
        """Update biases and their moments, [n, 1] each, without decay."""
        columns = [each[:, None] for each in (bias, *(rows.moments[f"bias_{name}"] for name in self.names))]
        tensors = [select_rows(each, part) for each in columns]
        tensors = self._after_step(tensors, gradient[:, None], replace(step, weight_decay=0.0))
        for storage, tensor in zip(columns, tensors, strict=True):
            assign_rows(storage, part, tensor)

    def _after_step(self, tensors: list[Tensor], gradient: RowGradient | Tensor, step: RowStep) -> list[Tensor]:
        """Return values and moments after a step from those before, `tensors` [n, ...] float32, which may change."""
        if step.skip_flag is None:
            self._step(tensors, gradient, step)
            return tensors
        changed = [tensor.clone() for tensor in tensors]
        self._step(changed, gradient, step)
        return [torch.where(step.skip_flag, old, new) for old, new in zip(tensors, changed, strict=True)]

    @abstractmethod
    def _step(self, tensors: list[Tensor], gradient: RowGradient | Tensor, step: RowStep) -> None:
        """Apply the equations of the optimizer to values and moments [n, ...], float32, in place."""

    def _count(self, before: Tensor) -> Tensor:
        """Return the counter [n] after an update."""
        return before + 1


class RowSGD(RowOptimizer):
    """SGD with momentum, as `torch.optim.SGD` for rows that are always active."""

    names = ("momentum",)

    def __init__(self, momentum: float, weight_decay: float, seed: int) -> None:
        super().__init__(weight_decay, (momentum, 0.0), 0.0, seed)

    def _step(self, tensors: list[Tensor], gradient: RowGradient | Tensor, step: RowStep) -> None:
        values, velocity = tensors
        momentum, _ = step.betas
        # v = momentum v + g + d w
        if isinstance(gradient, RowGradient):
            gradient.add_to(velocity, values, momentum, step.weight_decay)
        else:
            velocity.mul_(momentum).add_(gradient)
            if step.weight_decay:
                velocity.add_(values, alpha=step.weight_decay)
        # w = w - lr v
        values.add_(velocity, alpha=-step.lr)


class LazyRowSGD(RowSGD):
    """SGD whose inactive rows move and decay as under `torch.optim.SGD` with a gradient of zero, when next needed.

    `History` holds the steps since the last flush, and the counter `last` how many of them a row has seen. A row that
    becomes active takes the steps it missed as one product with a 2 x 2 matrix.
    """

    counter = "last"

    def __init__(self, momentum: float, weight_decay: float, seed: int) -> None:
        super().__init__(momentum, weight_decay, seed)
        self._history: History | None = None
        self._latest = 0

    def begin(self, rows: WeightShard, step: int, lr: float, skip: Tensor) -> None:
        """Add the step to the history; when that is full, every 1024th step, flush first."""
        if _skipped(skip):
            return
        if self._history is None:
            self._history = History(self.betas[0], self.weight_decay, rows.weight.device)
        self._latest = step
        if self._history.count == self._history.window:
            self.flush(rows)
        self._history.add(lr, skip.bool())

    def catch_up(self, rows: WeightShard, part: RowSelection, step: int) -> None:
        """Apply to some rows the steps they were inactive in, before `step` reads them."""
        for block in _blocks(rows, part):
            self._catch_up(rows, block, RoundingKey(self.seed, step, _CATCH_UP))

    def flush(self, rows: WeightShard) -> None:
        """Apply to all rows the steps they were inactive in, and forget these steps."""
        if self._history is None or self._history.count == 0:
            return
        for block in _blocks(rows, slice(None)):
            self._catch_up(rows, block, RoundingKey(self.seed, self._latest, _FLUSH))
        rows.moments["last"].zero_()
        self._history.clear()

    def _catch_up(self, rows: WeightShard, part: RowSelection, key: RoundingKey) -> None:
        history = self._history
        if history is None or history.count == 0:
            return
        last = rows.moments["last"]
        if _host_knows(rows.weight):
            behind = select_rows(last, part) < history.count
            if not behind.all():
                part = rows.positions(part)[behind]
            if not behind.any():
                return
        noise = rows.noise(part, key)
        matrix, bias_matrix = history.since(select_rows(last, part))
        velocity = select_rows(rows.moments["momentum"], part).float()
        values, velocity = _transformed(matrix, rows.read(part), velocity)
        rows.write(part, values, noise)
        assign_rounded(rows.moments["momentum"], part, velocity, noise, 1)
        if rows.bias is not None:
            columns = rows.bias[:, None], rows.moments["bias_momentum"][:, None]
            transformed = _transformed(bias_matrix, *(select_rows(each, part) for each in columns))
            for storage, tensor in zip(columns, transformed, strict=True):
                assign_rows(storage, part, tensor)
        assign_rows(last, part, torch.full_like(select_rows(last, part), history.count))

    def _count(self, before: Tensor) -> Tensor:
        known = 0 if self._history is None else self._history.count
        if _host_knows(before) and (before != known - 1).any():
            raise RuntimeError("rows are to be updated in a step that did not begin, or were not caught up with before")
        return torch.full_like(before, known)


class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), as `torch.optim.AdamW` for rows that are always active.

    The counter `updates` is t of each row, by which its moments' bias towards their start at zero is corrected.
    """

    names = ("exp_avg", "exp_avg_sq")
    counter = "updates"

    def __init__(self, betas: tuple[float, float], eps: float, weight_decay: float, seed: int) -> None:
        super().__init__(weight_decay, betas, eps, seed)

    def _step(self, tensors: list[Tensor], gradient: RowGradient | Tensor, step: RowStep) -> None:
        values, mean, square = tensors
        beta1, beta2 = step.betas
        assert step.counts is not None
        if isinstance(gradient, RowGradient):
            gradient = gradient.dense(values)
        # m = beta1 m + (1 - beta1) g,   s = beta2 s + (1 - beta2) g^2
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # 1 - beta^t in float64: at first it is far smaller than the numbers that it is the difference of.
        mean_correction, square_correction = (1 - beta ** step.counts.double()[:, None] for beta in step.betas)
        # The corrections are one number a row, so they are moved out of the elements: into step size and floor.
        step_size = step.lr * square_correction.sqrt() / mean_correction
        direction = square.sqrt().add_((step.eps * square_correction.sqrt()).float())
        torch.div(mean, direction, out=direction)
        # w = (1 - lr d) w - step_size direction
        if step.weight_decay:
            values.mul_(1 - step.lr * step.weight_decay)
        values.addcmul_(direction, -step_size.float())


def build_row_optimizer(
    settings: config.SGD | config.AdamW, inactive_rows: Literal["sparse", "lazy"] = "sparse", *, seed: int
) -> RowOptimizer:
    """Return the row optimizer that `settings` describe.

    `inactive_rows`: whether rows that take no part in a step stay as they are (`sparse`), or move and decay without a
    gradient (`lazy`). Raises UserError for `lazy` with AdamW.
    """
    if isinstance(settings, config.SGD):
        build = LazyRowSGD if inactive_rows == "lazy" else RowSGD
        return build(settings.momentum, settings.weight_decay, seed)
    if inactive_rows == "lazy":
        raise config.UserError("head.inactive_rows is lazy, which SGD alone can catch up with")
    return RowAdamW(settings.betas, settings.eps, settings.weight_decay, seed)


def _host_knows(tensor: Tensor) -> bool:
    """Return whether the host can read the tensor without waiting for a GPU."""
    return not tensor.is_cuda


def _skipped(skip: Tensor) -> bool:
    """Return whether the step is skipped, as far as the host knows."""
    return _host_knows(skip) and bool(skip.item())


def _blocks(rows: WeightShard, part: RowSelection) -> Iterator[RowSelection]:
    """Split `part` into blocks: small beside the rows, large beside the cost of a launch on a GPU."""
    size = 16384 if rows.weight.is_cuda else 512
    if isinstance(part, Tensor):
        yield from part.split(size)
        return
    start, stop, _ = part.indices(len(rows))
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _transformed(matrix: Tensor, values: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Return `matrix` [2, 2, n, 1] times (values, velocity), [n, ...] each; the velocity is changed in place."""
    new_values = (values * matrix[0, 0]).addcmul_(velocity, matrix[0, 1])
    return new_values, velocity.mul_(matrix[1, 1]).addcmul_(values, matrix[1, 0])
