"""Update of some rows by one Triton kernel, registered with PyTorch as the operator `recognition::update_rows`.

On a GPU, an update in PyTorch passes a dozen times over what the kernel reads and writes once. The kernel itself is in
`update_kernel`, which is imported at the first launch, since Triton need not be installed.
"""

import math

import torch
from torch import Tensor

from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.class_weights.step import RowStep
from recognition.head.class_weights.stochastic_rounding import word_multipliers
from recognition.randomness import as_signed

_COLUMNS = 512
_TILE = 1024
"""Elements of a tile: 8 per thread of 4 warps, few enough registers for several blocks at a time, which hide the
latency of memory."""


def update(
    rows: WeightShard, part: RowSelection, gradient: RowGradient | Tensor, moments: list[Tensor], step: RowStep
) -> None:
    """Update `part` of the rows and their `moments` [r, D] (SGD: momentum; AdamW: both averages) in place.

    `gradient`: in factors, or dense [n, D], float32 or bfloat16. The bias and the counter are left to the caller.
    Raises ValueError where a matrix is not contiguous.
    """
    radial, remove_radial = None, False
    if isinstance(gradient, RowGradient):
        radial, remove_radial = gradient.radial, gradient.inverse_norm is not None
        gradient = gradient.product()
    size, device = rows.weight.shape[1], rows.weight.device
    update_rows(
        weight=rows.weight,
        low=rows.low,
        inverse_norm=rows.inverse_norm,
        first_moment=moments[0],
        second_moment=moments[1] if len(moments) > 1 else None,
        gradient=gradient,
        radial=radial,
        positions=part if isinstance(part, Tensor) else None,
        counts=step.counts,
        multipliers=word_multipliers(size, device) if rows.row_format == "bfloat16" else None,
        skip=step.skip,
        remove_radial=remove_radial,
        start=0 if isinstance(part, Tensor) else part.indices(len(rows))[0],
        salt=as_signed((rows.first + step.rounding.salt) % (1 << 64)),
        lr=step.lr,
        weight_decay=step.weight_decay,
        beta1=step.betas[0],
        beta2=step.betas[1],
        eps=step.eps,
    )


@torch.library.custom_op(
    "recognition::update_rows", mutates_args=("weight", "low", "inverse_norm", "first_moment", "second_moment")
)
def update_rows(
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    first_moment: Tensor,
    second_moment: Tensor | None,
    gradient: Tensor,
    radial: Tensor | None,
    positions: Tensor | None,
    counts: Tensor | None,
    multipliers: Tensor | None,
    skip: Tensor,
    remove_radial: bool,
    start: int,
    salt: int,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Launch `update_kernel`, which describes the arguments. All matrices have to be contiguous."""
    import triton

    from recognition.head.class_weights.update_kernel import update_kernel

    selected, size = gradient.shape
    if selected == 0:
        return
    matrices = (weight, low, first_moment, second_moment, gradient, radial, positions, counts)
    if not all(matrix is None or matrix.is_contiguous() for matrix in matrices):
        raise ValueError("rows, moments and gradients have to be contiguous")
    block = min(max(16, triton.next_power_of_2(size)), _COLUMNS)
    height = _TILE // block
    update_kernel[(triton.cdiv(selected, height),)](
        _bits(weight),
        low,
        inverse_norm,
        _bits(first_moment),
        None if second_moment is None else _bits(second_moment),
        _bits(gradient),
        radial,
        positions,
        counts,
        multipliers,
        skip,
        selected,
        start,
        salt,
        lr,
        weight_decay,
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
def _(*arguments: object, **named: object) -> None:
    return


def _log(beta: float) -> float:
    return math.log(max(beta, 1e-30))


def _bits(tensor: Tensor) -> Tensor:
    """Return a bfloat16 tensor as the int16 numbers of its bits, others as they are."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
