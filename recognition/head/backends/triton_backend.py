"""`statistics` and `backward` of `chunks`, made of the Triton kernels: one pass each, and no logits in memory.

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
    Products,
    Ready,
    Sink,
    Statistics,
    Summand,
    Taking,
    finite_shift,
    multiply,
    rescaling,
)
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import Part, Rows
from recognition.head.losses.negatives import (
    Circled,
    Curricular,
    DividedAngle,
    Filtered,
    Hardened,
    Linear,
    Negatives,
    Sphere2,
)

_PROCESSORS = 128
"""Of a GPU whose number is not known; splits are made for twice as many blocks."""
_ELABORATE = kernels.DIVIDED.value, kernels.SPHERE2.value
"""Negatives that take many registers."""
_HELD_BACK = 2
"""Chunks whose rows' gradient waits until the one by the embeddings is on its way to the other ranks."""


@dataclass(frozen=True)
class _Bent:
    """What the kernels have to know of `negatives`."""

    kind: int
    held: Tensor
    """[2] float32 on the device: what is multiplied with and added to; kept there, so that the host need not know."""
    scale: float = 1.0
    margin: float = 0.0
    exponent: float = 1.0
    threshold: float = 0.0
    filter: int = 0

    @staticmethod
    def of(negatives: Negatives, device: torch.device) -> "_Bent":
        threshold, filtering = 0.0, 0
        if isinstance(negatives, Filtered):
            threshold = negatives.threshold
            filtering = (kernels.ZEROED if negatives.zero else kernels.REMOVED).value
            negatives = negatives.inner
        factor: Tensor | float = 1.0
        addend: Tensor | float = 0.0
        scale, margin, exponent = 1.0, 0.0, 1.0
        if isinstance(negatives, Linear):
            kind, factor, addend = kernels.LINEAR, negatives.scale, negatives.bias
        elif isinstance(negatives, Curricular):
            kind, scale, factor = kernels.CURRICULAR, negatives.scale, negatives.t
        elif isinstance(negatives, Hardened):
            kind, scale, margin = kernels.HARDENED, negatives.scale, negatives.weight
        elif isinstance(negatives, Circled):
            kind, scale, margin = kernels.CIRCLED, negatives.scale, negatives.margin
        elif isinstance(negatives, DividedAngle):
            kind, scale, margin = kernels.DIVIDED, negatives.scale, negatives.margin
        elif isinstance(negatives, Sphere2):
            kind, scale, margin, exponent = kernels.SPHERE2, negatives.scale, negatives.margin, negatives.exponent
            addend = negatives.bias
        else:
            raise NotImplementedError(f"no kernel for {type(negatives).__name__}")
        # A tensor made of a number on the host would be copied over, which waits.
        held = torch.stack([_scalar(factor, device), _scalar(addend, device)])
        return _Bent(kind.value, held, scale, margin, exponent, threshold, filtering)


def statistics(rows: Rows, taking: Taking, x: Tensor, products: Products, summand: Summand) -> Statistics:
    """As `chunks.statistics`."""
    bent = _Bent.of(summand.negatives, x.device)
    running = not summand.logistic and summand.offset is None
    plain = isinstance(summand.negatives, Linear) and products.unit_rows and products.centers == 1
    numbers = len(x) * (len(rows) if taking.classes is None else len(taking.classes))
    fits = products.workspace is not None and 0 < numbers * x.itemsize <= products.workspace
    keep = plain and fits and not summand.logistic and not running
    sums, shift, kept = sum_negatives(
        x,
        rows.weight,
        rows.low if x.dtype == torch.float32 else None,
        rows.inverse_norm,
        rows.bias,
        taking.classes,
        taking.columns,
        summand.anchor,
        bent.held,
        [bent.scale, bent.margin, bent.exponent, bent.threshold, summand.offset or 0.0],
        [bent.kind, bent.filter, int(summand.logistic), int(running), products.centers, int(keep)],
    )
    return Statistics(sums, shift, kept if keep else None)


