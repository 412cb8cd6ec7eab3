"""The update of some rows by one Triton kernel, `row_update`, which this file registers with PyTorch and launches.

On a GPU, an update in PyTorch passes a dozen times over what the kernel reads and writes once. The random bits of the
format `bfloat16` are the same.
"""

import math

import torch
from torch import Tensor

from recognition.head.class_weights.shard import Part, WeightShard, multipliers, salt

_COLUMNS = 512
_NUMBERS = 1024
"""Of a tile: 8 to a thread of 4 warps, which leaves registers for enough blocks at a time to hide the memory behind."""


def update(
    rows: WeightShard,
    part: Part,
    gradient: Tensor,
    radial: Tensor | None,
    remove_radial: bool,
    moments: list[Tensor],
    updates: Tensor | None,
    skip: Tensor,
    *,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
    step: int,
    purpose: int,
) -> None:
    """Move `part` of `rows` by `gradient` [n, D], float32 or bfloat16, less diag(along) w, `radial` [n] float32; or,
    with `remove_radial`, less what of it is along w.

    `moments` [r, D]: of SGD the momentum, whose factor is betas[0]; of AdamW the two averages, with `updates` [n]
    int32, this one counted. `skip`: float32 scalar; where it is 1, nothing changes, and the host does not look.
    `seed`, `step` and `purpose` key the rounding, as in `WeightShard.noise`.
    """
    start, positions = (0, part) if isinstance(part, Tensor) else (part.indices(len(rows))[0], None)
    random = rows.state == "bfloat16"
    # Numbers wrap around at 64 bits.
    key = (rows.first + salt(seed, step, purpose) + (1 << 63)) % (1 << 64) - (1 << 63)
    update_rows(
        rows.weight,
        rows.low,
        rows.inverse_norm,
        moments[0],
        moments[1] if len(moments) > 1 else None,
        gradient,
        radial,
        positions,
        updates,
        multipliers(rows.weight.shape[1], rows.weight.device) if random else None,
        skip,
        remove_radial,
        start,
        key,
        [lr, decay, *betas, eps],
    )


@torch.library.custom_op("recognition::update_rows", mutates_args=("weight", "low", "inverse_norm", "first", "second"))
def update_rows(
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    first: Tensor,
    second: Tensor | None,
    gradient: Tensor,
    radial: Tensor | None,
    positions: Tensor | None,
    updates: Tensor | None,
    multipliers: Tensor | None,
    skip: Tensor,
    remove_radial: bool,
    start: int,
    salt: int,
    numbers: list[float],
) -> None:
    """`row_update.update_kernel`; `numbers`: rate, decay, both betas, epsilon. All matrices are contiguous."""
    import triton

    from recognition.head.class_weights.update_kernel import update_kernel

    count, size = gradient.shape
    if count == 0:
        return
    stored = [each for each in (weight, low, first, second, gradient, radial, positions, updates) if each is not None]
    if not all(each.is_contiguous() for each in stored):
        raise ValueError("rows, moments and gradients are to be contiguous")
    lr, decay, beta1, beta2, eps = numbers
    block = min(max(16, triton.next_power_of_2(size)), _COLUMNS)
    height = _NUMBERS // block
    update_kernel[(triton.cdiv(count, height),)](
        _bits(weight),
        low,
        inverse_norm,
        _bits(first),
        None if second is None else _bits(second),
        _bits(gradient),
        radial,
        positions,
        updates,
        multipliers,
        skip,
        count,
        start,
        salt,
        lr,
        decay,
        beta1,
        1 - beta1,
        _log(beta1),
        beta2,
        1 - beta2,
        _log(beta2),
        eps,
        REMOVE_RADIAL=remove_radial,
        SIZE=size,
        ROWS=height,
        BLOCK=block,
        num_warps=4,
        # PyTorch rounds after each operation; memory is what the kernel waits for, so doing the same costs nothing.
        enable_fp_fusion=False,
    )


@update_rows.register_fake
def _(*arguments: object) -> None:
    return


def _log(beta: float) -> float:
    return math.log(max(beta, 1e-30))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
