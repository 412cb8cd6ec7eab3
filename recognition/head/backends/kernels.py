"""Triton kernels that go over the class weights: tiles of logits that live in registers and are never written out.

Names and formulas are those of `chunks`, which says the same in PyTorch and is what these are tested against. Rows are
read raw, in the type they are kept in, and their inverse norms scale the columns of a tile: no normalised copy exists.
Offsets into the rows are 64-bit: 4.2 million rows of 512 numbers are 2^31.
"""

import triton
import triton.language as tl

# Which `negatives` bend the cosines.
AFFINE = tl.constexpr(0)
CURRICULAR = tl.constexpr(1)
MV_SOFTMAX = tl.constexpr(2)
CIRCLE = tl.constexpr(3)
SPHEREFACE_R = tl.constexpr(4)
SPHEREFACE2 = tl.constexpr(5)

# What becomes of cosines beyond the threshold.
REMOVED = tl.constexpr(1)
ZEROED = tl.constexpr(2)

_TINY = tl.constexpr(1.1754943508222875e-38)
_EDGE = tl.constexpr(1 - 2.0**-23)


@triton.jit
def negative_sums_kernel(
    x,  # [batch, SIZE]
    weight,  # [r, SIZE]
    low,  # [r, SIZE] int16: the lower halves of rows that are kept split, where products are of whole ones; or None
    inverse_norm,  # [r]
    bias,  # [r], with `not UNIT`
    classes,  # [count], with GATHER: positions of the classes
    columns,  # [batch]: the target's place, or -1
    hard_boundary,  # [batch], with ANCHOR
    scale_and_bias,  # [2]: the bent logits' factor and addend
    sums,  # out: [splits, 2 if LOGISTIC else 1, batch]
    shifts,  # out: [splits, batch], with RUNNING
    cached_exp,  # out: [batch, count], exp of the shifted logits times the inverse norms, 0 for targets; or None
    batch,
    count,
    tiles_per_split,
    scale,
    margin,
    exponent,
    threshold,
    offset,
    KIND: tl.constexpr,
    FILTER: tl.constexpr,
    LOGISTIC: tl.constexpr,
    RUNNING: tl.constexpr,
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
    HARD_BOUNDARY: tl.constexpr,
    CENTERS: tl.constexpr,
    UPCAST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """This split's sums over its negatives, for a block of samples."""
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    here = sample < batch
    column = tl.load(columns + sample, mask=here, other=-1)
    factor, addend = tl.load(scale_and_bias), tl.load(scale_and_bias + 1)
    boundary = _hard_boundaries(hard_boundary, sample, here, HARD_BOUNDARY)
    total = tl.zeros([BLOCK_B], tl.float32)
    sigmoid_sum = tl.zeros([BLOCK_B], tl.float32)
    max_logit = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        cosine, _ = _products(
            x, weight, low, inverse_norm, bias, classes, sample, here, place, count, 0,
            UNIT, GATHER, CENTERS, UPCAST, SIZE, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        z, _ = _negative_logit(cosine, boundary, factor, addend, scale, margin, exponent, threshold, KIND, FILTER)
        wanted = (place < count)[None, :] & (place[None, :] != column[:, None])
        z = tl.where(wanted, z, float("-inf"))
        if LOGISTIC:
            total += tl.sum(_softplus(z), 1)
            sigmoid_sum += tl.sum(_sigmoid(z), 1)
        elif RUNNING:
            higher = tl.maximum(max_logit, tl.max(z, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(max_logit - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
            max_logit = higher
        else:
            e = tl.exp(z - offset)
            total += tl.sum(e, 1)
            if cached_exp is not None:
                position = _positions(classes, place, count, 0, GATHER)
                e *= tl.load(inverse_norm + position, mask=place < count, other=0.0)[None, :]
                where = sample.to(tl.int64)[:, None] * count + place[None, :]
                tl.store(
                    cached_exp + where, e.to(cached_exp.dtype.element_ty), mask=here[:, None] & (place < count)[None, :]
                )
    if LOGISTIC:
        tl.store(sums + split * 2 * batch + sample, total, mask=here)
        tl.store(sums + (split * 2 + 1) * batch + sample, sigmoid_sum, mask=here)
    else:
        tl.store(sums + split * batch + sample, total, mask=here)
    if RUNNING:
        tl.store(shifts + split * batch + sample, max_logit, mask=here)


@triton.jit
def logit_gradient_kernel(
    x,  # [batch, SIZE]
    weight,  # [r, SIZE]
    low,  # likewise
    inverse_norm,  # [r]
    bias,  # [r], with `not UNIT`
    classes,  # [count], with GATHER: positions of the classes
    columns,  # [batch]: the target's place among these classes
    hard_boundary,  # [batch], with ANCHOR
    scale_and_bias,  # [2]
    lse,  # [batch]
    grad_lse,  # [batch]
    target,  # [batch]
    grad_target,  # [batch]
    e,  # out: [batch, count CENTERS], the gradient by x_i . w_j
    row_sums,  # out: [blocks of samples, count CENTERS]
    batch,
    count,
    first,  # position of the first class, without GATHER
    scale,
    margin,
    exponent,
    threshold,
    KIND: tl.constexpr,
    FILTER: tl.constexpr,
    LOGISTIC: tl.constexpr,
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
    HARD_BOUNDARY: tl.constexpr,
    CENTERS: tl.constexpr,
    UPCAST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of the loss by a tile of products, and its sums over the samples: weighted by the products and
    twice by the inverse norms, or bare for the bias.
    """
    block = tl.program_id(0)
    sample = block * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = sample < batch
    column = tl.load(columns + sample, mask=here, other=-1)
    boundary = _hard_boundaries(hard_boundary, sample, here, HARD_BOUNDARY)
    cosine, nearest = _products(
        x, weight, low, inverse_norm, bias, classes, sample, here, place, count, first,
        UNIT, GATHER, CENTERS, UPCAST, SIZE, BLOCK_B, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    z, derivative = _negative_logit(
        cosine,
        boundary,
        tl.load(scale_and_bias),
        tl.load(scale_and_bias + 1),
        scale,
        margin,
        exponent,
        threshold,
        KIND,
        FILTER,
    )
    own = place[None, :] == column[:, None]
    inside = (place < count)[None, :] & here[:, None]
    z = tl.where(inside & (own == 0), z, float("-inf"))
    if LOGISTIC:  # noqa: SIM108, of two constants one is compiled
        a = _sigmoid(z)
    else:
        a = tl.exp(z - tl.load(lse + sample, mask=here, other=0.0)[:, None])
    a *= derivative * tl.load(grad_lse + sample, mask=here, other=0.0)[:, None]
    a = tl.where(own & inside, tl.load(grad_target + sample, mask=here, other=0.0)[:, None], a)
    if CENTERS == 1:
        # The target's product is known more exactly than this tile has it.
        cosine = tl.where(own, tl.load(target + sample, mask=here, other=0.0)[:, None], cosine)
    positions = _positions(classes, place, count, first, GATHER)
    width = count * CENTERS
    for center in tl.static_range(CENTERS):
        share = a
        if CENTERS > 1:
            share = tl.where(nearest == center, a, 0.0)
        summed = share
        if UNIT:
            inverse = tl.load(inverse_norm + positions * CENTERS + center, mask=place < count, other=0.0)
            summed = share * cosine * (inverse * inverse)[None, :]
            share *= inverse[None, :]
        row = place * CENTERS + center
        tl.store(row_sums + block.to(tl.int64) * width + row, tl.sum(summed, 0), mask=place < count)
        tl.store(e + sample.to(tl.int64)[:, None] * width + row[None, :], share.to(e.dtype.element_ty), mask=inside)


@triton.jit
def _positions(classes, place, count, first, GATHER: tl.constexpr):
    """Where the classes in these places are among the rank's, int64."""
    if GATHER:
        return tl.load(classes + place, mask=place < count, other=0).to(tl.int64)
    return place.to(tl.int64) + first


@triton.jit
def _hard_boundaries(hard_boundary, sample, here, HARD_BOUNDARY: tl.constexpr):
    """What each sample's negatives are held against."""
    boundary = tl.zeros(sample.shape, tl.float32)
    if HARD_BOUNDARY:
        boundary = tl.load(hard_boundary + sample, mask=here, other=0.0)
    return boundary


@triton.jit
def _products(
    x, weight, low, inverse_norm, bias, classes, sample, here, place, count, first,
    UNIT: tl.constexpr, GATHER: tl.constexpr, CENTERS: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of samples and classes [BLOCK_B, BLOCK_N], the largest over a class's centres, and which that is."""
    positions = _positions(classes, place, count, first, GATHER)
    best = tl.full([BLOCK_B, BLOCK_N], float("-inf"), tl.float32)
    nearest = tl.zeros([BLOCK_B, BLOCK_N], tl.int32)
    for center in tl.static_range(CENTERS):
        row = positions * CENTERS + center
        dots = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for start in range(0, SIZE, BLOCK_D):
            element = start + tl.arange(0, BLOCK_D)
            whole = element < SIZE
            left = tl.load(
                x + sample.to(tl.int64)[:, None] * SIZE + element[None, :],
                mask=here[:, None] & whole[None, :],
                other=0.0,
            )
            inside = (place < count)[None, :] & whole[:, None]
            offset = row[None, :] * SIZE + element[:, None]
            right = tl.load(weight + offset, mask=inside, other=0.0)
            if low is not None:
                bits = right.to(tl.float32).to(tl.int32, bitcast=True)
                bits += tl.load(low + offset, mask=inside, other=0).to(tl.int32)
                right = bits.to(tl.float32, bitcast=True)
            if UPCAST:
                dots = tl.dot(left.to(tl.float32), right.to(tl.float32), dots, input_precision="ieee")
            else:
                dots = tl.dot(left, right.to(left.dtype), dots)
        if UNIT:
            dots *= tl.load(inverse_norm + row, mask=place < count, other=0.0)[None, :]
        else:
            dots += tl.load(bias + row, mask=place < count, other=0.0)[None, :]
        nearest = tl.where(dots > best, center, nearest)
        best = tl.maximum(dots, best)
    return best, nearest


@triton.jit
def _negative_logit(
    cosine, boundary, factor, addend, scale, margin, exponent, threshold, KIND: tl.constexpr, FILTER: tl.constexpr
):
    """The logits that `negatives` make of cosines, and their slopes."""
    near = cosine > threshold
    if FILTER == ZEROED:
        cosine = tl.where(near, 0.0, cosine)
    beyond = cosine > boundary[:, None]
    if KIND == CURRICULAR:
        z = scale * tl.where(beyond, cosine * (factor + cosine), cosine)
        derivative = scale * tl.where(beyond, factor + 2 * cosine, 1.0)
    elif KIND == MV_SOFTMAX:
        z = scale * tl.where(beyond, margin * cosine + (margin - 1), cosine)
        derivative = scale * tl.where(beyond, margin, 1.0)
    elif KIND == CIRCLE:
        derivative = scale * tl.maximum(cosine + margin, 0.0)
        z = derivative * (cosine - margin)
    elif KIND == SPHEREFACE_R:
        edged = tl.minimum(tl.maximum(cosine, -_EDGE), _EDGE)
        angle = _arccosine(edged) / margin
        sine, cosine_of_half = _half_angle(angle / 2)
        z = scale * (1 - 2 * sine * sine)
        derivative = scale / margin * (2 * sine * cosine_of_half) / tl.sqrt((1 - edged) * (1 + edged))
    elif KIND == SPHEREFACE2:
        half = tl.maximum((cosine + 1) / 2, _TINY)
        power = tl.exp2((exponent - 1) * tl.log2(half))
        z = scale * (2 * half * power - 1 + margin) + addend
        derivative = scale * exponent * power
    else:
        z = cosine * factor + addend
        derivative = tl.zeros_like(cosine) + factor
    if FILTER == REMOVED:
        z = tl.where(near, float("-inf"), z)
    if FILTER != 0:
        derivative = tl.where(near, 0.0, derivative)
    return z, derivative


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), to a few units in the last place also where it is tiny."""
    e = tl.exp(-tl.abs(z))
    series = e * (1 - e * (0.5 - e * (1 / 3 - e * (0.25 - e * (0.2 - e / 6)))))
    return tl.maximum(z, 0.0) + tl.where(e < 0.0625, series, tl.log(1 + e))


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1 + e)


@triton.jit
def _arccosine(c):
    """To 2e-8: Abramowitz and Stegun 1964, 4.4.46, since Triton's interpreter has no arc cosine."""
    u = tl.abs(c)
    p = 0.0066700901 - 0.0012624911 * u
    p = 0.0308918810 + u * (-0.0170881256 + u * p)
    p = 0.0889789874 + u * (-0.0501743046 + u * p)
    p = 1.5707963050 + u * (-0.2145988016 + u * p)
    root = p * tl.sqrt(1 - u)
    return tl.where(c < 0, 3.141592653589793 - root, root)


@triton.jit
def _half_angle(u):
    """Sine and cosine for 0 <= u <= pi / 2: Taylor series. `tl.sin` keeps a table in memory for angles of any size."""
    square = u * u
    sine = 1 / 120 + square * (-1 / 5040 + square * (1 / 362880 - square / 39916800))
    sine = u * (1 + square * (-1 / 6 + square * sine))
    cosine = -1 / 720 + square * (1 / 40320 - square * (1 / 3628800 - square / 479001600))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * cosine))
    return sine, cosine
