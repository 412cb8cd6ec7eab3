"""The interface of a backend: its input, its results, and the methods that the chunk loop calls.

In the formulas, B is the gathered batch, n the active classes of this rank, K the rows of a class, D the
embedding size, and the product of sample i and class j is

    p_ij = max over k of x_i . w_jk / |w_jk|, or, for the textbook softmax, x_i . w_j + b_j,

from which `negatives` makes the logit z_ij of every class but the sample's own, its target.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import Negatives

_LARGEST_EXPONENT = 64.0
_LARGEST_BOUND = 120.0

OnRows = Callable[[RowSelection, RowGradient], None]
"""Callback that takes the gradient of some rows."""
OnEmbeddings = Callable[[Tensor], None]
"""Callback that takes the gradient by the embeddings [B, D] as soon as it is whole."""
Places = tuple[Tensor | None, Tensor]
"""Positions of targets in a matrix [B, n]: on a CPU the rows [t] and columns [t] of those inside it. On a GPU, where
selecting them would make the host wait: None and the column of every sample [B], which may lie outside the matrix."""


@dataclass(frozen=True)
class LogitOptions:
    """Options of the matrix product of embeddings and class weights."""

    unit_rows: bool
    """Whether rows are normalised to length 1; otherwise they have a bias."""
    dtype: torch.dtype
    """Type of the matrix products' operands; the sums are in float32."""
    chunk: int
    """Classes per chunk."""
    workspace: int | None = None
    """Bytes that may be taken for what the backward pass needs of the forward pass, and by a chunk of the kernels
    instead of `chunk`; None: nothing is kept."""
    centers: int = 1
    """K, the rows of a class."""
    recompute_above: float = 0.25
    """Cosine above which a product that is rounded to bfloat16, as on a CPU, is computed again in float32. Below it,
    the rounding is no larger than that of the operands."""


@dataclass(frozen=True)
class NegativeTerm:
    """The term summed over the negatives: exp(z), or for a logistic loss log(1 + exp(z)) and its derivative."""

    negatives: Negatives
    hard_boundary: Tensor | None
    """[B]: the value beyond which a negative is hard."""
    logistic: bool
    bound: float | None
    """Largest possible z; None: unbounded."""

    @property
    def offset(self) -> float | None:
        """Number subtracted from z so that exp of 1e8 of them still sums up in float32; None: look for the largest."""
        if self.bound is None or self.bound > _LARGEST_BOUND:
            return None
        return max(self.bound - _LARGEST_EXPONENT, 0.0)


@dataclass(frozen=True)
class ActiveClasses:
    """The active classes of this rank, and the position of each sample's target among them.

    `classes` [n]: the active classes in ascending order, numbered within this rank's shard; None: all. `target_columns`
    [B]: the target's position among them, -1 where another rank holds it.
    """

    classes: Tensor | None
    target_columns: Tensor

    @staticmethod
    def of(labels: Tensor, shard: range, classes: Tensor | None = None) -> "ActiveClasses":
        """Find `labels` [B] among the classes of this rank; `classes` has to contain all labels that it holds."""
        own = (labels >= shard.start) & (labels < shard.stop)
        local = labels - shard.start
        return ActiveClasses(
            classes, torch.where(own, local if classes is None else torch.searchsorted(classes, local), -1)
        )

    def targets_in(self, start: int, count: int) -> Places | None:
        """Return the targets' positions among `count` active classes from `start` on; None: there are surely none."""
        if self.target_columns.is_cuda:
            return None, self.target_columns - start
        samples, columns, known = self._ascending
        own = slice(bisect_left(known, start), bisect_left(known, start + count))
        return (samples[own], columns[own] - start) if own.start < own.stop else None

    @cached_property
    def _ascending(self) -> tuple[Tensor, Tensor, list[int]]:
        """Samples sorted by target column, and the sorted columns, as a tensor and as a list."""
        columns, samples = self.target_columns.sort()
        return samples, columns, columns.tolist()


