"""The Triton kernel that updates rows in one pass over them: gradient, optimizer step, rounding and norms together.

It computes what `WeightShard` and `RowOptimizer` compute in PyTorch, with the same bits of noise. bfloat16 numbers
come as the int16 numbers of their bits. Offsets into the rows are 64-bit: 4.2 million rows of 512 numbers are 2^31.
"""

import triton
import triton.language as tl

from recognition.randomness import MURMUR3_MULTIPLIERS, as_signed

_FIRST_MULTIPLIER = tl.constexpr(as_signed(MURMUR3_MULTIPLIERS[0]))
_SECOND_MULTIPLIER = tl.constexpr(as_signed(MURMUR3_MULTIPLIERS[1]))
_NAN = tl.constexpr(0x7FC0)
_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["selected", "start", "salt"])
def update_kernel(
    weight,  # [r, SIZE]: float32, or bfloat16 as int16
    low,  # [r, SIZE] int16 in the format `split`, else None
    inverse_norm,  # [r] float32
    first_moment,  # [r, SIZE]: SGD's momentum or AdamW's mean of the gradients; float32, or bfloat16 as int16
    second_moment,  # [r, SIZE]: AdamW's mean of their squares, typed as the first; None selects SGD
    gradient,  # [selected, SIZE]: q, float32, or bfloat16 as int16
    radial,  # [selected] float32: coefficients of w in the gradient q - radial w; None for no such term
    positions,  # [selected] int64: which rows; None for those from `start` on
    counts,  # [selected] int32: AdamW's number of updates of each row, this one included; else None
    multipliers,  # [at least SIZE / 4 + 3] int64 in the format `bfloat16`, else None
    skip,  # scalar float32: where it is 1, nothing changes
    selected,
    start,
    salt,
    lr,
    weight_decay,
    beta1,
    rest1,  # 1 - beta1
    log_beta1,
    beta2,
    rest2,  # 1 - beta2
    log_beta2,
    eps,
    REMOVE_RADIAL: tl.constexpr,  # subtract the projection of q onto w instead of `radial` w
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update ROWS rows, BLOCK columns at a time; SGD uses beta1 as its momentum.

    For each row w with its first moment v, second moment s and number of updates t:

    1. Find the row, and the key of its noise.
    2. Find the coefficient c of w in the gradient g = q + c w: c = -radial, or c = -(q . w) / |w|^2 by a pass over
       q and w. SGD adds the decay: c = c + decay.
    3. Find AdamW's step size and floor, from lr (v / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps) with both
       corrections moved out of the elements: lr sqrt(1 - beta2^t) / (1 - beta1^t) and eps sqrt(1 - beta2^t).
    4. For each element, compute g and the step,
           SGD      v = beta1 v + g,   w = w - lr v
           AdamW    v = v + (1 - beta1) (g - v),   s = beta2 s + (1 - beta2) g^2,
                    w = (1 - lr decay) w - step_size v / (sqrt(s) + floor)
       and store the results in the format of the rows.
    5. Store 1 / |w| of the row as it was stored.
    """
    if tl.load(skip) != 0:
        return
    # 1. The row.
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = place < selected
    row = place + start
    if positions is not None:
        row = tl.load(positions + place, mask=here, other=0)
    keys = _fmix64(row + salt)
    # 2. The coefficient of w in the gradient.
    along_row = tl.zeros([ROWS], tl.float32)
    if radial is not None:
        along_row -= tl.load(radial + place, mask=here, other=0.0)
    if REMOVE_RADIAL:
        product = tl.zeros([ROWS, BLOCK], tl.float32)
        square = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, SIZE, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = here[:, None] & (column < SIZE)[None, :]
            w = _read_rows(weight, low, row[:, None] * SIZE + column[None, :], inside)
            product += _read(gradient, place[:, None] * SIZE + column[None, :], inside) * w
            square += w * w
        along_row -= tl.sum(product, 1) / tl.maximum(tl.sum(square, 1), _SMALLEST_NORM * _SMALLEST_NORM)
    if second_moment is None:
        along_row += weight_decay
    else:
        # 3. The step size.
        count = tl.load(counts + place, mask=here, other=1).to(tl.float32)
        root_correction = tl.sqrt(_one_less_exp(count * log_beta2))
        step_size = lr * root_correction / _one_less_exp(count * log_beta1)
        floor = eps * root_correction
    # 4. The step, element by element.
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, SIZE, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < SIZE)[None, :]
        offset = row[:, None] * SIZE + column[None, :]
        g = _read(gradient, place[:, None] * SIZE + column[None, :], inside)
        w = _read_rows(weight, low, offset, inside)
        v = _read(first_moment, offset, inside)
        if second_moment is None:
            v = v * beta1 + g + along_row[:, None] * w
            w -= lr * v
        else:
            g += along_row[:, None] * w
            v += rest1 * (g - v)
            s = _read(second_moment, offset, inside)
            s = s * beta2 + rest2 * (g * g)
            w = w * (1 - lr * weight_decay) - step_size[:, None] * (v / (tl.sqrt(s) + floor[:, None]))
            _write(second_moment, offset, inside, s, keys, multipliers, begin, 2, SIZE, BLOCK)
        _write(first_moment, offset, inside, v, keys, multipliers, begin, 1, SIZE, BLOCK)
        if low is not None:
            bits = w.to(tl.int32, bitcast=True)
            tl.store(low + offset, bits.to(tl.int16), mask=inside)
            # The lower half is signed, so the upper one is rounded to the nearest, ties upwards.
            tl.store(weight + offset, tl.where(w == w, (bits + 0x8000) >> 16, _NAN).to(tl.int16), mask=inside)
        else:
            w = _write(weight, offset, inside, w, keys, multipliers, begin, 0, SIZE, BLOCK)
        squares += tl.where(inside, w * w, 0.0)
    # 5. The inverse norm.
    norm = tl.sqrt(tl.sum(squares, 1))
    # `tl.maximum` would hide a NaN.
    norm = tl.where(norm < _SMALLEST_NORM, _SMALLEST_NORM, norm)
    tl.store(inverse_norm + row, 1 / norm, mask=here)


@triton.jit
def _read(storage, offset, inside):
    """Return numbers of a tile as float32."""
    values = tl.load(storage + offset, mask=inside, other=0)
    if values.dtype == tl.int16:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _read_rows(weight, low, offset, inside):
    """Return w as float32: of the format `split`, the sum of both halves as integers."""
    values = _read(weight, offset, inside)
    if low is not None:
        lower = tl.load(low + offset, mask=inside, other=0).to(tl.int32)
        values = (values.to(tl.int32, bitcast=True) + lower).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _write(
    storage, offset, inside, values, keys, multipliers, begin,
    STREAM: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store values, with `multipliers` rounded as `stochastic_rounding.Noise` does, and return them as stored."""
    if multipliers is not None:
        group = begin // 4 + tl.arange(0, BLOCK // 4)
        factors = tl.load(multipliers + group + STREAM, mask=group < (SIZE + 3) // 4, other=0)
        words = keys[:, None] * factors[None, :]
        words += words >> 32
        words = (words[:, :, None] >> (16 * tl.arange(0, 4))[None, None, :]) & 0xFFFF
        noise = tl.reshape(words.to(tl.int32), values.shape)
        # A NaN whose bits are all ones would become a zero.
        upper = tl.where(values == values, (values.to(tl.int32, bitcast=True) + noise) >> 16, _NAN)
        tl.store(storage + offset, upper.to(tl.int16), mask=inside)
        values = (upper << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(storage + offset, values, mask=inside)
    return values


@triton.jit
def _fmix64(keys):
    """Hash int64 numbers by MurmurHash3's finaliser (`randomness.MURMUR3_MULTIPLIERS`)."""
    keys ^= (keys >> 33) & 0x7FFFFFFF
    keys *= _FIRST_MULTIPLIER
    keys ^= (keys >> 33) & 0x7FFFFFFF
    keys *= _SECOND_MULTIPLIER
    return keys ^ ((keys >> 33) & 0x7FFFFFFF)


@triton.jit
def _one_less_exp(y):
    """Return 1 - exp(y) for y < 0; near 0 by a Taylor series, where the difference would lose its digits."""
    y = tl.maximum(y, -100.0)
    series = 1 + y / 9
    for divisor in tl.static_range(8, 1, -1):
        series = 1 + y / divisor * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))
