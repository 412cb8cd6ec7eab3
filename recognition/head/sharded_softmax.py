"""The head: a loss over class weights that are spread over the ranks of a group.

As code, with x the unit embeddings of all ranks, w the unit rows of this rank's classes, and y the labels:

    x = all_gather(x_local)                              # [B, D]
    p = x @ w.T                                          # [B, c], never held: a tile or a chunk at a time
    s = all_reduce(exp(negative_logit(p)).sum(j != y))   # [B]
    t = all_reduce(p[i, y_i])                            # [B], 0 on ranks that do not have the class
    loss = mean(log(1 + s exp(-target_logit(t))))        # = -log softmax at y; logistic losses sum log(1 + exp(z))

Where the work is done, from the embeddings of a rank to their gradient:

    forward     collective   all-gather x, labels and norms                  global_batch
                backend      sums over the negatives, targets' products      forward_pass, backends
                collective   all-reduce s and t                              forward_pass
                vectors      loss, and its gradients by s, t, norm           forward_pass, losses
    backward    backend      gradient by p, and from it by x and w           backends.chunk_loop
                collective   reduce-scatter the gradient by x                here
                backend      update of the rows, beside the backbone's       class_weights
                             backward pass
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from recognition import config, hardware
from recognition.distributed import shard_rows, start_reduce_scatter_rows
from recognition.head.backends import chunk_loop
from recognition.head.backends.problem import ActiveClasses, LogitOptions, OnRows, rows_of, spans
from recognition.head.backends.select import select_backend
from recognition.head.class_weights.gradient import AccumulatedGradient, RowGradient
from recognition.head.class_weights.optimizer import build_row_optimizer
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.forward_pass import ForwardPass, ForwardState, Step, VectorGradients, loss_on_vectors
from recognition.head.global_batch import GlobalBatch, gather_batch
from recognition.head.learned_scalars import LearnedScalars
from recognition.head.losses.auxiliary import Auxiliary
from recognition.head.losses.build import build_loss
from recognition.head.sampling import sample_rows

# Rounding a logit of 16 to bfloat16 costs as much, 0.03, as rounding the operands of a logit of 64.
_RECOMPUTE_LOGIT, _RECOMPUTE_SCALE = 16.0, 64.0


@dataclass(frozen=True)
class HeadOutput:
    """Result of a forward pass; equal on all ranks."""

    loss: Tensor
    """Scalar: mean over the gathered batch, times `loss_weight`. Its `backward()` also updates the rows, with
    `update_in_backward`."""
    target_cosine: Tensor
    """Scalar, detached: mean cosine between the embeddings and their classes' rows."""
    finite: Tensor
    """Scalar bool on the device: whether the loss is finite. Where it is not, no row changes."""


