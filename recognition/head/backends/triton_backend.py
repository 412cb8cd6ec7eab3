"""`negative_sums` and `backward` of `chunks`, made of the Triton kernels: one pass each, and no logits in memory.

A chunk of the backward pass writes out the gradient by its products, in the products' type, and two matrix products
(cuBLAS) make of it the gradients by embeddings and by rows. Nothing here makes the host wait for the GPU.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from recognition.head.backends import kernels, tiles
from recognition.head.backends.problem import (
    ActiveClasses,
    LogitOptions,
    NegativeSums,
    NegativeTerm,
    OnEmbeddings,
    OnRows,
    finite_shift,
    multiply,
    rescaling,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import (
    AffineNegatives,
    CircleNegatives,
    CurricularNegatives,
    FilteredNegatives,
    MVSoftmaxNegatives,
    Negatives,
    SphereFace2Negatives,
    SphereFaceRNegatives,
)

_PROCESSORS = 128
"""Of a GPU whose number is not known; splits are made for twice as many blocks."""
_HEAVY = kernels.SPHEREFACE_R.value, kernels.SPHEREFACE2.value
"""Negatives that take many registers."""
_HELD_BACK = 2
"""Chunks whose rows' gradient waits until the one by the embeddings is on its way to the other ranks."""


@dataclass(frozen=True)
class _KernelArguments:
    """What the kernels have to know of `negatives`."""

    kind: int
    scale_and_bias: Tensor
    """[2] float32 on the device: what is multiplied with and added to; kept there, so that the host need not know."""
    scale: float = 1.0
    margin: float = 0.0
    exponent: float = 1.0
    threshold: float = 0.0
    filter: int = 0

    @staticmethod
    def of(negatives: Negatives, device: torch.device) -> "_KernelArguments":
        threshold, filtering = 0.0, 0
        if isinstance(negatives, FilteredNegatives):
            threshold = negatives.threshold
            filtering = (kernels.ZEROED if negatives.zero else kernels.REMOVED).value
            negatives = negatives.inner
        factor: Tensor | float = 1.0
        addend: Tensor | float = 0.0
        scale, margin, exponent = 1.0, 0.0, 1.0
        if isinstance(negatives, AffineNegatives):
            kind, factor, addend = kernels.AFFINE, negatives.scale, negatives.bias
        elif isinstance(negatives, CurricularNegatives):
            kind, scale, factor = kernels.CURRICULAR, negatives.scale, negatives.t
        elif isinstance(negatives, MVSoftmaxNegatives):
            kind, scale, margin = kernels.MV_SOFTMAX, negatives.scale, negatives.weight
        elif isinstance(negatives, CircleNegatives):
            kind, scale, margin = kernels.CIRCLE, negatives.scale, negatives.margin
        elif isinstance(negatives, SphereFaceRNegatives):
            kind, scale, margin = kernels.SPHEREFACE_R, negatives.scale, negatives.margin
        elif isinstance(negatives, SphereFace2Negatives):
            kind, scale, margin, exponent = kernels.SPHEREFACE2, negatives.scale, negatives.margin, negatives.exponent
            addend = negatives.bias
        else:
            raise NotImplementedError(f"no kernel for {type(negatives).__name__}")
        # A tensor made of a number on the host would be copied over, which waits.
        scale_and_bias = torch.stack([_scalar(factor, device), _scalar(addend, device)])
        return _KernelArguments(kind.value, scale_and_bias, scale, margin, exponent, threshold, filtering)


