"""The backward pass over the class weights, a chunk of classes at a time: the one loop for all backends.

    for each chunk:  a = gradient by the chunk's products      (the backend, from logits computed anew)
                     grad_x += a w                             (a matrix product)
                     hand a^T x, not yet formed, to `on_rows`

Logits exist for one chunk only, so memory does not grow with B x C.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor

from recognition.head.backends.problem import Backend, LogitProblem, LossGradient, OnEmbeddings, OnRows
from recognition.head.backends.products import multiply
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection


def backward(
    backend: Backend,
    problem: LogitProblem,
    loss: LossGradient,
    on_rows: OnRows | None,
    on_embeddings: OnEmbeddings | None = None,
    cached_exp: Any = None,
) -> Tensor:
    """Return the gradient of the loss by `problem.x` [B, D], float32, from this rank's classes.

    The gradients of the rows go to `on_rows`, chunk by chunk; None: they are not wanted. `on_embeddings` gets
    the returned gradient as soon as it is complete, before `on_rows` gets the chunks that the backend holds back. So
    its reduce-scatter and the update of these rows overlap. `cached_exp`: the exponentials that the forward pass kept,
    which save a product.
    """
    if cached_exp is not None:
        return backend.cached_gradient(problem, cached_exp, loss, on_rows, on_embeddings)
    grad_x = torch.zeros(problem.x.shape, device=problem.x.device)
    waiting: deque[tuple[RowSelection, RowGradient]] = deque()
    for chunk in problem.chunks(backend.chunk_size(problem)):
        gradient, operand = backend.chunk_gradient(problem, chunk, loss, rows_wanted=on_rows is not None)
        multiply(gradient.a, operand, grad_x)
        if on_rows is not None:
            waiting.append((chunk.rows, gradient))
            if len(waiting) > backend.hold_back:
                on_rows(*waiting.popleft())
    if on_embeddings is not None:
        on_embeddings(grad_x)
    while on_rows is not None and waiting:
        on_rows(*waiting.popleft())
    return grad_x
