"""The Triton kernel that moves rows: what `WeightShard` and `RowOptimizer` do to some rows, in one pass over them.

bfloat16 numbers come as the int16 numbers of their bits, and are read and rounded in integers: `rows` says how.
Offsets into the rows are 64-bit: 4.2 million rows of 512 numbers are 2^31.
"""

import triton
import triton.language as tl

# The finaliser of MurmurHash3 (Appleby), as in `rows.Noise`.
_FIRST = tl.constexpr(0xFF51AFD7ED558CCD - (1 << 64))
_SECOND = tl.constexpr(0xC4CEB9FE1A85EC53 - (1 << 64))
_NAN = tl.constexpr(0x7FC0)
_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["count", "start", "salt"])
def update_kernel(
    weight,  # [r, SIZE]: float32, or bfloat16 as int16
    low,  # [r, SIZE] int16, or None: of the format `split`
    inverse_norm,  # [r]
    first,  # [r, SIZE]: the momentum or the mean of the gradients; float32, or bfloat16 as int16
    second,  # [r, SIZE]: the mean of their squares; None makes it SGD
    gradient,  # [count, SIZE]: float32, or bfloat16 as int16
    radial,  # [count] float32: the gradient is `gradient` - diag(along) w; None: 0, or with PROJECTED orthogonal to w
    positions,  # [count] int64: which rows; None for those from `start` on
    updates,  # [count] int32, AdamW alone: this one counted
    multipliers,  # [at least SIZE / 4 + 3] int64, of the format `bfloat16`; else None
    skip,  # scalar float32: where it is 1, nothing changes
    count,
    start,
    salt,
    lr,
    decay,
    beta1,
    rest1,  # 1 - beta1
    log_beta1,
    beta2,
    rest2,
    log_beta2,
    eps,
    REMOVE_RADIAL: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows, BLOCK columns at a time. SGD's momentum is `beta1`; of the rest it needs `lr` and `decay` alone."""
    if tl.load(skip) != 0:
        return
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = place < count
    row = place + start
    if positions is not None:
        row = tl.load(positions + place, mask=here, other=0)
    keys = _mixed(row + salt)
    pull = tl.zeros([ROWS], tl.float32)
    if radial is not None:
        pull -= tl.load(radial + place, mask=here, other=0.0)
    if REMOVE_RADIAL:
        product = tl.zeros([ROWS, BLOCK], tl.float32)
        square = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, SIZE, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = here[:, None] & (column < SIZE)[None, :]
            w = _read_rows(weight, low, row[:, None] * SIZE + column[None, :], inside)
            product += _read(gradient, place[:, None] * SIZE + column[None, :], inside) * w
            square += w * w
        pull -= tl.sum(product, 1) / tl.maximum(tl.sum(square, 1), _SMALLEST_NORM * _SMALLEST_NORM)
    if second is None:
        pull += decay
    else:
        known = tl.load(updates + place, mask=here, other=1).to(tl.float32)
        square_known = tl.sqrt(_one_less_exp(known * log_beta2))
        rate = lr * square_known / _one_less_exp(known * log_beta1)
        floor = eps * square_known
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, SIZE, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = here[:, None] & (column < SIZE)[None, :]
        offset = row[:, None] * SIZE + column[None, :]
        g = _read(gradient, place[:, None] * SIZE + column[None, :], inside)
        w = _read_rows(weight, low, offset, inside)
        v = _read(first, offset, inside)
        if second is None:
            v = v * beta1 + g + pull[:, None] * w
            w -= lr * v
        else:
            g += pull[:, None] * w
            v += rest1 * (g - v)
            u = _read(second, offset, inside)
            u = u * beta2 + rest2 * (g * g)
            w = w * (1 - lr * decay) - rate[:, None] * (v / (tl.sqrt(u) + floor[:, None]))
            _write(second, offset, inside, u, keys, multipliers, begin, 2, SIZE, BLOCK)
        _write(first, offset, inside, v, keys, multipliers, begin, 1, SIZE, BLOCK)
        if low is not None:
            bits = w.to(tl.int32, bitcast=True)
            tl.store(low + offset, bits.to(tl.int16), mask=inside)
            # The lower half is signed, so the upper one is rounded to the nearest, ties upwards.
            tl.store(weight + offset, tl.where(w == w, (bits + 0x8000) >> 16, _NAN).to(tl.int16), mask=inside)
        else:
            w = _write(weight, offset, inside, w, keys, multipliers, begin, 0, SIZE, BLOCK)
        squares += tl.where(inside, w * w, 0.0)
    norm = tl.sqrt(tl.sum(squares, 1))
    # `tl.maximum` would hide a NaN.
    norm = tl.where(norm < _SMALLEST_NORM, _SMALLEST_NORM, norm)
    tl.store(inverse_norm + row, 1 / norm, mask=here)


@triton.jit
def _read(storage, offset, inside):
    """Numbers as float32."""
    values = tl.load(storage + offset, mask=inside, other=0)
    if values.dtype == tl.int16:
        values = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit
def _read_rows(weight, low, offset, inside):
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
    """Store the numbers, rounded as `rows.Noise` does with `multipliers`, and return them as they are stored."""
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
def _mixed(keys):
    keys ^= (keys >> 33) & 0x7FFFFFFF
    keys *= _FIRST
    keys ^= (keys >> 33) & 0x7FFFFFFF
    keys *= _SECOND
    return keys ^ ((keys >> 33) & 0x7FFFFFFF)


@triton.jit
def _one_less_exp(y):
    """1 - exp(y) for y < 0, with all digits where y is small: a Taylor series there."""
    y = tl.maximum(y, -100.0)
    series = 1 + y / 9
    for divisor in tl.static_range(8, 1, -1):
        series = 1 + y / divisor * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))
