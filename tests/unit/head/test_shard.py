from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recognition.head.class_weights.gradient import AccumulatedGradient, RowGradient
from recognition.head.class_weights.shard import RowFormat, RowSelection, WeightShard
from recognition.head.class_weights.stochastic_rounding import Noise, RoundingKey

CPU = torch.device("cpu")
NORM, SUM, SUM_OF_BFLOAT16 = 1e-6, 2e-6, 0.03
"""Float32 against float64: a root and a division of sums of 8; sums of 30 products of about 1. bfloat16 rounds the
product to 4e-3 of numbers up to some 15."""
FORMATS: list[RowFormat] = ["float32", "split", "bfloat16"]
KEY = RoundingKey(1, 2, 0)
SCATTERED = torch.tensor([7, 0, 3])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(
    count: int = 10, size: int = 8, row_format: RowFormat = "float32", *, first: int = 0, bias: bool = False
) -> WeightShard:
    return WeightShard.initial(range(first, first + count), size, bias=bias, seed=3, device=CPU, row_format=row_format)


def bits(values: Tensor) -> np.ndarray:
    return values.numpy().view(np.uint32)


def from_bits(patterns: np.ndarray) -> Tensor:
    return torch.from_numpy(patterns.astype(np.uint32).view(np.float32))


def inverse_norms(values: Tensor) -> Tensor:
    return 1 / values.double().norm(dim=1).clamp(min=1e-12)


@pytest.mark.parametrize("row_format", FORMATS)
def test_the_start_is_one_draw_for_any_number_of_ranks(row_format: RowFormat) -> None:
    whole = WeightShard.initial(range(2500), 16, bias=True, seed=1, device=CPU, row_format=row_format)
    parts = [
        WeightShard.initial(range(*ends), 16, bias=True, seed=1, device=CPU, row_format=row_format)
        for ends in ((0, 900), (900, 2100), (2100, 2500), (2500, 2500))
    ]
    assert [rows.first for rows in parts] == [0, 900, 2100, 2500] and [len(rows) for rows in parts][-1] == 0
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, torch.cat([rows.tensors()[name] for rows in parts])), name
    float32 = WeightShard.initial(range(2500), 16, bias=False, seed=1, device=CPU).read(slice(None))
    assert torch.equal(whole.read(slice(None)), float32.bfloat16().float() if row_format == "bfloat16" else float32)
    assert whole.bias is not None and not whole.bias.any()
    assert abs(float32.std() - 0.01) < 2e-4 and abs(float32.mean()) < 2e-4
    assert len(np.unique(bits(float32)[:, 0])) > 2490
    assert not torch.equal(
        float32[:9], WeightShard.initial(range(9), 16, bias=False, seed=2, device=CPU).read(slice(None))
    )


def edges() -> Tensor:
    """Every lower half under uppers that are odd and even, of both signs, denormal, largest, and below a power of 2."""
    uppers = np.array([0x0000, 0x8000, 0x0001, 0x3F80, 0x3F81, 0xBF80, 0xBF81, 0x3FFF, 0xBFFF, 0x7F7E, 0xFF7F, 0x0080])
    lows = np.r_[0, 1, 0x1234, 0x7FFE:0x8003, 0xC000, 0xFFFE, 0xFFFF]
    return from_bits((uppers[:, None] << 16) + lows)


def spacing(values: Tensor) -> Tensor:
    """What the last of eight binary digits is worth, float64; the smallest normal number is 2^-126."""
    return torch.from_numpy(np.ldexp(1.0, np.frexp(values.double().numpy())[1].clip(min=-125) - 8))