class ShardedSoftmax(nn.Module):
    """A loss over C classes, whose rows are sharded over the ranks of a group (Megatron-like).

    `rows` holds this rank's rows and their optimizer's state; `state_dict_tensors()` returns both as sharded tensors,
    and the scalars that the loss keeps. With `update_in_backward`, `loss.backward()` updates the rows; otherwise it
    adds to `accumulated`, which `apply_gradient` applies. A process group has to exist, a group of one included. The
    module has no parameters: no optimizer but its own changes the rows, and DistributedDataParallel is to wrap the
    backbone alone.
    """

    def __init__(
        self,
        settings: config.Head,
        num_classes: int,
        embedding_size: int,
        *,
        seed: int,
        device: torch.device | str,
        optimizer: config.Optimizer | None = None,
        ranks_group: dist.ProcessGroup | None = None,
        update_in_backward: bool = True,
    ) -> None:
        """Draw this rank's share of the rows, on `device`, keyed by `seed`.

        `optimizer`: moves the rows where `settings` name none. `ranks_group`: the ranks that share the rows; None
        means all. Raises UserError for a head without classes, and where `settings` ask for a backend that is not here.
        """
        super().__init__()
        if num_classes < 1 or embedding_size < 1:
            raise config.UserError(f"a head of {num_classes} classes with embeddings of {embedding_size} numbers")
        group = ranks_group or dist.group.WORLD
        if group is None:
            raise RuntimeError("the head needs a process group, also in a single process: call distributed.start first")
        device = torch.device(device)
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.shard = shard_rows(num_classes, self.world, self.rank)
        self.seed, self.sample_rate = seed, settings.sample_rate
        self.loss = build_loss(settings.loss, num_classes, seed=seed, device=device)
        self._backend = select_backend(settings.backend, device)
        self.options = self._options(settings, device)
        optimizer_config = settings.optimizer or optimizer or config.SGD()
        self.optimizer = build_row_optimizer(optimizer_config, settings.inactive_rows, seed=seed)
        self.optimizer.kernels = self._backend.updates_weights
        centers = self.options.centers
        self.rows = WeightShard.initial(
            range(self.shard.start * centers, self.shard.stop * centers),
            embedding_size,
            bias=not self.loss.unit_rows,
            seed=seed,
            device=device,
            row_format=settings.row_format,
        )
        self.rows.moments.update(
            self.optimizer.moments(
                len(self.rows),
                embedding_size,
                bias=not self.loss.unit_rows,
                device=device,
                row_format=settings.row_format,
            )
        )
        self.scalars = LearnedScalars(self.loss.learned, optimizer_config)
        self.auxiliary = Auxiliary(settings, self.shard, embedding_size, device, group)
        self.accumulated = None if update_in_backward else AccumulatedGradient(self.rows)
        self._forward_pass = ForwardPass(self.loss, self._backend, self.rows, self.options, settings.filter, group)
        self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self._updates = 0
        self._state_before: dict[str, Tensor] = {}
        self._side_stream = _SideStream(device)

    def state_dict_tensors(self) -> dict[str, Tensor]:
        """Return the whole state: tensors placed `Shard(0)` over the group, by classes, and scalars equal on all ranks.

        They share storage with the head's own: loading into them loads the head, from any number of ranks.
        """
        self._side_stream.wait()
        self.optimizer.flush(self.rows)
        local = self.rows.tensors() | self.auxiliary.tensors()
        mesh = DeviceMesh.from_group(self.group, self.rows.weight.device.type)
        state: dict[str, Tensor] = {}
        for name, tensor in local.items():
            # The rows of a class stay together, whatever the number of ranks.
            by_class = tensor.view(len(self.shard), -1, *tensor.shape[1:]) if self.options.centers > 1 else tensor
            state[name] = DTensor.from_local(
                by_class,
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([self.num_classes, *by_class.shape[1:]]),
                stride=by_class.stride(),
            )
        scalars = self.loss.running | self.loss.learned
        return state | {f"loss.{name}": scalar for name, scalar in scalars.items()} | self.scalars.tensors()

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        lr: float,
        step: int,
        margin_scale: float = 1.0,
        sizes: Sequence[int] | None = None,
        loss_weight: float = 1.0,
        loss_scale: Tensor | float = 1.0,
    ) -> HeadOutput:
        """Return the loss of `embeddings` [b, D], not normalised, with `labels` [b] (int64, in [0, C)).

        All ranks call together. `lr`: learning rate of the rows; `step` keys the sampled classes; `margin_scale` in
        [0, 1]: share of the margin; `sizes`: b of every rank, None when they are equal; `loss_weight`: factor of the
        loss; `loss_scale`: factor that the caller multiplies the loss by before `backward` (that of a GradScaler, for
        float16), and that the rows' own update is freed of.
        The embeddings get the gradient of the loss times the number of ranks, so that the mean over the ranks that
        DistributedDataParallel takes is the gradient. In eval mode, or without gradients, only the loss is computed,
        over all classes, and nothing changes.
        A label out of range raises UserError or, on a GPU, where the host should not wait, an assertion in CUDA.
        """
        if embeddings.shape != (len(labels), self.embedding_size):
            expected = (len(labels), self.embedding_size)
            raise ValueError(f"embeddings are {tuple(embeddings.shape)}, not {expected}, for {len(labels)} labels")
        now = Step(step, margin_scale, learns=self.training and torch.is_grad_enabled())
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings.float()
            if now.learns and not x.requires_grad:
                x = x.detach().requires_grad_()
            norm = torch.linalg.vector_norm(x, dim=1)
            unit = x / norm.clamp(min=1e-12)[:, None]
            seen_x = unit if self.loss.unit_embeddings else x
            before = {name: value.clone() for name, value in self.loss.running.items()}
            with torch.no_grad():
                operand = seen_x.to(self.options.dtype)
                batch = gather_batch(operand, labels, norm, sizes, classes=self.num_classes, group=self.group)
                state = self._forward_pass(batch, self._active_classes(batch, now), now)
            loss, gradients = loss_on_vectors(self.loss, self.scalars, state, loss_weight)
            extra = self.auxiliary(x, unit, batch.labels, batch.x, batch.norm, batch.sizes) * loss_weight
        whole = loss + extra.detach()
        finite = whole.isfinite()
        if gradients is not None:
            self.loss.restore(before, ~finite)
            if self.accumulated is not None:
                self._state_before = self._state_before or before
            updates = self._updates

            def backward(gradient: Tensor) -> tuple[Tensor, Tensor]:
                if updates != self._updates:
                    raise RuntimeError(
                        "the head's rows changed between this forward pass and its backward pass: "
                        "run backward before the next update, or build the head with update_in_backward=False"
                    )
                skip = ~(finite & gradient.isfinite())
                grad_x, grad_norm = self._backward(state, gradients.times(gradient / loss_scale), lr, skip)
                return grad_x * loss_scale, grad_norm * loss_scale

            whole = _HeadGradient.apply(seen_x, norm, loss, backward) + extra
        return HeadOutput(whole, state.target_cosine.mean(), finite)

    def apply_gradient(self, lr: float, finite: Tensor | None = None, *, step: int = 0) -> None:
        """Update the rows by the sum over the backward passes so far, and start anew. For `update_in_backward=False`.

        Where any of their losses, or `finite` (scalar bool, on the device), was not finite, nothing changes, and the
        loss's state is again what it was before them. Only rows that took part in one of the passes change.
        """
        total = self.accumulated
        if total is None:
            raise RuntimeError(
                "this head applies its gradient in backward; build it with update_in_backward=False to accumulate"
            )
        self._side_stream.wait()
        skip = (self._nonfinite if finite is None else self._nonfinite | ~finite).float()
        self.optimizer.begin(self.rows, step, lr, skip)
        touched = total.touched.nonzero().squeeze(1) if self.sample_rate < 1 else None
        for span in spans(len(self.rows) if touched is None else len(touched), self.options.chunk):
            part = span if touched is None else touched[span]
            bias = None if total.bias is None else total.bias[part]
            self.optimizer.update(self.rows, part, total.weight[part], lr, skip, step, bias)
        self.scalars.apply(lr, skip)
        self.auxiliary.apply(skip)
        self.loss.restore(self._state_before, skip.bool())
        self._state_before = {}
        total.clear()
        self._nonfinite.zero_()
        self._updates += 1

    def _options(self, settings: config.Head, device: torch.device) -> LogitOptions:
        recompute_scale = self.loss.scale or _RECOMPUTE_SCALE
        return LogitOptions(
            unit_rows=self.loss.unit_rows,
            dtype=hardware.product_type(settings.precision, device),
            chunk=settings.chunk or hardware.head_chunk(device.type),
            workspace=None if settings.chunk else settings.workspace_mib << 20,
            centers=settings.subcenters,
            recompute_above=min(_RECOMPUTE_LOGIT / recompute_scale, _RECOMPUTE_LOGIT / _RECOMPUTE_SCALE),
        )

    def _active_classes(self, batch: GlobalBatch, step: Step) -> ActiveClasses:
        """Select the active classes, sampled in training and all otherwise, and bring their rows up to date."""
        self._side_stream.wait()
        classes = None
        if step.learns and self.sample_rate < 1:
            classes = sample_rows(batch.labels, self.num_classes, self.sample_rate, self.seed, step.number, self.shard)
            self.optimizer.catch_up(self.rows, rows_of(classes, self.options.centers), step.number)
        elif not step.learns:
            self.optimizer.flush(self.rows)
        return ActiveClasses.of(batch.labels, self.shard, classes)

    def _backward(
        self, state: ForwardState, gradients: VectorGradients, lr: float, skip: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients by this rank's embeddings [b, D] and norms [b], times the number of ranks."""
        batch = state.batch
        pending: list[Callable[[], Tensor]] = []

        def on_embeddings(grad_x: Tensor) -> None:
            pending.append(start_reduce_scatter_rows(grad_x, batch.sizes, self.group))

        self.auxiliary.add(batch.x, batch.labels, batch.norm)
        on_rows = self._on_rows(lr, state.step.number, skip.float(), gradients.scalars, pending)
        chunk_loop.backward(self._backend, state.problem, gradients.at(state), on_rows, on_embeddings, state.cached_exp)
        return pending[0]() * self.world, gradients.norm[batch.of(self.rank)] * self.world

    def _on_rows(self, lr: float, step: int, skip: Tensor, grad_scalars: list[Tensor], pending: list[Any]) -> OnRows:
        """Return the callback that applies or accumulates row gradients.

        Once the embeddings' reduce-scatter is `pending`, updates go to a side stream, beside the backbone's backward
        pass.
        """
        self.scalars.add(grad_scalars)
        if self.accumulated is not None:
            self._nonfinite |= skip.bool()
            return self.accumulated.add
        self._updates += 1
        self.scalars.apply(lr, skip)
        self.auxiliary.apply(skip)
        self.optimizer.begin(self.rows, step, lr, skip)

        def apply(part: RowSelection, gradient: RowGradient) -> None:
            if not pending:
                self.optimizer.update(self.rows, part, gradient, lr, skip, step)
                return
            read = gradient.a, gradient.x, gradient.radial, gradient.bias, skip
            with self._side_stream.use(*read, part if isinstance(part, Tensor) else None):
                self.optimizer.update(self.rows, part, gradient, lr, skip, step)

        return apply


class _HeadGradient(torch.autograd.Function):
    """The head as autograd sees it: a loss computed outside of it, and a callback for its gradient by `x` and `norm`.

    The callback is called once, in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, loss: Tensor, backward: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Return the loss, to be differentiated."""
        ctx.backward = backward
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients by `x` and `norm`, from the loss's."""
        with torch.autocast(gradient.device.type, enabled=False):
            return *ctx.backward(gradient), None, None


class _SideStream:
    """A second stream of a GPU for work that nobody waits for; on other devices the work runs immediately, in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def use(self, *read: Tensor | None) -> Iterator[None]:
        """Launch the block's work on the side stream: after all earlier work, concurrently with later work.

        `read`: tensors from outside that the block reads; their memory is not reused before it is done.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in read:
            if tensor is not None:
                tensor.record_stream(self._stream)

    def wait(self) -> None:
        """Make later work wait for the side stream. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
