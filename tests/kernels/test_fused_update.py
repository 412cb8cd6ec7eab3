from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from recognition import config
from recognition.head.class_weights import fused_update
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.optimizer import RowOptimizer, build_row_optimizer
from recognition.head.class_weights.shard import RowFormat, RowSelection, WeightShard
from tests.support.row_cases import (
    ADAMW,
    ALL,
    BOTH,
    FORMATS,
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

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernel on the device")

COUNT = 37
_MIXED = torch.randperm(14, generator=torch.Generator().manual_seed(0)) + 21
PARTS: list[RowSelection] = [slice(2, 3), slice(3, 20), slice(20, 20), torch.tensor([35]), _MIXED]
FORMS = [("unformed", 3), ("dense", 96), ("bfloat16", 96), ("projected", 96), ("projected", 600)]
"""A gradient as its factors with what is along the rows, the same in bfloat16, or with what is along them taken out, or
by itself; and the row's size.
"""


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowOptimizer, "kernels", True)


def make_gradient(form: str, values: Tensor, seed: int, *, bias: bool = False) -> tuple[RowGradient | Tensor, Tensor]:
    """The gradient, and the same in float64."""
    one = gradient(values, seed, bias=bias)
    if form == "dense":
        return one.dense(values), one.dense(values).double()
    if form == "unformed":
        return one, formed(one, values)
    if form == "projected":
        one = RowGradient(one.a, one.x, inverse_norm=torch.linalg.vector_norm(values, dim=1).reciprocal())
        radial = torch.nn.functional.normalize(values.double(), dim=1)
        product = formed(one, values)
        return one, product - (product * radial).sum(1, keepdim=True) * radial
    one = RowGradient(one.a.bfloat16(), one.x.bfloat16(), one.radial, one.bias)
    product = one.product()
    assert product.dtype == torch.bfloat16
    return one, product.double() - (0 if one.radial is None else one.radial.double()[:, None] * values.double())


def differ(one: Tensor, other: Tensor) -> Tensor:
    """By how many bfloat16 numbers, where they have one sign."""
    return (one.view(torch.int16).int() - other.view(torch.int16).int()).abs()


@ALL
@pytest.mark.parametrize(("form", "size"), FORMS)
@pytest.mark.parametrize("row_format", ["float32", "split"])
def test_rows_move_as_torchs_own(
    settings: config.SGD | config.AdamW,
    inactive_rows: Literal["sparse", "lazy"],
    size: int,
    row_format: RowFormat,
    form: str,
) -> None:
    if isinstance(settings, config.AdamW):
        # Its first step is all but the sign of a gradient, which rounding decides where that is small beside epsilon.
        settings = settings.model_copy(update={"eps": 0.01})
    rows, optimizer = make(settings, row_format, inactive_rows=inactive_rows, count=COUNT, size=size)
    seen = [place for part in PARTS for place in rows.positions(part).tolist()]
    assert len(seen) == len(set(seen)) == 33
    weight = rows.read(slice(None)).double()[seen].clone()
    reference = torch_optimizer(settings, weight, None)
    before = snapshot(rows)
    for step, lr in enumerate([0.1, 0.2, 0.01]):
        gradients = []
        optimizer.begin(rows, step, lr, GO)
        for number, part in enumerate(PARTS):
            one, exact = make_gradient(form, rows.read(part), 10 * step + number)
            optimizer.update(rows, part, one, lr, GO, step)
            gradients.append(exact)
        weight.grad = torch.cat(gradients)
        torch_step(reference, lr)
        near(rows.read(slice(None))[seen], weight, 1e-5)
        near(rows.inverse_norm[seen], 1 / weight.norm(dim=1))
    names = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for name in optimizer.names:
        near(rows.moments[name][seen], reference.state[weight][names[name]], 2e-6)
    if optimizer.counter is not None:
        assert (rows.moments[optimizer.counter][seen] == 3).all()
    others = [place for place in range(COUNT) if place not in seen]
    assert all(torch.equal(tensor[others], before[name][others]) for name, tensor in rows.tensors().items())


