from functools import partial

import numpy as np
import pytest
import torch

from recognition import config
from recognition.head.class_weights import optimizer as optimizer_module
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.lazy import History
from recognition.head.class_weights.shard import RowFormat, RowSelection, WeightShard
from tests.support.row_cases import (
    COUNT,
    GO,
    SGD,
    SKIP,
    formed,
    gradient,
    identical,
    make,
    near,
    snapshot,
    torch_optimizer,
    torch_step,
)


class Dense:
    """All rows in float64 under torch's SGD, whose gradient is zero where nothing is said."""

    def __init__(self, rows: WeightShard) -> None:
        self.weight = rows.read(slice(None)).double().clone()
        self.bias = None if rows.bias is None else rows.bias.double().clone()
        self.reference = torch_optimizer(SGD, self.weight, self.bias)
        # Rows have a momentum of zero before any gradient, torch's rows none; its first gradient is not damped.
        self.momentum = torch.zeros_like(self.weight)

    def step(self, lr: float, part: RowSelection, one: RowGradient) -> None:
        self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad[part] = formed(one, self.weight[part])
        if self.bias is not None and one.bias is not None:
            self.bias.grad = torch.zeros_like(self.bias)
            self.bias.grad[part] = one.bias.double()
        torch_step(self.reference, lr)
        self.momentum = self.reference.state[self.weight]["momentum_buffer"]


@pytest.mark.parametrize("host_knows", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("row_format", ["float32", "split"])
@pytest.mark.parametrize("window", [1024, 7])
def test_lazy_rows_are_dense_rows_whenever_they_are_seen(
    row_format: RowFormat,
    bias: bool,
    host_knows: bool,
    window: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not host_knows:
        request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(optimizer_module, "History", partial(History, window=window))
    rows, optimizer = make(SGD, row_format, inactive_rows="lazy", bias=bias)
    dense = Dense(rows)
    generator = torch.Generator().manual_seed(8)
    longest = 0
    last_seen = torch.zeros(COUNT)
    for step in range(200):
        count = int(torch.randint(0, 4, (), generator=generator))
        # Row 0 is seen in the end only; slices take their turn with positions.
        part: RowSelection = torch.randperm(COUNT - 1, generator=generator)[:count] + 1
        if step % 5 == 0:
            part = slice(step // 5 % (COUNT - 3) + 1, step // 5 % (COUNT - 3) + 3)
        lr = 0.3 * (1 + np.cos(step / 30)) / 2
        optimizer.catch_up(rows, part, step)
        near(rows.read(part).double(), dense.weight[part], 2e-6) if count else None
        flag = SKIP if torch.rand((), generator=generator) < 0.2 else GO
        one = gradient(rows.read(part), step, bias=bias)
        optimizer.begin(rows, step, lr, flag)
        optimizer.update(rows, part, one, lr, flag, step)
        if not flag.item():
            dense.step(lr, part, one)
        longest = max(longest, int((step - last_seen[part]).max()) if len(last_seen[part]) else 0)
        last_seen[part] = step
    assert longest > 20
    assert window == 7 or (rows.read(slice(0, 1)) - dense.weight[:1]).abs().max() > 0.1
    optimizer.flush(rows)
    near(rows.read(slice(None)), dense.weight, 2e-6)
    near(rows.moments["momentum"], dense.momentum, 2e-6)
    near(rows.inverse_norm, 1 / dense.weight.norm(dim=1), 2e-6)
    if rows.bias is not None and dense.bias is not None:
        near(rows.bias, dense.bias, 2e-6)
    settled = snapshot(rows)
    assert not rows.moments["last"].any()
    optimizer.flush(rows)
    assert identical(snapshot(rows), settled)


def test_what_was_settled_needs_no_history() -> None:
    results = []
    for renewed in (False, True):
        rows, optimizer = make(SGD, inactive_rows="lazy")
        for step in range(20):
            if step == 12:
                optimizer.flush(rows)
                if renewed:
                    saved = snapshot(rows)
                    rows, optimizer = make(SGD, inactive_rows="lazy")
                    for name, tensor in rows.tensors().items():
                        tensor.copy_(saved[name])
            part = torch.tensor([step % 5, 5 + step % 3])
            optimizer.catch_up(rows, part, step)
            optimizer.begin(rows, step, 0.1, GO)
            optimizer.update(rows, part, gradient(rows.read(part), step), 0.1, GO, step)
        optimizer.flush(rows)
        results.append(snapshot(rows))
    assert identical(*results)


def test_a_skipped_step_is_nothing_to_lazy_rows() -> None:
    rows, optimizer = make(SGD, inactive_rows="lazy")
    optimizer.begin(rows, 0, 0.1, SKIP)
    before = snapshot(rows)
    optimizer.catch_up(rows, slice(None), 1)
    optimizer.flush(rows)
    assert identical(snapshot(rows), before)


def test_many_lazy_rows_are_caught_up_in_blocks() -> None:
    rows, optimizer = make(SGD, inactive_rows="lazy", count=1300, size=4)
    rows.moments["momentum"].normal_(generator=torch.Generator().manual_seed(0))
    values, momentum = rows.read(slice(None)).clone().double(), rows.moments["momentum"].double()
    for step in range(3):
        optimizer.begin(rows, step, 0.1, GO)
        momentum = 0.9 * momentum + 0.05 * values
        values -= 0.1 * momentum
    optimizer.catch_up(rows, torch.arange(1299, 5, -1), 3)
    near(rows.read(slice(6, None)), values[6:])
    optimizer.flush(rows)
    near(rows.read(slice(None)), values)


def test_lazy_rows_that_were_not_caught_up_with_are_not_updated() -> None:
    rows, optimizer = make(SGD, inactive_rows="lazy")
    one = gradient(rows.read(slice(0, 3)), 0)
    with pytest.raises(RuntimeError, match="did not begin"):
        optimizer.update(rows, slice(0, 3), one, 0.1, GO, 0)
    for step in range(2):
        optimizer.begin(rows, step, 0.1, GO)
    with pytest.raises(RuntimeError, match="not caught up"):
        optimizer.update(rows, slice(0, 3), one, 0.1, GO, 1)


def test_lazy_bfloat16_decays_as_float32() -> None:
    settings = config.SGD(momentum=0.9, weight_decay=5e-4)
    rows, optimizer = make(settings, "bfloat16", inactive_rows="lazy", count=64, size=512)
    start = rows.read(slice(None)).double()
    for step in range(300):
        optimizer.catch_up(rows, torch.arange(step % 8, 64, 8), step)
        optimizer.begin(rows, step, 0.02, GO)
        if step % 8 == 7:
            optimizer.update(rows, part := torch.arange(7, 64, 8), torch.zeros(len(part), 512), 0.02, GO, step)
    optimizer.flush(rows)
    weight, momentum = 1.0, 0.0
    for _ in range(300):
        momentum = 0.9 * momentum + 5e-4 * weight
        weight -= 0.02 * momentum
    assert 1 - weight > 0.02
    cached_exp = (rows.read(slice(None)).double() * start).sum() / start.square().sum()
    # 32,768 numbers, each rounded at random to 2^-9 of itself up to forty times: about 7e-5 in all; four times that.
    assert cached_exp == pytest.approx(weight, abs=3e-4)
