from collections.abc import Iterable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from recognition import config
from recognition.head.class_weights import optimizer as optimizer_module
from recognition.head.class_weights.optimizer import build_row_optimizer
from recognition.head.class_weights.shard import RowFormat, RowSelection, WeightShard
from tests.support.row_cases import (
    ADAMW,
    ALL,
    BOTH,
    COUNT,
    CPU,
    FORMATS,
    GO,
    SGD,
    SIZE,
    SKIP,
    formed,
    gradient,
    identical,
    make,
    near,
    parts,
    snapshot,
    torch_optimizer,
    torch_step,
)

NAMES = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


@BOTH
@pytest.mark.parametrize("row_format", ["float32", "split"])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("form", ["unformed", "dense"])
@pytest.mark.parametrize("bias", [False, True])
def test_all_rows_together_are_torchs_own_step(
    settings: config.SGD | config.AdamW, row_format: RowFormat, scattered: bool, form: str, bias: bool
) -> None:
    rows, optimizer = make(settings, row_format, bias=bias)
    weight = rows.read(slice(None)).double().clone()
    biases = None if rows.bias is None else rows.bias.double().clone()
    reference = torch_optimizer(settings, weight, biases)
    for step, lr in enumerate([0.1, 0.2, 0.05, 0.05, 0.01]):
        weight.grad = torch.zeros_like(weight)
        if biases is not None:
            biases.grad = torch.zeros_like(biases)
        for number, part in enumerate(parts(scattered)):
            values = rows.read(part)
            one = gradient(values, 10 * step + number, bias=bias)
            weight.grad[part] = formed(one, values)
            if biases is not None and biases.grad is not None and one.bias is not None:
                biases.grad[part] = one.bias.double()
            if form == "dense":
                dense = one.dense(values)
                cached_exp = dense.clone()
                optimizer.update(rows, part, dense, lr, GO, step, one.bias)
                assert torch.equal(dense, cached_exp)
            else:
                optimizer.update(rows, part, one, lr, GO, step)
        torch_step(reference, lr)
        near(rows.read(slice(None)), weight)
        near(rows.inverse_norm, 1 / weight.norm(dim=1))
    for name in optimizer.names:
        near(rows.moments[name], reference.state[weight][NAMES[name]])
        if biases is not None:
            near(rows.moments[f"bias_{name}"], reference.state[biases][NAMES[name]])
    if rows.bias is not None and biases is not None:
        near(rows.bias, biases)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_rows_that_take_part_now_and_then_are_alone_in_the_world(
    settings: config.SGD | config.AdamW, bias: bool
) -> None:
    rows, optimizer = make(settings, bias=bias)
    weights = [row.double().clone() for row in rows.read(slice(None))]
    biases: list[Any] = [None] * COUNT if rows.bias is None else [each.double().clone() for each in rows.bias]
    references = [torch_optimizer(settings, weight, each) for weight, each in zip(weights, biases, strict=True)]
    taken_often = torch.zeros(COUNT, dtype=torch.int64)
    generator = torch.Generator().manual_seed(3)
    for step in range(30):
        part = torch.randperm(COUNT, generator=generator)[: step % 5]
        before = snapshot(rows)
        values = rows.read(part)
        one = gradient(values, step, bias=bias)
        lr = 0.1 / (1 + step)
        optimizer.update(rows, part, one, lr, GO, step)
        for place, row in enumerate(part.tolist()):
            weights[row].grad = formed(one, values)[place]
            if one.bias is not None and biases[row] is not None:
                biases[row].grad = one.bias[place].double()
            torch_step(references[row], lr)
        others = torch.ones(COUNT, dtype=torch.bool)
        others[part] = False
        assert all(torch.equal(tensor[others], before[name][others]) for name, tensor in rows.tensors().items())
        taken_often[part] += 1
    near(rows.read(slice(None)), torch.stack(weights))
    if rows.bias is not None:
        near(rows.bias, torch.stack(biases))
    if isinstance(settings, config.AdamW):
        assert torch.equal(rows.moments["updates"].long(), taken_often) and len(taken_often.unique()) > 2


@ALL
@pytest.mark.parametrize("size", [7, 8])
def test_split_is_float32_bit_for_bit(
    settings: config.SGD | config.AdamW, inactive_rows: Literal["sparse", "lazy"], size: int
) -> None:
    results = []
    for row_format in ("float32", "split"):
        rows, optimizer = make(settings, row_format, inactive_rows=inactive_rows, size=size)
        generator = torch.Generator().manual_seed(6)
        for step in range(60):
            flag = SKIP if step % 7 == 3 else GO
            among = torch.randperm(COUNT, generator=generator)[:9] if step % 3 else None
            lr = 0.2 * 10.0 ** -(step % 4)
            pieces = list(parts(among is not None, among))
            for part in pieces:
                optimizer.catch_up(rows, part, step)
            optimizer.begin(rows, step, lr, flag)
            for number, part in enumerate(pieces):
                optimizer.update(rows, part, gradient(rows.read(part), 10 * step + number), lr, flag, step)
        optimizer.flush(rows)
        found = {**snapshot(rows), "weight": rows.read(slice(None)).clone()}
        if row_format == "split":
            assert rows.weight.dtype == torch.bfloat16 and found.pop("low").any()
        results.append(found)
    assert identical(*results)
    assert results[0]["weight"].isfinite().all()