def backward(
    rows: Rows,
    taking: Taking,
    x: Tensor,
    products: Products,
    summand: Summand,
    log_sum: Tensor,
    negatives_gradient: Tensor,
    target: Tensor,
    target_gradient: Tensor,
    sink: Sink | None,
    ready: Ready | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """As `chunks.backward`; from what `statistics` kept, where it did, one product is saved."""
    bent = _Bent.of(summand.negatives, x.device)
    if products.workspace is not None:
        room = products.workspace // (1 + _HELD_BACK)
        chunk = tiles.chunk(_name(x), batch=len(x), embedding_size=x.shape[1], workspace=room, itemsize=x.itemsize)
        products = replace(products, chunk=max(1, chunk // products.centers))
    gradient = torch.zeros(x.shape, device=x.device)
    if kept is not None:
        factor = negatives_gradient * bent.held[0] * torch.exp((summand.offset or 0.0) - log_sum)
        return _from_kept(rows, taking, x, products, kept, factor, target_gradient, gradient, sink, ready)
    waiting: deque[tuple[Part, RowGradient]] = deque()
    for start, count, part in taking.parts(rows, products):
        e, summed = emit(
            x,
            rows.weight,
            rows.low if x.dtype == torch.float32 else None,
            rows.inverse_norm,
            rows.bias,
            None if taking.classes is None else taking.classes[start : start + count],
            taking.columns - start,
            summand.anchor,
            bent.held,
            log_sum,
            negatives_gradient,
            target,
            target_gradient,
            start,
            count,
            [bent.scale, bent.margin, bent.exponent, bent.threshold],
            [bent.kind, bent.filter, int(summand.logistic), products.centers],
        )
        gradient += multiply(e, rows.operand(part, products.dtype))
        if sink is None:
            continue
        waiting.append((part, RowGradient(e, x, *((summed, None) if products.unit_rows else (None, summed)))))
        if len(waiting) > _HELD_BACK:
            sink(*waiting.popleft())
    if ready is not None:
        ready(gradient)
    while sink is not None and waiting:
        sink(*waiting.popleft())
    return gradient


def _from_kept(
    rows: Rows,
    taking: Taking,
    x: Tensor,
    products: Products,
    kept: Tensor,
    factor: Tensor,
    target_gradient: Tensor,
    gradient: Tensor,
    sink: Sink | None,
    ready: Ready | None,
) -> Tensor:
    """`backward` where `factor` [B] times `kept` [B, n] is the gradient by the products of embeddings and raw rows."""
    here = taking.columns >= 0
    columns = torch.where(here, taking.columns, 0)
    positions = columns if taking.classes is None else taking.classes[columns]
    own = torch.where(factor == 0, 0, target_gradient / factor) * rows.inverse_norm[positions]
    before = kept.gather(1, columns[:, None])
    kept.scatter_(1, columns[:, None], torch.where(here[:, None], own[:, None].to(kept.dtype), before))
    parts = [(slice(start, start + count), part) for start, count, part in taking.parts(rows, products)]
    for columns_of, part in parts:
        gradient += multiply(kept[:, columns_of], rows.operand(part, products.dtype))
    gradient *= factor[:, None]
    if ready is not None:
        ready(gradient)
    weighted = (x * factor[:, None]).to(x.dtype)
    for columns_of, part in parts:
        if sink is not None:
            sink(part, RowGradient(kept[:, columns_of], weighted, inverse_norm=rows.inverse_norm[part]))
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
    anchor: Tensor | None,
    held: Tensor,
    numbers: list[float],
    flags: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """`Statistics` as tensors, differentiable by `x` [B, D]: sums [B, 1] (logistic: [B, 2]), shift [B], and kept
    [B, n] in the type of `x`, which is empty unless it is wanted.

    `numbers`: scale, margin, exponent, threshold, offset; `flags`: kind of the negatives, filter, logistic, running
    maximum, centres, keep; `low`: `Rows.low` where products are of float32. The rest is as in `chunks`; the second of
    two sums is a constant in the gradient.
    """
    scale, margin, exponent, threshold, offset = numbers
    bent, filtering, logistic, running, centers, keep = flags
    batch, size = x.shape
    count = len(weight) // centers if classes is None else len(classes)
    x, columns, anchor, held = _dense(x, columns, anchor, held)
    tile = _tile("statistics", x, weight, count, _work(bent, filtering, logistic, centers))
    blocks, wide = triton.cdiv(batch, tile.batch), triton.cdiv(count, tile.classes)
    splits = max(1, min(wide, triton.cdiv(2 * _processors(x.device), max(blocks, 1))))
    sums = x.new_zeros(splits, 1 + logistic, batch, dtype=torch.float32)
    kept = x.new_empty(batch, count if keep else 0)
    shifts = x.new_full((splits, batch), -torch.inf if running else offset, dtype=torch.float32)
    if batch and count:
        kernels.statistics_kernel[(blocks, splits)](
            x, weight, low, inverse_norm, bias, classes, columns, anchor, held, sums, shifts, kept if keep else None,
            batch, count, triton.cdiv(wide, splits), scale, margin, exponent, threshold, offset,
            BENT=bent, FILTER=filtering, LOGISTIC=logistic, RUNNING=running, UNIT=bias is None,
            GATHER=classes is not None, ANCHOR=anchor is not None, CENTERS=centers, UPCAST=x.dtype == torch.float32,
            SIZE=size, BLOCK_B=tile.batch, BLOCK_N=tile.classes, BLOCK_D=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if not running:
        return sums.sum(0).T.contiguous(), shifts[0].clone(), kept
    shift = shifts.amax(0)
    return (sums[:, 0] * rescaling(shifts, shift)).sum(0)[:, None], shift, kept


@sum_negatives.register_fake
def _(x, weight, low, inverse_norm, bias, classes, columns, anchor, held, numbers, flags):  # type: ignore[no-untyped-def]
    count = len(weight) // flags[4] if classes is None else len(classes)
    sums = x.new_empty(len(x), 1 + flags[2], dtype=torch.float32)
    return sums, x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), count if flags[5] else 0)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.numbers, ctx.flags = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(True)


def _differentiate(ctx, by_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    x, weight, low, inverse_norm, bias, classes, columns, anchor, held, shift = ctx.saved_tensors
    bent, filtering, logistic, _, centers, _ = ctx.flags
    count = len(weight) // centers if classes is None else len(classes)
    nothing = torch.zeros_like(shift)
    e, _ = emit(
        x,
        weight,
        low,
        inverse_norm,
        bias,
        classes,
        columns,
        anchor,
        held,
        finite_shift(shift),
        by_sums[:, 0].contiguous(),
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
def emit(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    columns: Tensor,
    anchor: Tensor | None,
    held: Tensor,
    log_sum: Tensor,
    by_sum: Tensor,
    target: Tensor,
    by_target: Tensor,
    first: int,
    count: int,
    numbers: list[float],
    flags: list[int],
) -> tuple[Tensor, Tensor]:
    """The gradient by the products of `x` [B, D] and the raw rows of `count` classes [B, n K], in the type of `x`, and
    `RowGradient.along` of these rows, or where they have a bias the gradient by it [n K], float32.

    `classes` [n]: their positions, or None for those from `first` on; `columns` [B]: the targets' places among them.
    `numbers`: scale, margin, exponent, threshold; `flags`: kind of the negatives, filter, logistic, centres.
    """
    scale, margin, exponent, threshold = numbers
    bent, filtering, logistic, centers = flags
    batch, size = x.shape
    x, columns, anchor, held, log_sum, by_sum, target, by_target = _dense(
        x, columns, anchor, held, log_sum, by_sum, target, by_target
    )
    tile = _tile("emit", x, weight, count, _work(bent, filtering, logistic, centers))
    blocks = triton.cdiv(batch, tile.batch)
    e = x.new_empty(batch, count * centers)
    summed = x.new_empty(blocks, count * centers, dtype=torch.float32)
    if batch and count:
        kernels.emit_kernel[(blocks, triton.cdiv(count, tile.classes))](
            x, weight, low, inverse_norm, bias, classes, columns, anchor, held,
            log_sum, by_sum, target, by_target, e, summed, batch, count, first, scale, margin, exponent, threshold,
            BENT=bent, FILTER=filtering, LOGISTIC=logistic, UNIT=bias is None,
            GATHER=classes is not None, ANCHOR=anchor is not None, CENTERS=centers, UPCAST=x.dtype == torch.float32,
            SIZE=size, BLOCK_B=tile.batch, BLOCK_N=tile.classes, BLOCK_D=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return e, summed.sum(0)


@emit.register_fake
def _(  # type: ignore[no-untyped-def]
    x, weight, low, inverse_norm, bias, classes, columns, anchor, held,
    log_sum, by_sum, target, by_target, first, count, numbers, flags,
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
    return "elaborate" if filtering or logistic or bent in _ELABORATE else "plain"


def _tile(kernel: tiles.Kernel, x: Tensor, weight: Tensor, count: int, work: tiles.Work) -> tiles.Tile:
    return tiles.tile(
        kernel,
        _name(x),
        batch=len(x),
        classes=count,
        embedding_size=x.shape[1],
        itemsize=max(x.itemsize, weight.itemsize),
        products=x.itemsize,
        work=work,
    )


def _name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else ""


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
