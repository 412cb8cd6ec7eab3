"""Triton kernels over the class weights, whose tiles of logits live in registers and are never written to memory.

The symbols are those of `problem`. `pytorch` has the PyTorch version, and the kernels are tested against it. A tile
is BLOCK_B samples times BLOCK_N classes. Rows are read in their storage type, and their inverse norms scale a tile's
columns: no normalised copy exists. Products become logits by `KIND`, the `kernel_code` of the loss's negatives.
Offsets into the rows are 64-bit: 4.2 million rows of 512 numbers are 2^31.
"""

import triton
import triton.language as tl


@triton.jit
def negative_sums_kernel(
    x,  # [batch, SIZE]
    weight,  # [r, SIZE]
    low,  # [r, SIZE] int16: lower halves of rows in the format `split`, for float32 products; else None
    inverse_norm,  # [r]
    bias,  # [r]; None: rows count by their direction alone
    classes,  # [count]: positions of the classes; None: those from 0 on
    columns,  # [batch]: the target's place among them, or -1
    hard_boundary,  # [batch], or None
    fields,  # [4]: the fields of KIND's class, and zeros
    threshold,  # cosines beyond it are filtered; None: there is no filter
    sums,  # out: [splits, 2 if LOGISTIC else 1, batch]
    max_logits,  # out: [splits, batch], without `offset`
    cached_exp,  # out: [batch, count], exp of the shifted logits times the inverse norms, 0 for targets; or None
    batch,
    count,
    tiles_per_split,
    offset,  # subtracted from each logit before exp; None: the largest so far
    KIND: tl.constexpr,
    ZERO_FILTERED: tl.constexpr,
    LOGISTIC: tl.constexpr,
    CENTERS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over one split's negatives j, for a block of samples i.

    1. Products p_ij, and from them logits z_ij; those of targets and beyond the last class become -inf, whose exp is 0.
    2. Softmax: s = sum over j of exp(z_ij - m), one tile after the other. With bounded logits m is the fixed `offset`.
       Otherwise m is the largest logit so far, and grows (online softmax, Milakov and Gimelshein 2018,
       arXiv 1805.02867): a tile whose largest logit makes m' of m takes s to

           s' = s exp(m - m') + sum over the tile of exp(z_ij - m'),

       since exp(z - m) exp(m - m') = exp(z - m'). The splits' pairs (s, m) are joined by the same rule afterwards.
    3. Logistic loss: the sums of log(1 + exp(z_ij)) and of its derivative, sigmoid(z_ij).
    4. Where it is wanted, E_ij = exp(z_ij - offset) / |w_j|, from which the backward pass takes its gradient.
    """
    sample = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    here = sample < batch
    column = tl.load(columns + sample, mask=here, other=-1)
    boundary = _hard_boundaries(hard_boundary, sample, here)
    values = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    total = tl.zeros([BLOCK_B], tl.float32)
    sigmoid_sum = tl.zeros([BLOCK_B], tl.float32)
    max_logit = tl.full([BLOCK_B], float("-inf"), tl.float32)
    for tile in range(split * tiles_per_split, (split + 1) * tiles_per_split):
        place = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        product, _ = _products(
            x, weight, low, inverse_norm, bias, classes, sample, here, place, count, 0,
            CENTERS, SIZE, BLOCK_B, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        z, _ = _logits(product, boundary, values, threshold, KIND, ZERO_FILTERED)
        wanted = (place < count)[None, :] & (place[None, :] != column[:, None])
        z = tl.where(wanted, z, float("-inf"))
        if LOGISTIC:
            total += tl.sum(_softplus(z), 1)
            sigmoid_sum += tl.sum(_sigmoid(z), 1)
        elif offset is None:
            higher = tl.maximum(max_logit, tl.max(z, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(max_logit - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
            max_logit = higher
        else:
            e = tl.exp(z - offset)
            total += tl.sum(e, 1)
            if cached_exp is not None:
                position = _positions(classes, place, count, 0)
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
        if offset is None:
            tl.store(max_logits + split * batch + sample, max_logit, mask=here)


@triton.jit
def logit_gradient_kernel(
    x,  # [batch, SIZE]
    weight,  # [r, SIZE]
    low,  # [r, SIZE] int16, as in negative_sums_kernel; or None
    inverse_norm,  # [r]
    bias,  # [r]; None: rows count by their direction alone
    classes,  # [count]: positions of the classes; None: those from `first` on
    columns,  # [batch]: the target's place among these classes; anything else is none of them
    hard_boundary,  # [batch], or None
    fields,  # [4]: the fields of KIND's class, and zeros
    threshold,  # cosines beyond it are filtered; None: there is no filter
    lse,  # [batch]
    grad_lse,  # [batch]
    target,  # [batch]
    grad_target,  # [batch]
    grad_dots,  # out: [batch, count CENTERS], the gradient by x_i . w_jk
    row_sums,  # out: [blocks of samples, count CENTERS]
    batch,
    count,
    first,
    KIND: tl.constexpr,
    ZERO_FILTERED: tl.constexpr,
    LOGISTIC: tl.constexpr,
    CENTERS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the gradient of the loss L by one tile of products, and its sums for the rows' norms or bias.

    1. Products p_ij and logits z_ij are computed anew, as in the forward pass.
    2. L depends on z_ij through lse_i = log(sum over j of exp(z_ij)), so dL/dz_ij = grad_lse_i exp(z_ij - lse_i): its
       share of the softmax over the negatives. A logistic loss depends on the sum of log(1 + exp(z_ij)), whose
       derivative is sigmoid(z_ij).
    3. a_ij = dL/dp_ij = dL/dz_ij dz_ij/dp_ij; of the target, a_ij = grad_target_i.
    4. A class's product is that of its nearest centre k, the only one that gets a_ij; the other centres get 0.
    5. With p_ij = x_i . w / |w| of that row w, dL/d(x_i . w) = a_ij / |w|: `grad_dots` g. Matrix products make of it
       dL/dx = g w and, but for the norms, dL/dw = g^T x.
    6. |w| depends on w as well: dp_ij/dw = (x_i - p_ij w / |w|) / |w|, which is x_i / |w| without its part along w. So
       dL/dw = (g^T x) - r w with r = sum over i of a_ij p_ij / |w|^2: `row_sums`, one for each block of samples. With a
       bias, where rows are not normalised, `row_sums` is the gradient by it, sum over i of a_ij.
    """
    block = tl.program_id(0)
    sample = block * BLOCK_B + tl.arange(0, BLOCK_B)
    place = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = sample < batch
    column = tl.load(columns + sample, mask=here, other=-1)
    boundary = _hard_boundaries(hard_boundary, sample, here)
    product, nearest = _products(
        x, weight, low, inverse_norm, bias, classes, sample, here, place, count, first,
        CENTERS, SIZE, BLOCK_B, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    values = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    z, derivative = _logits(product, boundary, values, threshold, KIND, ZERO_FILTERED)
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
        # The target's product was computed in float32, more exactly than in this tile.
        product = tl.where(own, tl.load(target + sample, mask=here, other=0.0)[:, None], product)
    positions = _positions(classes, place, count, first)
    width = count * CENTERS
    for center in tl.static_range(CENTERS):
        share = a
        if CENTERS > 1:
            share = tl.where(nearest == center, a, 0.0)
        summed = share
        if bias is None:
            inverse = tl.load(inverse_norm + positions * CENTERS + center, mask=place < count, other=0.0)
            summed = share * product * (inverse * inverse)[None, :]
            share *= inverse[None, :]
        row = place * CENTERS + center
        tl.store(row_sums + block.to(tl.int64) * width + row, tl.sum(summed, 0), mask=place < count)
        where = sample.to(tl.int64)[:, None] * width + row[None, :]
        tl.store(grad_dots + where, share.to(grad_dots.dtype.element_ty), mask=inside)


@triton.jit
def _positions(classes, place, count, first):
    """Return the positions, among the rank's classes, of the active classes at these positions, int64."""
    if classes is not None:
        return tl.load(classes + place, mask=place < count, other=0).to(tl.int64)
    return place.to(tl.int64) + first


@triton.jit
def _hard_boundaries(hard_boundary, sample, here):
    """Return each sample's boundary between easy and hard negatives."""
    boundary = tl.zeros(sample.shape, tl.float32)
    if hard_boundary is not None:
        boundary = tl.load(hard_boundary + sample, mask=here, other=0.0)
    return boundary


@triton.jit
def _products(
    x, weight, low, inverse_norm, bias, classes, sample, here, place, count, first,
    CENTERS: tl.constexpr, SIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return p_ij [BLOCK_B, BLOCK_N], the largest over a class's centres, and which centre that is."""
    positions = _positions(classes, place, count, first)
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
            if left.dtype == tl.float32:
                dots = tl.dot(left, right.to(tl.float32), dots, input_precision="ieee")
            else:
                dots = tl.dot(left, right.to(left.dtype), dots)
        if bias is None:
            dots *= tl.load(inverse_norm + row, mask=place < count, other=0.0)[None, :]
        else:
            dots += tl.load(bias + row, mask=place < count, other=0.0)[None, :]
        nearest = tl.where(dots > best, center, nearest)
        best = tl.maximum(dots, best)
    return best, nearest


@triton.jit
def _logits(cosine, boundary, fields, threshold, KIND: tl.constexpr, ZERO_FILTERED: tl.constexpr):
    """Return the logits of the negatives and their derivatives by the cosines, filtered as `FilteredNegatives` does."""
    if threshold is not None:
        near = cosine > threshold
        if ZERO_FILTERED:
            cosine = tl.where(near, 0.0, cosine)
    z, derivative = KIND(cosine, boundary, fields)
    if threshold is not None:
        if not ZERO_FILTERED:
            z = tl.where(near, float("-inf"), z)
        derivative = tl.where(near, 0.0, derivative)
    return z, derivative


@triton.jit
def _softplus(z):
    """Return log(1 + exp(z)), accurate to a few units in the last place even where it is tiny."""
    e = tl.exp(-tl.abs(z))
    series = e * (1 - e * (0.5 - e * (1 / 3 - e * (0.25 - e * (0.2 - e / 6)))))
    return tl.maximum(z, 0.0) + tl.where(e < 0.0625, series, tl.log(1 + e))


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1 + e)