@dataclass(frozen=True)
class Chunk:
    """A contiguous range of the active classes."""

    start: int
    """Position of its first class among the active classes."""
    count: int
    rows: RowSelection
    """Their rows on this rank."""

    @property
    def span(self) -> slice:
        """Positions of its classes among the active classes."""
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True)
class LogitProblem:
    """The logits of a gathered batch and this rank's classes: the input of both passes."""

    weights: WeightShard
    active: ActiveClasses
    x: Tensor
    """[B, D], of type `options.dtype`."""
    options: LogitOptions
    term: NegativeTerm

    @property
    def count(self) -> int:
        """n, the number of active classes of this rank."""
        if self.active.classes is not None:
            return len(self.active.classes)
        return len(self.weights) // self.options.centers

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Divide the active classes into chunks of `size` classes; the last may be smaller."""
        centers, classes = self.options.centers, self.active.classes
        for span in spans(self.count, size):
            if classes is None:
                rows: RowSelection = slice(span.start * centers, span.stop * centers)
            else:
                rows = rows_of(classes[span], centers)
            yield Chunk(span.start, span.stop - span.start, rows)

    def targets_in(self, chunk: Chunk) -> Places | None:
        """Return the targets' positions in the matrix [B, n] of a chunk; see `ActiveClasses.targets_in`."""
        return self.active.targets_in(chunk.start, chunk.count)

    @cached_property
    def packed_fields(self) -> Tensor:
        """Fields of the (unfiltered) negatives for the kernels, one tensor for all chunks of both passes."""
        return self.term.negatives.unfiltered.packed_fields(self.x.device)


@dataclass(frozen=True)
class NegativeSums:
    """This rank's share of the sums over the negatives.

    `sums`: exp(z - shift) summed over this rank's classes other than the target, [B, 1]; for a logistic loss the sums
    of its two terms, [B, 2]. `shift` [B]: the fixed offset, or this rank's largest z (-inf if it has none).
    """

    sums: Tensor
    shift: Tensor
    cached_exp: Any = None
    """Exponentials that the backend keeps for its own `cached_gradient`; None: there are none."""


@dataclass(frozen=True)
class LossGradient:
    """Values and gradients of the loss that a backward pass over this rank's logits needs, each [B], float32."""

    lse: Tensor
    """Log of the sum of exp(z) over all ranks' negatives; any finite number where there are none, and for a logistic
    loss."""
    grad_lse: Tensor
    """Gradient of the loss by `lse`, or for a logistic loss by the sum of log(1 + exp(z))."""
    target: Tensor
    """Products of all ranks' samples and their targets' rows."""
    grad_target: Tensor
    """Gradient of the loss by `target`."""


class Backend(Protocol):
    """An implementation of the two passes over the class weights.

    The forward pass is `negative_sums`. The backward pass is `chunk_loop.backward`, which asks for one chunk's gradient
    after the other, or for `cached_gradient` where the forward pass has kept its exponentials.
    """

    updates_weights: bool
    """Whether the row optimizer may update rows by its Triton kernel where this backend runs."""
    hold_back: int
    """Chunks whose row gradient waits until the gradient by the embeddings is on its way to the other ranks."""

    def negative_sums(self, problem: LogitProblem, *, keep: bool) -> NegativeSums:
        """Sum over this rank's classes, each sample's target left out.

        `keep`: whether a backward pass will follow, for which exponentials may be kept, within `options.workspace`.
        """
        ...

    def chunk_size(self, problem: LogitProblem) -> int:
        """Return the number of classes of a chunk of the backward pass."""
        ...

    def chunk_gradient(
        self, problem: LogitProblem, chunk: Chunk, loss: LossGradient, *, rows_wanted: bool
    ) -> tuple[RowGradient, Tensor]:
        """Return the gradient by the rows of a chunk, and these rows as the operand of the products.

        `RowGradient.a` is the gradient of the loss by the products, [B, n K]; its other fields are needed only if
        `rows_wanted`. The operand is [n K, D] in the type of the products: `a` times the operand is the gradient by the
        embeddings.
        """
        ...

    def cached_gradient(
        self,
        problem: LogitProblem,
        cached_exp: Any,
        loss: LossGradient,
        on_rows: OnRows | None,
        on_embeddings: OnEmbeddings | None,
    ) -> Tensor:
        """Compute `chunk_loop.backward` from the exponentials that `negative_sums` kept, which may be overwritten."""
        ...


def spans(count: int, size: int) -> Iterator[slice]:
    """Divide the range 0..count-1 into slices of `size`; the last may be smaller."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def rows_of(classes: Tensor, centers: int) -> Tensor:
    """Return the positions of the rows of `classes` [n]: [n K]."""
    if centers == 1:
        return classes
    return (classes[:, None] * centers + torch.arange(centers, device=classes.device)).flatten()


def finite_shift(shift: Tensor) -> Tensor:
    """Return `shift` with 0 in place of -inf, which stands for no logits."""
    return torch.where(shift == -torch.inf, 0, shift)


def rescaling(shift: Tensor, other: Tensor) -> Tensor:
    """Return the factor that turns a sum of exp(z - shift) into a sum of exp(z - other)."""
    return torch.exp(shift - finite_shift(other))