@BOTH
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("part", [slice(2, 9), torch.tensor([8, 1, 5])], ids=["slice", "positions"])
@pytest.mark.parametrize("host_knows", [True, False])
@pytest.mark.parametrize("bias", [False, True])
def test_a_skipped_update_changes_not_a_bit(
    settings: config.SGD | config.AdamW,
    row_format: RowFormat,
    part: RowSelection,
    host_knows: bool,
    bias: bool,
    request: pytest.FixtureRequest,
) -> None:
    if not host_knows:
        request.getfixturevalue("as_on_a_gpu")
    rows, optimizer = make(settings, row_format, bias=bias)
    for step in range(3):
        optimizer.update(rows, part, gradient(rows.read(part), step, bias=bias), 0.1, GO, step)
    rows.inverse_norm[3] = 0.125
    before = snapshot(rows)
    broken = gradient(rows.read(part), 3, bias=bias)
    broken.x[2, 3] = torch.nan
    if broken.bias is not None:
        broken.bias[0] = torch.inf
    optimizer.update(rows, part, broken, 0.1, SKIP, 3)
    assert identical(snapshot(rows), before)
    optimizer.update(rows, part, gradient(rows.read(part), 4, bias=bias), 0.1, GO, 4)
    changed = {name for name, tensor in snapshot(rows).items() if not torch.equal(tensor, before[name])}
    assert changed == set(before) and all(tensor.isfinite().all() for tensor in rows.tensors().values())


