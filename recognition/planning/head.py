"""Predict what a head costs a rank: memory, bytes sent, floating-point operations and memory traffic.

Arithmetic alone, so a billion classes are as quick to plan as ten. All numbers are those of the rank with the most
classes, for one step. In the formulas, n is the number of a rank's rows that are active in a step, B the gathered
batch, b the local batch, D the embedding size.
"""

import math
from dataclasses import dataclass

import torch

from recognition import config
from recognition.distributed import shard_rows
from recognition.hardware import head_chunk, product_type
from recognition.head.sampling import BLOCK as _SAMPLING_BLOCK

_ELEMENT_BYTES = {"float32": 4, "split": 4, "bfloat16": 2}
"""Bytes of an element of the class weights, by row format."""
_UPPER_HALF_BYTES = 2
"""Bytes of an element that products in bfloat16 read in the row formats of two halves and of one."""
_PROCESS_BYTES = 28_000_000
"""Bytes of libraries' code and buffers that a process on a CPU loads at their first use, as measured."""


@dataclass(frozen=True)
class HeadPlan:
    """A head that updates its rows in the backward pass, and its cost for a rank."""

    settings: config.Head
    classes: int
    ranks: int
    batch: int
    """b, images per rank and step."""
    embedding_size: int = 512
    device: str = "cuda"
    """`cpu` or `cuda`."""
    optimizer: config.Optimizer | None = None
    """Optimizer of the rows unless `settings` name one; None: SGD."""

    @property
    def global_batch(self) -> int:
        """B, images of all ranks in a step."""
        return self.batch * self.ranks

    @property
    def local_classes(self) -> int:
        """Number of classes of the rank."""
        return len(shard_rows(self.classes, self.ranks, 0))

    @property
    def active_rows(self) -> int:
        """n, the number of rows that take part in a step."""
        classes = self.local_classes
        if self.settings.sample_rate < 1:
            wanted = max(self.settings.sample_rate * self.classes, min(self.global_batch, self.classes))
            classes = min(classes, math.ceil(wanted / self.ranks))
        return classes * self.settings.subcenters

    @property
    def flops(self) -> int:
        """Floating-point operations of the four matrix products of 2 B n D each: logits, logits again in the backward
        pass, and the gradients by embeddings and by rows. A head that caches the logits' exponentials needs only three.
        """
        return 8 * self.global_batch * self.active_rows * self.embedding_size

    @property
    def traffic(self) -> int:
        """Bytes that have to pass between memory and processor: each active row is read for the logits, and read and
        written with its moments in the backward pass."""
        element = _ELEMENT_BYTES[self.settings.row_format]
        read = _UPPER_HALF_BYTES if self._product_bytes == 2 and self.settings.row_format != "float32" else element
        return self.active_rows * self.embedding_size * (read + 2 * element * (1 + self._moments))

    @property
    def state_bytes(self) -> int:
        """Bytes that persist from step to step: class weights, moments and norms."""
        return sum(self.memory[part] for part in ("class weights", "moments", "norms"))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part."""
        size, batch, rows = self.embedding_size, self.global_batch, self.local_classes * self.settings.subcenters
        element, bias = _ELEMENT_BYTES[self.settings.row_format], 4 * (not self.settings.loss.unit_rows)
        counter = 4 * (isinstance(self._optimizer, config.AdamW) or self.settings.inactive_rows == "lazy")
        memory = {
            "class weights": rows * (size * element + bias),
            "moments": rows * (self._moments * (size * element + bias) + counter),
            "norms": rows * 4,
            "workspace": self._workspace,
            # For the gathered batch: embeddings in the products' type and in float32, their gradient and a chunk's part
            # of it. For the local batch: embeddings, their directions, and the gradients by both.
            "gathered batch": batch * (size * (self._product_bytes + 3 * 4) + 16) + self.batch * size * 4 * 4,
        }
        if self.settings.sample_rate < 1:
            # Whether a class is active, positions of those that are, and a block of classes in the permutation.
            memory["sampling"] = (
                self.local_classes + 8 * self.active_rows + 6 * 8 * min(self.local_classes, _SAMPLING_BLOCK)
            )
        if self.settings.center is not None:
            memory["centres"] = self.local_classes * size * 4
        if self.device == "cpu":
            memory["process (a constant)"] = _PROCESS_BYTES
        return memory

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that the rank sends in a step, by collective, each run as a ring."""
        size, batch = self.embedding_size, self.global_batch

        def ring(payload: int) -> int:
            return payload * (self.ranks - 1) // self.ranks

        return {
            "all-gather of embeddings": ring(batch * size * self._product_bytes),
            "all-gather of labels and norms": ring(batch * 16),
            "all-reduce of statistics": 2 * ring(batch * 8),
            "reduce-scatter of gradients": ring(batch * size * 4),
        }

    @property
    def _optimizer(self) -> config.Optimizer:
        return self.settings.optimizer or self.optimizer or config.SGD()

    @property
    def _moments(self) -> int:
        """Number of moments [D] of a row."""
        return 2 if isinstance(self._optimizer, config.AdamW) else 1

    @property
    def _product_bytes(self) -> int:
        """Bytes of an element of the matrix products' operands."""
        precision = self.settings.precision
        # The GPUs planned for need not be in this machine: assume Ampere or later.
        planned = "bfloat16" if precision == "auto" and self.device == "cuda" else precision
        return product_type(planned, torch.device(self.device)).itemsize

    @property
    def _workspace(self) -> int:
        """Bytes for a chunk of classes: its logits, and copies of its rows where they cannot be used in place."""
        if self.device == "cuda" and self.settings.backend != "torch" and self.settings.chunk is None:
            # The gradient by the products for three chunks, and all else for one, as large as there is room for.
            everything = self.active_rows * (
                3 * self.global_batch * self._product_bytes + self.embedding_size * (self._product_bytes + 4)
            )
            return min(self.settings.workspace_mib << 20, everything)
        chunk = min((self.settings.chunk or head_chunk(self.device)) * self.settings.subcenters, self.active_rows)
        # Products, logits and gradient in float32, and the gradient once more where products are of another type.
        logits = self.global_batch * chunk * (3 * 4 + (self._product_bytes if self._product_bytes != 4 else 0))
        in_place = self.settings.row_format == "float32" and self.settings.sample_rate == 1
        copies = 0
        if not in_place or self._product_bytes != 4:
            copies += self._product_bytes
        if not in_place:
            # Rows and moments in float32, as they were and as they will be.
            copies += 2 * 4 * (1 + self._moments)
        if self.settings.row_format == "bfloat16":
            # Random bits as words, and as numbers that are added.
            copies += 4 + 4
        cached_exp = 0
        if self.settings.chunk is None and self.settings.subcenters == 1 and self.settings.filter is None:
            # Exponentials, which some losses do not cache; in float32, the rows' gradient and its product with them.
            cached_exp = min(
                self.settings.workspace_mib << 20, self.global_batch * self.active_rows * self._product_bytes
            )
            copies += 2 * 4
        return logits + chunk * self.embedding_size * copies + cached_exp