@ALL
@pytest.mark.parametrize("size", [3, 96, 512, 600])
def test_bfloat16_is_rounded_by_the_very_same_bits(
    settings: config.SGD | config.AdamW, inactive_rows: Literal["sparse", "lazy"], size: int
) -> None:
    rows, optimizer = make(settings, "bfloat16", inactive_rows=inactive_rows, count=COUNT, size=size)
    other, pytorch = make(settings, "bfloat16", inactive_rows=inactive_rows, count=COUNT, size=size)
    pytorch.kernels = False
    names = ["weight", *optimizer.names]
    for step in range(3):
        optimizer.begin(rows, step, 0.1, GO)
        pytorch.begin(other, step, 0.1, GO)
        for number, part in enumerate(PARTS):
            one, _ = make_gradient("dense", rows.read(part), 10 * step + number)
            optimizer.update(rows, part, one, 0.1, GO, step)
            pytorch.update(other, part, one, 0.1, GO, step)
        for name in names:
            apart = differ(rows.tensors()[name], other.tensors()[name])
            # A last digit of float32 in 2^16 decides on one that is kept; a few digits may differ.
            assert apart.max() <= 1 and (apart > 0).sum() <= 2 + 1e-3 * apart.numel(), name
            rows.tensors()[name].copy_(other.tensors()[name])
        near(rows.inverse_norm, other.inverse_norm, 1e-5)
        if optimizer.counter is not None:
            assert torch.equal(rows.moments[optimizer.counter], other.moments[optimizer.counter])


@BOTH
@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_do_not_depend_on_the_parts_they_are_updated_in(
    settings: config.SGD | config.AdamW, row_format: RowFormat
) -> None:
    results = []
    dense = torch.randn(COUNT, 24, generator=torch.Generator().manual_seed(0))
    divisions: list[list[RowSelection]] = [
        [slice(None)],
        [torch.arange(COUNT).flip(0)],
        [slice(0, 5), torch.arange(5, COUNT)],
    ]
    for pieces in divisions:
        rows, optimizer = make(settings, row_format, count=COUNT, size=24)
        for step in range(3):
            for part in pieces:
                optimizer.update(rows, part, dense[part], 0.1, GO, step)
        results.append(snapshot(rows))
    assert identical(results[0], results[1]) and identical(results[0], results[2])


@ALL
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("part", [slice(2, 9), torch.tensor([8, 1, 5])], ids=["slice", "positions"])
def test_a_skipped_update_changes_not_a_bit(
    settings: config.SGD | config.AdamW,
    inactive_rows: Literal["sparse", "lazy"],
    row_format: RowFormat,
    part: RowSelection,
    as_on_a_gpu: None,
) -> None:
    rows, optimizer = make(settings, row_format, inactive_rows=inactive_rows, bias=True)
    for step in range(2):
        optimizer.update(rows, part, gradient(rows.read(part), step, bias=True), 0.1, GO, step)
    before = snapshot(rows)
    broken = gradient(rows.read(part), 3, bias=True)
    broken.x[2, 3] = torch.nan
    optimizer.update(rows, part, broken, 0.1, SKIP, 3)
    assert identical(snapshot(rows), before)
    optimizer.update(rows, part, gradient(rows.read(part), 4, bias=True), 0.1, GO, 4)
    changed = {name for name, tensor in snapshot(rows).items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) - {"last"}


@BOTH
def test_the_bias_moves_as_it_does_without_the_kernel(settings: config.SGD | config.AdamW) -> None:
    results = []
    for kernels in (False, True):
        rows, optimizer = make(settings, bias=True)
        optimizer.kernels = kernels
        for step in range(3):
            optimizer.update(rows, slice(2, 9), gradient(rows.read(slice(2, 9)), step, bias=True), 0.1, GO, step)
        results.append(snapshot(rows))
    near(results[1]["weight"], results[0]["weight"])
    names = [name for name in results[0] if name.startswith("bias") or name == "updates"]
    assert len(names) >= 2 and all(torch.equal(results[0][name], results[1][name]) for name in names)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99999), (0.0, 0.9)])
def test_adamws_corrections_are_exact_after_any_number_of_updates(betas: tuple[float, float]) -> None:
    counts = torch.tensor([1, 2, 5, 6, 7, 50, 499, 500, 501, 49_999, 50_001, 10_000_000, 2_000_000_000])
    rows, _ = make(ADAMW, count=len(counts))
    settings = config.AdamW(betas=betas, eps=0.05, weight_decay=0.1)
    optimizer = build_row_optimizer(settings, seed=0)
    rows.moments["updates"].copy_(counts - 1)
    rows.moments["exp_avg"].normal_(generator=torch.Generator().manual_seed(0))
    rows.moments["exp_avg_sq"].uniform_(0.1, 1, generator=torch.Generator().manual_seed(1))
    w, mean, square = (each.double() for each in (rows.read(slice(None)), *list(rows.moments.values())[:2]))
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    optimizer.update(rows, slice(None), g, 0.1, GO, 0)
    mean = betas[0] * mean + (1 - betas[0]) * g.double()
    square = betas[1] * square + (1 - betas[1]) * g.double() ** 2
    mean_known, square_known = (1 - beta ** counts.double()[:, None] for beta in betas)
    step = mean / mean_known / ((square / square_known).sqrt() + 0.05)
    assert torch.equal(rows.moments["updates"].long(), counts)
    # What a row of about 3 is rounded to in float32, 2.4e-7, and a few roundings of the step.
    np.testing.assert_allclose(rows.weight - w * (1 - 0.01), -0.1 * step, rtol=1e-6, atol=4e-7)