def negative_sums(
    rows: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions, negative_term: NegativeTerm
) -> NegativeSums:
    """As `chunks.negative_sums`."""
    bent = _KernelArguments.of(negative_term.negatives, x.device)
    running = not negative_term.logistic and negative_term.offset is None
    plain = isinstance(negative_term.negatives, AffineNegatives) and options.unit_rows and options.centers == 1
    numbers = len(x) * (len(rows) if active.classes is None else len(active.classes))
    fits = options.workspace is not None and 0 < numbers * x.itemsize <= options.workspace
    keep = plain and fits and not negative_term.logistic and not running
    sums, shift, cached_exp = sum_negatives(
        x,
        rows.weight,
        rows.low if x.dtype == torch.float32 else None,
        rows.inverse_norm,
        rows.bias,
        active.classes,
        active.columns,
        negative_term.hard_boundary,
        bent.scale_and_bias,
        [bent.scale, bent.margin, bent.exponent, bent.threshold, negative_term.offset or 0.0],
        [bent.kind, bent.filter, int(negative_term.logistic), int(running), options.centers, int(keep)],
    )
    return NegativeSums(sums, shift, cached_exp if keep else None)


def backward(
    rows: WeightShard,
    active: ActiveClasses,
    x: Tensor,
    options: LogitOptions,
    negative_term: NegativeTerm,
    lse: Tensor,
    grad_lse: Tensor,
    target: Tensor,
    grad_target: Tensor,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None = None,
    cached_exp: Tensor | None = None,
) -> Tensor:
    """As `chunks.backward`; from what `negative_sums` kept, where it did, one product is saved."""
    bent = _KernelArguments.of(negative_term.negatives, x.device)
    if options.workspace is not None:
        room = options.workspace // (1 + _HELD_BACK)
        chunk = tiles.chunk(_name(x), batch=len(x), embedding_size=x.shape[1], workspace=room, itemsize=x.itemsize)
        options = replace(options, chunk=max(1, chunk // options.centers))
    gradient = torch.zeros(x.shape, device=x.device)
    if cached_exp is not None:
        factor = grad_lse * bent.scale_and_bias[0] * torch.exp((negative_term.offset or 0.0) - lse)
        return _from_kept(rows, active, x, options, cached_exp, factor, grad_target, gradient, on_rows, on_embeddings)
    waiting: deque[tuple[RowSelection, RowGradient]] = deque()
    for start, count, part in active.parts(rows, options):
        e, summed = logit_gradient(
            x,
            rows.weight,
            rows.low if x.dtype == torch.float32 else None,
            rows.inverse_norm,
            rows.bias,
            None if active.classes is None else active.classes[start : start + count],
            active.columns - start,
            negative_term.hard_boundary,
            bent.scale_and_bias,
            lse,
            grad_lse,
            target,
            grad_target,
            start,
            count,
            [bent.scale, bent.margin, bent.exponent, bent.threshold],
            [bent.kind, bent.filter, int(negative_term.logistic), options.centers],
        )
        gradient += multiply(e, rows.operand(part, options.dtype))
        if on_rows is None:
            continue
        waiting.append((part, RowGradient(e, x, *((summed, None) if options.unit_rows else (None, summed)))))
        if len(waiting) > _HELD_BACK:
            on_rows(*waiting.popleft())
    if on_embeddings is not None:
        on_embeddings(gradient)
    while on_rows is not None and waiting:
        on_rows(*waiting.popleft())
    return gradient


def _from_kept(
    rows: WeightShard,
    active: ActiveClasses,
    x: Tensor,
    options: LogitOptions,
    cached_exp: Tensor,
    factor: Tensor,
    grad_target: Tensor,
    gradient: Tensor,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None,
) -> Tensor:
    """`backward` where `factor` [B] times `cached_exp` [B, n] is the gradient by the products of embeddings and
    raw rows."""
    here = active.columns >= 0
    columns = torch.where(here, active.columns, 0)
    positions = columns if active.classes is None else active.classes[columns]
    own = torch.where(factor == 0, 0, grad_target / factor) * rows.inverse_norm[positions]
    before = cached_exp.gather(1, columns[:, None])
    cached_exp.scatter_(1, columns[:, None], torch.where(here[:, None], own[:, None].to(cached_exp.dtype), before))
    parts = [(slice(start, start + count), part) for start, count, part in active.parts(rows, options)]
    for columns_of, part in parts:
        gradient += multiply(cached_exp[:, columns_of], rows.operand(part, options.dtype))
    gradient *= factor[:, None]
    if on_embeddings is not None:
        on_embeddings(gradient)
    weighted = (x * factor[:, None]).to(x.dtype)
    for columns_of, part in parts:
        if on_rows is not None:
            on_rows(part, RowGradient(cached_exp[:, columns_of], weighted, inverse_norm=rows.inverse_norm[part]))
    return gradient


@torch.library.custom_op("recognition::sum_negatives", mutates_args=())
def sum_negatives(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    columns: Tensor,
    hard_boundary: Tensor | None,
    scale_and_bias: Tensor,
    numbers: list[float],
    flags: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`NegativeSums` as tensors, differentiable by `x` [B, D]: sums [B, 1] (logistic: [B, 2]), shift [B], and kept
    [B, n] in the type of `x`, which is empty unless it is wanted.

    `numbers`: scale, margin, exponent, threshold, offset; `flags`: kind of the negatives, filter, logistic, running
    maximum, centres, keep; `low`: `WeightShard.low` where products are of float32. The rest is as in `chunks`; the
    second of
    two sums is a constant in the gradient.
    """
    scale, margin, exponent, threshold, offset = numbers
    bent, filtering, logistic, running, centers, keep = flags
    batch, size = x.shape
    count = len(weight) // centers if classes is None else len(classes)
    x, columns, hard_boundary, scale_and_bias = _dense(x, columns, hard_boundary, scale_and_bias)
    tile = _tile("statistics", x, weight, count, _work(bent, filtering, logistic, centers))
    blocks, wide = triton.cdiv(batch, tile.batch), triton.cdiv(count, tile.classes)
    splits = max(1, min(wide, triton.cdiv(2 * _processors(x.device), max(blocks, 1))))
    sums = x.new_zeros(splits, 1 + logistic, batch, dtype=torch.float32)
    cached_exp = x.new_empty(batch, count if keep else 0)
    shifts = x.new_full((splits, batch), -torch.inf if running else offset, dtype=torch.float32)
    if batch and count:
        kernels.negative_sums_kernel[(blocks, splits)](
            x, weight, low, inverse_norm, bias, classes, columns, hard_boundary, scale_and_bias, sums, shifts,
            cached_exp if keep else None,
            batch, count, triton.cdiv(wide, splits), scale, margin, exponent, threshold, offset,
            KIND=bent, FILTER=filtering, LOGISTIC=logistic, RUNNING=running, UNIT=bias is None,
            GATHER=classes is not None, HARD_BOUNDARY=hard_boundary is not None, CENTERS=centers, UPCAST=x.dtype ==
            torch.float32,
            SIZE=size, BLOCK_B=tile.batch, BLOCK_N=tile.classes, BLOCK_D=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if not running:
        return sums.sum(0).T.contiguous(), shifts[0].clone(), cached_exp
    shift = shifts.amax(0)
    return (sums[:, 0] * rescaling(shifts, shift)).sum(0)[:, None], shift, cached_exp


@sum_negatives.register_fake
def _(x, weight, low, inverse_norm, bias, classes, columns, hard_boundary, scale_and_bias, numbers, flags):  # type: ignore[no-untyped-def]
    count = len(weight) // flags[4] if classes is None else len(classes)
    sums = x.new_empty(len(x), 1 + flags[2], dtype=torch.float32)
    return sums, x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), count if flags[5] else 0)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.numbers, ctx.flags = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    x, weight, low, inverse_norm, bias, classes, columns, hard_boundary, scale_and_bias, shift = ctx.saved_tensors
    bent, filtering, logistic, _, centers, _ = ctx.flags
    count = len(weight) // centers if classes is None else len(classes)
    nothing = torch.zeros_like(shift)
    e, _ = logit_gradient(
        x,
        weight,
        low,
        inverse_norm,
        bias,
        classes,
        columns,
        hard_boundary,
        scale_and_bias,
        finite_shift(shift),
        grad_sums[:, 0].contiguous(),
        nothing,
        nothing,
        0,
        count,
        ctx.numbers[:4],
        [bent, filtering, logistic, centers],
    )
    rows = weight if low is None else (weight.float().view(torch.int32) + low).view(torch.float32)
    if classes is not None:
        rows = rows.view(-1, centers * x.shape[1])[classes].view(-1, x.shape[1])
    return multiply(e, rows.to(x.dtype)).to(x.dtype), *(None,) * 10


sum_negatives.register_autograd(_differentiate, setup_context=_keep)


@torch.library.custom_op("recognition::emit", mutates_args=())
def logit_gradient(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    columns: Tensor,
    hard_boundary: Tensor | None,
    scale_and_bias: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    target: Tensor,
    grad_target: Tensor,
    first: int,
    count: int,
    numbers: list[float],
    flags: list[int],
) -> tuple[Tensor, Tensor]:
    """The gradient by the products of `x` [B, D] and the raw rows of `count` classes [B, n K], in the type of `x`, and
    `RowGradient.radial` of these rows, or where they have a bias the gradient by it [n K], float32.

    `classes` [n]: their positions, or None for those from `first` on; `columns` [B]: the targets' places among them.
    `numbers`: scale, margin, exponent, threshold; `flags`: kind of the negatives, filter, logistic, centres.
    """
    scale, margin, exponent, threshold = numbers
    bent, filtering, logistic, centers = flags
    batch, size = x.shape
    x, columns, hard_boundary, scale_and_bias, lse, grad_lse, target, grad_target = _dense(
        x, columns, hard_boundary, scale_and_bias, lse, grad_lse, target, grad_target
    )
    tile = _tile("emit", x, weight, count, _work(bent, filtering, logistic, centers))
    blocks = triton.cdiv(batch, tile.batch)
    e = x.new_empty(batch, count * centers)
    summed = x.new_empty(blocks, count * centers, dtype=torch.float32)
    if batch and count:
        kernels.logit_gradient_kernel[(blocks, triton.cdiv(count, tile.classes))](
            x, weight, low, inverse_norm, bias, classes, columns, hard_boundary, scale_and_bias,
            lse, grad_lse, target, grad_target, e, summed, batch, count, first, scale, margin, exponent, threshold,
            KIND=bent, FILTER=filtering, LOGISTIC=logistic, UNIT=bias is None,
            GATHER=classes is not None, HARD_BOUNDARY=hard_boundary is not None, CENTERS=centers, UPCAST=x.dtype ==
            torch.float32,
            SIZE=size, BLOCK_B=tile.batch, BLOCK_N=tile.classes, BLOCK_D=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return e, summed.sum(0)


@logit_gradient.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, low, inverse_norm, bias, classes, columns, hard_boundary, scale_and_bias,
    lse, grad_lse, target, grad_target, first, count, numbers, flags,
):  # fmt: skip
    width = count * flags[3]
    return x.new_empty(len(x), width), x.new_empty(width, dtype=torch.float32)


def _dense(*tensors: Any) -> list[Any]:
    """The tensors, or None, without gaps: the kernels know of no strides."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


def _work(bent: int, filtering: int, logistic: int, centers: int) -> tiles.Work:
    if centers > 1:
        return "centers"
    return "elaborate" if filtering or logistic or bent in _HEAVY else "plain"


def _tile(kernel: tiles.Kernel, x: Tensor, weight: Tensor, count: int, work: tiles.Work) -> tiles.Tile:
    return tiles.tile(
        kernel,
        _name(x),
        batch=len(x),
        classes=count,
        embedding_size=x.shape[1],
        itemsize=max(x.itemsize, weight.itemsize),
        options=x.itemsize,
        work=work,
    )


def _name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else ""


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