@pytest.mark.parametrize("part", [slice(None), torch.arange(12).flip(0)], ids=["slice", "positions"])
def test_split_keeps_every_bit_and_its_upper_half_is_the_nearest(part: RowSelection) -> None:
    values = edges()
    rows = make(12, values.shape[1], "split")
    rows.write(part, values, None)
    found = rows.read(part)
    np.testing.assert_array_equal(bits(found), bits(values))
    assert rows.weight.dtype == torch.bfloat16 and rows.low is not None and rows.low.dtype == torch.int16
    upper = rows.operand(part, torch.bfloat16).double()
    finite = upper.isfinite()
    assert ((upper - values.double()).abs() <= spacing(values) / 2)[finite].all()
    assert (values[~finite].abs() > 3.389e38).all() and (~finite).any()


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("part", [slice(2, 5), SCATTERED, slice(4, 4), torch.zeros(0, dtype=torch.int64)])
def test_what_is_written_is_read_and_the_rest_stays(row_format: RowFormat, part: RowSelection) -> None:
    rows = make(row_format=row_format)
    before, norms = rows.read(slice(None)).clone(), rows.inverse_norm.clone()
    values = torch.randn(len(before[part]), 8, generator=torch.Generator().manual_seed(0)) * 5
    rows.write(part, values, None)
    expected = before.clone()
    expected[part] = values.bfloat16().float() if row_format == "bfloat16" else values
    assert torch.equal(rows.read(slice(None)), expected) and torch.equal(rows.read(part), expected[part])
    np.testing.assert_allclose(rows.inverse_norm.double(), inverse_norms(expected), rtol=NORM)
    others = torch.ones(10, dtype=torch.bool)
    others[part] = False
    assert torch.equal(rows.inverse_norm[others], norms[others])


@pytest.mark.parametrize("row_format", FORMATS)
def test_operands_are_rows_in_the_type_asked_for_and_views_where_they_can_be(row_format: RowFormat) -> None:
    rows = make(row_format=row_format)
    whole = rows.read(slice(None)).clone()
    for part in (slice(1, 6), SCATTERED):
        for dtype in (torch.float32, torch.bfloat16):
            operand = rows.operand(part, dtype)
            assert operand.dtype == dtype
            assert torch.equal(operand, whole[part].to(dtype))
            shares = operand.untyped_storage().data_ptr() == rows.weight.untyped_storage().data_ptr()
            assert shares == (isinstance(part, slice) and dtype == rows.weight.dtype)
    view = rows.read(slice(1, 3))
    assert (view.data_ptr() == rows.weight[1:3].data_ptr()) == (row_format == "float32")
    # A view that was changed in place is written as anything else.
    rows.write(slice(1, 3), view.mul_(2), None)
    whole[1:3] *= 2
    assert torch.equal(rows.read(slice(None)), whole)
    np.testing.assert_allclose(rows.inverse_norm.double(), inverse_norms(whole), rtol=NORM)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("size", [7, 8])
def test_scattered_rows_that_are_no_multiple_of_16_bytes(row_format: RowFormat, size: int) -> None:
    rows = make(size=size, row_format=row_format)
    expected = rows.read(slice(None)).clone()
    values = expected[SCATTERED] * 4
    rows.write(SCATTERED, torch.cat([values, values], 1)[:, :size], None)
    expected[SCATTERED] = values
    assert torch.equal(rows.read(slice(None)), expected)


def test_a_row_of_zeros_has_the_largest_inverse_norm() -> None:
    rows = make()
    rows.write(slice(0, 1), torch.zeros(1, 8), None)
    assert rows.inverse_norm[0] == pytest.approx(1e12)