@pytest.mark.parametrize("row_format", ["split", "bfloat16"])
def test_what_is_not_a_number_is_seen(row_format: RowFormat) -> None:
    rows, optimizer = make(SGD, row_format)
    # NVIDIA's has all bits set, which rounding upwards carries into the sign.
    g = torch.full((3, 8), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    g[1] = torch.inf
    optimizer.update(rows, slice(0, 3), g, 0.1, GO, 0)
    operand = rows.operand(slice(None), torch.bfloat16)
    assert operand[[0, 2]].isnan().all() and (operand[1] == -torch.inf).all() and operand[3:].isfinite().all()
    assert rows.inverse_norm[[0, 2]].isnan().all() and rows.inverse_norm[1] == 0


def test_a_row_of_zeros_has_the_largest_inverse_norm() -> None:
    rows, optimizer = make(SGD)
    rows.load(torch.zeros(len(rows), 8))
    optimizer.update(rows, slice(0, 2), torch.zeros(2, 8), 0.1, GO, 0)
    assert rows.inverse_norm[0] == pytest.approx(1e12)


@pytest.mark.parametrize("scattered", [False, True])
def test_offsets_beyond_32_bits(tmp_path: Path, scattered: bool) -> None:
    # Files with a hole in them, as large as needed that an offset cut to 32 bits is that of the first rows.
    size, count, few = 512, (1 << 23) + 8, 8
    tensors = []
    for name in ("weight", "momentum"):
        stored = np.memmap(tmp_path / name, np.int16, "w+", shape=(count, size))
        tensors.append(torch.from_numpy(stored).view(torch.bfloat16))
    small, optimizer = make(SGD, "bfloat16", count=few, size=size)
    last = slice(count - few, count)
    rows = WeightShard(tensors[0], torch.zeros(count), moments={"momentum": tensors[1]})
    near_end = WeightShard(small.weight, small.inverse_norm, first=count - few, moments=small.moments)
    rows.weight[last] = small.weight
    part: RowSelection = torch.arange(count - few, count) if scattered else last
    for step in range(2):
        g = torch.randn(few, size, generator=torch.Generator().manual_seed(step))
        optimizer.update(rows, part, g, 0.1, GO, step)
        optimizer.update(near_end, slice(None), g, 0.1, GO, step)
    for name, tensor in rows.tensors().items():
        assert torch.equal(tensor[last], near_end.tensors()[name]) and not tensor[: 2 * few].any(), name


# ---- as a PyTorch operator


@ALL
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("scattered", [False, True])
def test_opcheck(
    settings: config.SGD | config.AdamW,
    inactive_rows: Literal["sparse", "lazy"],
    row_format: RowFormat,
    scattered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, optimizer = make(settings, row_format, inactive_rows=inactive_rows)
    part: RowSelection = torch.tensor([3, 0, 7]) if scattered else slice(2, 5)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(fused_update, "update_rows", lambda **arguments: calls.append(arguments))
    one = gradient(rows.read(part), 0)
    optimizer.begin(rows, 0, 0.1, GO)
    optimizer.update(rows, part, one.dense(rows.read(part)) if scattered else one, 0.1, GO, 0)
    (arguments,) = calls
    monkeypatch.undo()
    torch.library.opcheck(fused_update.update_rows, (), arguments)


def test_scattered_memory_is_refused() -> None:
    rows, optimizer = make(SGD)
    with pytest.raises(ValueError, match="contiguous"):
        optimizer.update(rows, slice(0, 8), torch.zeros(8, 8).T, 0.1, GO, 0)


@pytest.mark.parametrize("told", [False, True])
def test_the_kernel_is_taken_where_it_is_told_to(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, optimizer = make(SGD)
    optimizer.kernels = told
    calls: list[Any] = []
    monkeypatch.setattr(fused_update, "update", lambda *arguments, **options: calls.append(arguments))
    before = snapshot(rows)
    optimizer.update(rows, slice(0, 2), torch.ones(2, 8), 0.1, GO, 0)
    assert (len(calls) == 1) == told == identical(snapshot(rows), before)
