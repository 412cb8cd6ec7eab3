"""The two passes over the class weights as Triton kernels, one each, with no logits in memory.

A chunk of the backward pass writes the gradient by its products to memory, in the products' type, and two matrix
products (cuBLAS) compute from it the gradients by embeddings and by rows. Nothing here makes the host wait for the GPU.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from recognition.head.backends import kernels, tiles
from recognition.head.backends.problem import (
    Chunk,
    LogitProblem,
    LossGradient,
    NegativeSums,
    OnEmbeddings,
    OnRows,
    rescaling,
)
from recognition.head.backends.products import multiply
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.losses.negatives import AffineNegatives, FilteredNegatives, Negatives

_PROCESSORS = 128
"""Streaming multiprocessors assumed of a GPU that is not known; the classes are split into twice as many blocks."""


class TritonBackend:
    """Implementation of `Backend` by Triton kernels."""

    updates_weights = True
    hold_back = 2

    def negative_sums(self, problem: LogitProblem, *, keep: bool) -> NegativeSums:
        """Sum in one launch. Exponentials are kept if all of them fit into the workspace."""
        options, term, x = problem.options, problem.term, problem.x
        linear = isinstance(term.negatives, AffineNegatives) and not term.logistic and term.offset is not None
        size = len(x) * problem.count * x.itemsize
        keep = keep and linear and options.unit_rows and options.centers == 1
        keep = keep and options.workspace is not None and 0 < size <= options.workspace
        sums, shift, cached_exp = negative_sums(
            **_inputs(problem),
            classes=problem.active.classes,
            columns=problem.active.target_columns,
            offset=0.0 if term.logistic else term.offset,
            keep=keep,
        )
        return NegativeSums(sums, shift, cached_exp if keep else None)

    def chunk_size(self, problem: LogitProblem) -> int:
        """Return the tuned number of classes, limited so that the chunks held back fit into the workspace, too."""
        options, x = problem.options, problem.x
        if options.workspace is None:
            return options.chunk
        room = options.workspace // (1 + self.hold_back)
        rows = tiles.chunk(_name(x), batch=len(x), embedding_size=x.shape[1], workspace=room, itemsize=x.itemsize)
        return max(1, rows // options.centers)

    def chunk_gradient(
        self, problem: LogitProblem, chunk: Chunk, loss: LossGradient, *, rows_wanted: bool
    ) -> tuple[RowGradient, Tensor]:
        """Compute the chunk's gradient in one launch."""
        classes = problem.active.classes
        grad_dots, row_sums = logit_gradient(
            **_inputs(problem),
            classes=None if classes is None else classes[chunk.span],
            columns=problem.active.target_columns - chunk.start,
            lse=loss.lse,
            grad_lse=loss.grad_lse,
            target=loss.target,
            grad_target=loss.grad_target,
            first=chunk.start,
            count=chunk.count,
        )
        sums = {"radial" if problem.options.unit_rows else "bias": row_sums}
        operand = problem.weights.operand(chunk.rows, problem.options.dtype)
        return RowGradient(grad_dots, problem.x, **sums), operand

    def cached_gradient(
        self,
        problem: LogitProblem,
        cached_exp: Tensor,
        loss: LossGradient,
        on_rows: OnRows | None,
        on_embeddings: OnEmbeddings | None,
    ) -> Tensor:
        """Compute the gradients without the product for the logits, as E [B, n] times a factor of each sample."""
        weights, active, x, term = problem.weights, problem.active, problem.x, problem.term
        assert isinstance(term.negatives, AffineNegatives)
        factor = loss.grad_lse * problem.packed_fields[0] * torch.exp((term.offset or 0.0) - loss.lse)
        here = active.target_columns >= 0
        columns = torch.where(here, active.target_columns, 0)
        positions = columns if active.classes is None else active.classes[columns]
        own = torch.where(factor == 0, 0, loss.grad_target / factor) * weights.inverse_norm[positions]
        before = cached_exp.gather(1, columns[:, None])
        cached_exp.scatter_(1, columns[:, None], torch.where(here[:, None], own[:, None].to(cached_exp.dtype), before))
        chunks = list(problem.chunks(self.chunk_size(problem)))
        grad_x = torch.zeros(x.shape, device=x.device)
        for chunk in chunks:
            operand = weights.operand(chunk.rows, problem.options.dtype)
            grad_x += multiply(cached_exp[:, chunk.span], operand)
        grad_x *= factor[:, None]
        if on_embeddings is not None:
            on_embeddings(grad_x)
        weighted = (x * factor[:, None]).to(x.dtype)
        for chunk in chunks:
            if on_rows is not None:
                inverse_norm = weights.inverse_norm[chunk.rows]
                on_rows(chunk.rows, RowGradient(cached_exp[:, chunk.span], weighted, inverse_norm=inverse_norm))
        return grad_x