@ALL
@pytest.mark.parametrize("row_format", FORMATS)
def test_the_way_of_a_gpu_gives_the_same(
    settings: config.SGD | config.AdamW,
    row_format: RowFormat,
    inactive_rows: Literal["sparse", "lazy"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    results = []
    for host_knows in (True, False):
        monkeypatch.setattr(optimizer_module, "_host_knows", lambda tensor, known=host_knows: known)
        rows, optimizer = make(settings, row_format, inactive_rows=inactive_rows, bias=True)
        generator = torch.Generator().manual_seed(6)
        for step in range(12):
            part = torch.randperm(COUNT, generator=generator)[:5]
            flag = SKIP if step % 4 == 2 else GO
            optimizer.catch_up(rows, part, step)
            optimizer.begin(rows, step, 0.1, flag)
            optimizer.update(rows, part, gradient(rows.read(part), step, bias=True), 0.1, flag, step)
        optimizer.flush(rows)
        results.append(snapshot(rows))
    assert identical(*results)


def test_sparse_rows_have_nothing_to_catch_up_with() -> None:
    for settings in (SGD, ADAMW):
        rows, optimizer = make(settings)
        optimizer.update(rows, slice(0, 3), gradient(rows.read(slice(0, 3)), 0), 0.1, GO, 0)
        before = snapshot(rows)
        for step in range(3):
            optimizer.begin(rows, step, 0.1, GO)
        optimizer.catch_up(rows, slice(None), 3)
        optimizer.flush(rows)
        assert identical(snapshot(rows), before)


@BOTH
@pytest.mark.parametrize("scattered", [False, True])
def test_bfloat16_follows_float32(settings: config.SGD | config.AdamW, scattered: bool) -> None:
    """As closely as its digits allow: errors of one step, at most 2^-7 of a number, that do not add up."""
    followed, optimizer = make(settings, "bfloat16", count=COUNT, size=512)
    leading, leader = make(settings, count=COUNT, size=512)
    leading.load(followed.read(slice(None)))
    for step in range(20):
        for number, part in enumerate(parts(scattered)):
            one = gradient(leading.read(part), 10 * step + number)
            optimizer.update(followed, part, one, 0.01, GO, step)
            leader.update(leading, part, one, 0.01, GO, step)
    for name in ("weight", *optimizer.names):
        found = followed.tensors()[name].double()
        expected = leading.tensors()[name].double()
        assert followed.tensors()[name].dtype == torch.bfloat16
        relative = (found - expected).norm() / expected.norm()
        assert 1e-3 < relative < 0.02, name
        # Without a trend: the mean error is that of so many numbers with errors of both signs.
        aligned = ((found - expected) * expected).sum() / expected.square().sum()
        assert aligned.abs() < 5 * relative / expected.numel() ** 0.5 + 1e-4, name
    near(followed.inverse_norm.double(), 1 / followed.weight.double().norm(dim=1))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_too_small_for_bfloat16_add_up(momentum: float) -> None:
    settings = config.SGD(momentum=momentum, weight_decay=0.0)
    rows, optimizer = make(settings, "bfloat16", size=512)
    rows.load(torch.ones(COUNT, 512))
    # Of the numbers below 1 the nearest is 2^-8 away: rounded to the nearest, none would ever move.
    small = torch.full((COUNT, 512), 2.0**-11 * (1 - settings.momentum))
    moved = velocity = 0.0
    for step in range(40):
        optimizer.update(rows, slice(None), small, 1.0, GO, step)
        velocity = settings.momentum * velocity + small[0, 0].item()
        moved += velocity
    values = rows.read(slice(None)).double()
    spread = values.std()
    assert abs(1 - values.mean() - moved) < 5 * spread / values.numel() ** 0.5
    # Rows, columns and steps have noise of their own: sums of independent roundings, no more and no less spread.
    assert 0.3 * spread < values.mean(0).std() * COUNT**0.5 < 2 * spread
    assert 0.3 * spread < values.mean(1).std() * 512**0.5 < 2 * spread


def test_row_and_momentum_are_rounded_independently() -> None:
    rows, optimizer = make(config.SGD(momentum=0.0, weight_decay=0.0), "bfloat16", size=512)
    rows.load(torch.ones(COUNT, 512))
    halfway = 1 + 2.0**-8
    optimizer.update(rows, slice(None), torch.full((COUNT, 512), -halfway), 2.0**-8 / halfway, GO, 0)
    errors = [torch.where(rows.tensors()[name].abs() > 1, 1.0, -1.0) for name in ("weight", "momentum")]
    for each in (*errors, errors[0] * errors[1]):
        assert abs(each.mean()) < 4.5 * each.numel() ** -0.5


@BOTH
def test_bfloat16_does_not_depend_on_parts_and_ranks(settings: config.SGD | config.AdamW) -> None:
    results = []
    divisions: list[list[RowSelection]] = [
        [slice(None)],
        [torch.arange(COUNT).flip(0)],
        [slice(0, 5), torch.arange(5, COUNT)],
    ]
    for pieces in divisions:
        rows, optimizer = make(settings, "bfloat16")
        for step in range(3):
            for part in pieces:
                dense = torch.arange(COUNT * SIZE).view(COUNT, SIZE)[part] / 50 - 1
                optimizer.update(rows, part, dense, 0.1, GO, step)
        results.append(snapshot(rows))
    assert identical(results[0], results[1]) and identical(results[0], results[2])
    whole, _ = make(settings, "bfloat16")
    optimizer = build_row_optimizer(settings, seed=7)
    half = WeightShard.initial(range(5 + 6, 5 + COUNT), SIZE, bias=False, seed=1, device=CPU, row_format="bfloat16")
    half.moments.update(optimizer.moments(COUNT - 6, SIZE, bias=False, device=CPU, row_format="bfloat16"))
    half.load(whole.read(slice(6, None)))
    for step in range(3):
        dense = torch.arange(COUNT * SIZE).view(COUNT, SIZE)[6:] / 50 - 1
        optimizer.update(half, slice(None), dense, 0.1, GO, step)
    assert identical({name: tensor[6:] for name, tensor in results[0].items()}, snapshot(half))


@BOTH
@pytest.mark.parametrize("row_format", FORMATS)
def test_moments_are_zeros_of_the_types_that_the_format_asks_for(
    settings: config.SGD | config.AdamW, row_format: RowFormat
) -> None:
    optimizer = build_row_optimizer(settings, seed=0)
    made = optimizer.moments(3, 4, bias=True, device=CPU, row_format=row_format)
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
    matrix = ((3, 4), torch.bfloat16 if row_format == "bfloat16" else torch.float32)
    vector = ((3,), torch.float32)
    if isinstance(settings, config.SGD):
        assert kinds == {"momentum": matrix, "bias_momentum": vector}
        lazy = build_row_optimizer(settings, "lazy", seed=0).moments(3, 4, bias=False, device=CPU)
        assert set(lazy) == {"momentum", "last"} and lazy["last"].dtype == torch.int32
    else:
        averages = {"exp_avg": matrix, "bias_exp_avg": vector, "exp_avg_sq": matrix, "bias_exp_avg_sq": vector}
        assert kinds == {**averages, "updates": ((3,), torch.int32)}
    assert not any(tensor.any() for tensor in made.values())


def test_lazy_adamw_is_refused() -> None:
    with pytest.raises(config.UserError, match="lazy"):
        build_row_optimizer(ADAMW, "lazy", seed=0)


class Largest(TorchDispatchMode):
    """Notes the largest tensor, in bytes, that is made outside some storages."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.size, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@BOTH
@pytest.mark.parametrize("row_format", FORMATS)
def test_nothing_as_large_as_the_shard_is_made(settings: config.SGD | config.AdamW, row_format: RowFormat) -> None:
    rows, optimizer = make(settings, row_format, count=2000, size=16)
    one = gradient(rows.read(slice(8, 16)), 0)
    taken: list[RowSelection] = [slice(8, 16), torch.arange(16, 8, -1)]
    for step, part in enumerate(taken):
        with Largest(rows.tensors().values()) as watch:
            optimizer.update(rows, part, one, 0.1, GO, step)
        in_place = settings is SGD and row_format == "float32" and isinstance(part, slice)
        assert 0 < watch.size < 8 * 16 * 4 if in_place else watch.size == 8 * 16 * 4