@pytest.mark.parametrize("row_format", FORMATS)
def test_a_write_that_is_skipped_leaves_the_inverse_norm(row_format: RowFormat) -> None:
    rows = make(row_format=row_format)
    rows.inverse_norm.fill_(5.0)
    noise = rows.noise(slice(2, 6), RoundingKey(0, 0, 0))
    before = {name: tensor.clone() for name, tensor in rows.tensors().items()}
    rows.write(slice(2, 6), rows.read(slice(2, 6)), noise, torch.tensor(True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in rows.tensors().items())
    rows.write(slice(2, 6), rows.read(slice(2, 6)), noise, torch.tensor(False))
    assert (rows.inverse_norm == 5.0).sum() == 6


def test_rows_are_loaded_and_listed() -> None:
    rows = make(1500, 4, "split", bias=True)
    rows.moments["momentum"] = torch.zeros(1500, 4)
    weight = torch.randn(1500, 4, dtype=torch.float64)
    rows.load(weight, torch.arange(1500.0))
    assert torch.equal(rows.read(slice(None)), weight.float())
    tensors = rows.tensors()
    assert set(tensors) == {"weight", "low", "inverse_norm", "bias", "momentum"}
    assert tensors["bias"][7] == 7
    tensors["weight"].zero_()
    assert not rows.weight.any()
    assert set(make().tensors()) == {"weight", "inverse_norm"}


# ---- stochastic rounding


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers towards zero and away from it, of finite numbers, in float64."""
    steps = values.double() / spacing(values)
    towards, away = (torch.copysign(side(steps.abs()), steps) * spacing(values) for side in (torch.floor, torch.ceil))
    return towards, away


def test_rounding_gives_a_neighbour_and_keeps_what_needs_none() -> None:
    values = edges()[(edges().abs() < 3e38).all(1)]
    values = torch.cat([values, torch.randn(200, values.shape[1]) * 10.0 ** torch.randint(-30, 30, (200, 1))])
    below, above = neighbours(values)
    exact = below == above
    for step in range(20):
        rounded = Noise.of(torch.arange(len(values)), values.shape[1], RoundingKey(1, step, 0)).round(values, 0)
        assert (bits(rounded) & 0xFFFF == 0).all()
        found = rounded.double()
        assert ((found == below) | (found == above)).all()
        assert np.array_equal(bits(rounded)[exact.numpy()], bits(values)[exact.numpy()])
    special = torch.tensor([[torch.inf, -torch.inf, torch.nan, -0.0, 0.0]])
    rounded = Noise.of(torch.arange(1), 5, RoundingKey(1, 0, 0)).round(special, 0)
    assert np.array_equal(bits(rounded)[0, [0, 1, 3, 4]], bits(special)[0, [0, 1, 3, 4]]) and rounded[0, 2].isnan()


@pytest.mark.parametrize(
    "value", [1.001, -1.001, 1.9999, -1.9999, 3.3e-5, -0.7, 1e-39, 0.1 + 2.0**-16], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("stream", [0, 2])
def test_rounding_is_right_on_average(value: float, stream: int) -> None:
    rows, size = 2000, 64
    values = torch.full((rows, size), value)
    below, above = (float(side[0, 0]) for side in neighbours(values[:1, :1]))
    share = (float(values[0, 0]) - below) / (above - below)
    up = Noise.of(torch.arange(rows), size, RoundingKey(5, 9, 0)).round(values, stream).double() == above
    for found, draws in ((up.double().mean(), rows * size), (up.double().mean(0), rows), (up.double().mean(1), size)):
        # Five standard deviations, and the whole number that a share of few draws is rounded to.
        assert (found - share).abs().max() < 5.2 * (share * (1 - share) / draws) ** 0.5 + 1 / draws
    flat = up.double().sum()
    assert abs(flat - share * rows * size) < 5 * (share * (1 - share) * rows * size) ** 0.5 + 1


def ups(step: int = 0, *, seed: int = 0, purpose: int = 0, stream: int = 0, rows: range = range(1500)) -> Tensor:
    values = torch.full((len(rows), 40), 1 + 2.0**-8)
    noise = Noise.of(torch.arange(rows.start, rows.stop), 40, RoundingKey(seed, step, purpose))
    return (noise.round(values, stream) > 1).double() * 2 - 1


def test_noise_has_no_pattern() -> None:
    first = ups()
    assert abs(first.mean()) < 4.5 * first.numel() ** -0.5
    columns = torch.corrcoef(first.T).fill_diagonal_(0)
    assert columns.abs().max() < 5.2 * 1500**-0.5
    neighbouring = (first[1:] * first[:-1]).mean(0)
    assert neighbouring.abs().max() < 4.5 * 1499**-0.5
    for other in (ups(1), ups(seed=1), ups(purpose=1), ups(stream=1), ups(rows=range(1500, 3000))):
        assert (first * other).mean(0).abs().max() < 4.5 * 1500**-0.5
        assert abs((first * other).mean()) < 4.5 * first.numel() ** -0.5
    assert torch.equal(first, ups())


@pytest.mark.parametrize("digit", range(16))
def test_every_digit_of_the_noise_is_random(digit: int) -> None:
    noise = Noise.of(torch.arange(1500), 40, RoundingKey(0, 0, 0)).bits[:, :40].to(torch.int32)
    ones = (noise >> digit & 1).double()
    assert abs(ones.mean() - 0.5) < 4.5 * 0.5 * ones.numel() ** -0.5
    assert torch.corrcoef(ones.T).fill_diagonal_(0).abs().max() < 5.5 * 1500**-0.5


def test_noise_belongs_to_the_row_whoever_holds_it() -> None:
    values = torch.randn(40, 12)
    whole = make(40, 12, "bfloat16")
    whole.write(slice(None), values, whole.noise(slice(None), KEY))
    assert not torch.equal(whole.read(slice(None)), values.bfloat16().float())
    halves = [make(15, 12, "bfloat16"), make(25, 12, "bfloat16", first=15)]
    halves[0].write(slice(0, 15), values[:15], halves[0].noise(slice(0, 15), KEY))
    for part in (torch.tensor([24, 3, 11]), torch.tensor([k for k in range(25) if k not in (24, 3, 11)])):
        halves[1].write(part, values[15:][part], halves[1].noise(part, KEY))
    assert torch.equal(whole.weight, torch.cat([rows.weight for rows in halves]))
    assert make(row_format="split").noise(slice(None), KEY) is None is make().noise(slice(None), KEY)


# ---- gradients


def gradient(batch: int, rows: Tensor, dtype: torch.dtype, seed: int = 0, *, normalised: bool = True) -> RowGradient:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, len(rows), generator=generator).to(dtype)
    x = torch.randn(batch, rows.shape[1], generator=generator).to(dtype)
    radial = torch.randn(len(rows), generator=generator) if normalised else None
    return RowGradient(a, x, radial, None if normalised else torch.randn(len(rows), generator=generator))


def formed(gradient: RowGradient, rows: Tensor) -> np.ndarray:
    product = gradient.a.double().numpy().T @ gradient.x.double().numpy()
    return product - (
        0 if gradient.radial is None else gradient.radial.double().numpy()[:, None] * rows.double().numpy()
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, SUM), (torch.bfloat16, SUM_OF_BFLOAT16)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("normalised", [True, False])
def test_a_gradient_is_formed(dtype: torch.dtype, tolerance: float, normalised: bool) -> None:
    rows = torch.randn(6, 8)
    one = gradient(30, rows, dtype, normalised=normalised)
    dense = one.dense(rows)
    assert dense.dtype == torch.float32
    np.testing.assert_allclose(dense.numpy(), formed(one, rows), rtol=tolerance, atol=tolerance)
    total = torch.ones(6, 8)
    one.add_to(total, rows, 0.5, decay=0.25)
    wanted = 0.5 + formed(one, rows) + 0.25 * rows.numpy()
    np.testing.assert_allclose(total.numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)], ids=["f32", "bf16"])
def test_a_gradient_is_made_orthogonal_to_the_rows(dtype: torch.dtype, tolerance: float) -> None:
    rows = torch.randn(6, 8)
    one = gradient(30, rows, dtype, normalised=True)
    product = formed(RowGradient(one.a, one.x), rows)
    w = rows.double().numpy()
    wanted = product - (product * w).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True) * w
    one = RowGradient(one.a, one.x, inverse_norm=torch.linalg.vector_norm(rows, dim=1).reciprocal())
    scale = tolerance * np.abs(product).max()
    np.testing.assert_allclose(one.dense(rows).numpy(), wanted, atol=scale)
    total = torch.ones(6, 8)
    one.add_to(total, rows, 0.5, decay=0.25)
    np.testing.assert_allclose(total.numpy(), 0.5 + wanted + 0.25 * w, atol=scale)


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("normalised", [True, False])
def test_gradients_are_summed(row_format: RowFormat, normalised: bool) -> None:
    rows = make(row_format=row_format, bias=not normalised)
    rows.load(torch.randn(10, 8))
    values = rows.read(slice(None))
    total = AccumulatedGradient(rows)
    expected, bias = np.zeros((10, 8)), np.zeros(10)
    parts: list[Any] = [slice(1, 5), SCATTERED, slice(4, 4), torch.zeros(0, dtype=torch.int64), SCATTERED]
    for seed, part in enumerate(parts):
        one = gradient(4, values[part], torch.float32, seed, normalised=normalised)
        total.add(part, one)
        expected[part] += formed(one, values[part])
        if one.bias is not None:
            bias[part] += one.bias.double().numpy()
    np.testing.assert_allclose(total.weight.numpy(), expected, rtol=SUM, atol=SUM)
    assert total.touched.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 7]
    if normalised:
        assert total.bias is None
    else:
        assert total.bias is not None
        np.testing.assert_allclose(total.bias.numpy(), bias, rtol=SUM, atol=SUM)
    total.clear()
    assert not total.weight.any() and not total.touched.any() and (total.bias is None or not total.bias.any())