def _inputs(problem: LogitProblem) -> dict[str, Any]:
    """Return the arguments that both operators share, except those on the classes."""
    weights, term = problem.weights, problem.term
    filtered = term.negatives if isinstance(term.negatives, FilteredNegatives) else None
    return {
        "x": problem.x,
        "weight": weights.weight,
        "low": weights.low if problem.x.dtype == torch.float32 else None,
        "inverse_norm": weights.inverse_norm,
        "bias": weights.bias,
        "hard_boundary": term.hard_boundary,
        "negatives": type(term.negatives.unfiltered).__name__,
        "fields": problem.packed_fields,
        "threshold": None if filtered is None else filtered.threshold,
        "zero_filtered": filtered is not None and filtered.zero,
        "logistic": term.logistic,
        "centers": problem.options.centers,
    }


@torch.library.custom_op("recognition::negative_sums", mutates_args=())
def negative_sums(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    columns: Tensor,
    hard_boundary: Tensor | None,
    fields: Tensor,
    *,
    negatives: str,
    threshold: float | None,
    zero_filtered: bool,
    logistic: bool,
    centers: int,
    offset: float | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `kernels.negative_sums_kernel`, whose arguments these are.

    `low` is given where products are of float32. `negatives`: the name in `Negatives.kinds`, and `fields` its packed
    fields. Returns the sums [B, 1] (logistic: [B, 2]), their shift [B], and the exponentials [B, n] in the type of `x`,
    which are empty unless `keep`.
    """
    batch, count = len(x), _count(weight, classes, centers)
    tile = _tile("negative_sums", x, weight, count, _work(negatives, threshold, logistic, centers))
    blocks, wide = triton.cdiv(batch, tile.batch), triton.cdiv(count, tile.classes)
    splits = max(1, min(wide, triton.cdiv(2 * _processors(x.device), max(blocks, 1))))
    sums = x.new_zeros(splits, 1 + logistic, batch, dtype=torch.float32)
    cached_exp = x.new_empty(batch, count if keep else 0)
    shifts = x.new_full((splits, batch), -torch.inf if offset is None else offset, dtype=torch.float32)
    if batch and count:
        _launch(
            kernels.negative_sums_kernel,
            (blocks, splits),
            tile,
            x=x,
            weight=weight,
            low=low,
            inverse_norm=inverse_norm,
            bias=bias,
            classes=classes,
            columns=columns,
            hard_boundary=hard_boundary,
            fields=fields,
            threshold=threshold,
            sums=sums,
            max_logits=shifts,
            cached_exp=cached_exp if keep else None,
            batch=batch,
            count=count,
            tiles_per_split=triton.cdiv(wide, splits),
            offset=offset,
            KIND=_code(negatives),
            ZERO_FILTERED=zero_filtered,
            LOGISTIC=logistic,
            CENTERS=centers,
        )
    if offset is not None:
        return sums.sum(0).T.contiguous(), shifts[0].clone(), cached_exp
    shift = shifts.amax(0)
    return (sums[:, 0] * rescaling(shifts, shift)).sum(0)[:, None], shift, cached_exp


@negative_sums.register_fake
def _(
    x: Tensor, weight: Tensor, low: Any, inverse_norm: Any, bias: Any, classes: Tensor | None, *_: Any, **given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.new_empty(len(x), 1 + given["logistic"], dtype=torch.float32)
    kept = _count(weight, classes, given["centers"]) if given["keep"] else 0
    return sums, x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), kept)


@torch.library.custom_op("recognition::logit_gradient", mutates_args=())
def logit_gradient(
    x: Tensor,
    weight: Tensor,
    low: Tensor | None,
    inverse_norm: Tensor,
    bias: Tensor | None,
    classes: Tensor | None,
    columns: Tensor,
    hard_boundary: Tensor | None,
    fields: Tensor,
    lse: Tensor,
    grad_lse: Tensor,
    target: Tensor,
    grad_target: Tensor,
    *,
    negatives: str,
    threshold: float | None,
    zero_filtered: bool,
    logistic: bool,
    centers: int,
    first: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Launch `kernels.logit_gradient_kernel`, whose arguments these are; those of both as in `negative_sums`.

    `count` classes: `classes`, or those from `first` on. Returns the gradient by the dots of `x` and their raw rows
    [B, n K], in the type of `x`, and `RowGradient.radial` of these rows, or where they have a bias the gradient by it
    [n K], float32.
    """
    batch = len(x)
    tile = _tile("logit_gradient", x, weight, count, _work(negatives, threshold, logistic, centers))
    blocks = triton.cdiv(batch, tile.batch)
    grad_dots = x.new_empty(batch, count * centers)
    row_sums = x.new_empty(blocks, count * centers, dtype=torch.float32)
    if batch and count:
        _launch(
            kernels.logit_gradient_kernel,
            (blocks, triton.cdiv(count, tile.classes)),
            tile,
            x=x,
            weight=weight,
            low=low,
            inverse_norm=inverse_norm,
            bias=bias,
            classes=classes,
            columns=columns,
            hard_boundary=hard_boundary,
            fields=fields,
            threshold=threshold,
            lse=lse,
            grad_lse=grad_lse,
            target=target,
            grad_target=grad_target,
            grad_dots=grad_dots,
            row_sums=row_sums,
            batch=batch,
            count=count,
            first=first,
            KIND=_code(negatives),
            ZERO_FILTERED=zero_filtered,
            LOGISTIC=logistic,
            CENTERS=centers,
        )
    return grad_dots, row_sums.sum(0)


@logit_gradient.register_fake
def _(x: Tensor, *_: Any, **given: Any) -> tuple[Tensor, Tensor]:
    width = given["count"] * given["centers"]
    return x.new_empty(len(x), width), x.new_empty(width, dtype=torch.float32)


def _launch(kernel: Any, grid: tuple[int, int], tile: tiles.Tile, **arguments: Any) -> None:
    """Launch a kernel with this tile. The kernels assume contiguous tensors, so tensors are made contiguous."""
    given = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    kernel[grid](
        **given,
        SIZE=arguments["x"].shape[1],
        BLOCK_B=tile.batch,
        BLOCK_N=tile.classes,
        BLOCK_D=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def _code(negatives: str) -> Any:
    """Return the Triton function of a kind of negatives. Raises NotImplementedError where it has none."""
    code = Negatives.kinds[negatives].kernel_code
    if code is None:
        raise NotImplementedError(f"{negatives} has no kernel_code: take the PyTorch backend")
    return code


def _count(weight: Tensor, classes: Tensor | None, centers: int) -> int:
    return len(weight) // centers if classes is None else len(classes)


def _work(negatives: str, threshold: float | None, logistic: bool, centers: int) -> tiles.Work:
    if centers > 1:
        return "centers"
    return "heavy" if threshold is not None or logistic or Negatives.kinds[negatives].heavy else "plain"


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
