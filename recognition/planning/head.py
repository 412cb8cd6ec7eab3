"""What a head costs before it is built: memory, bytes on the wire, floating-point operations, memory traffic.

Arithmetic alone, so a billion classes are as quick to plan as ten. All numbers are of the rank with the most classes,
and of one step. In the formulas, r is the rows of a rank, n those that take part in a step, m the rows of a chunk, B
the gathered batch, b a rank's own, D the embedding size.
"""

import math
from dataclasses import dataclass

import torch

from recognition import config
from recognition.distributed import shard_rows
from recognition.hardware import head_chunk, product_type
from recognition.head.sampling import BLOCK as _SAMPLED_AT_A_TIME

_NUMBER = {"float32": 4, "split": 4, "bfloat16": 2}
"""Bytes of a number of the class weights, by the format of the rows."""
_UPPER = 2
"""Bytes of a number of the class weights that products in bfloat16 read, if it is kept in halves."""
_PROCESS = 28_000_000
"""Bytes of libraries' code and buffers that a process on a CPU takes in as it first uses them, as measured."""


@dataclass(frozen=True)
class HeadPlan:
    """A head to be built, fused, and what it costs."""

    settings: config.Head
    classes: int
    ranks: int
    batch: int
    """b, images per rank."""
    embedding_size: int = 512
    device: str = "cuda"
    """`cpu` or `cuda`."""
    optimizer: config.Optimizer | None = None
    """What moves the rows where `settings` do not say."""

    @property
    def gathered(self) -> int:
        """B"""
        return self.batch * self.ranks

    @property
    def shard(self) -> int:
        """Classes of the rank."""
        return len(shard_rows(self.classes, self.ranks, 0))

    @property
    def taken(self) -> int:
        """n"""
        classes = self.shard
        if self.settings.sample_rate < 1:
            wanted = max(self.settings.sample_rate * self.classes, min(self.gathered, self.classes))
            classes = min(classes, math.ceil(wanted / self.ranks))
        return classes * self.settings.subcenters

    @property
    def flops(self) -> int:
        """Floating-point operations of the four matrix products: logits, logits again in the backward pass, and the
        gradients by embeddings and by rows, 2 B n D each. Nothing else is counted. A head that keeps the logits'
        exponentials takes only three of the four."""
        return 8 * self.gathered * self.taken * self.embedding_size

    @property
    def traffic(self) -> int:
        """Bytes that have to pass between memory and processor: each row that takes part is read for the logits, and
        read and written with its moments in the backward pass. Nothing else is counted."""
        number = _NUMBER[self.settings.row_format]
        read = _UPPER if self._product == 2 and self.settings.row_format != "float32" else number
        return self.taken * self.embedding_size * (read + 2 * number * (1 + self._moments))

    @property
    def state_bytes(self) -> int:
        """What lasts from step to step: class weights, moments and norms."""
        return sum(self.memory[part] for part in ("class weights", "moments", "norms"))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part."""
        size, gathered, rows = self.embedding_size, self.gathered, self.shard * self.settings.subcenters
        number, bias = _NUMBER[self.settings.row_format], 4 * (not self.settings.loss.unit_rows)
        counter = 4 * (isinstance(self._moves, config.AdamW) or self.settings.inactive_rows == "lazy")
        memory = {
            "class weights": rows * (size * number + bias),
            "moments": rows * (self._moments * (size * number + bias) + counter),
            "norms": rows * 4,
            "workspace": self._workspace,
            # The batch in the products' type and in float32, its gradient and a chunk's share of it; and of a rank's
            # own, the embeddings, their direction, and the gradients by both.
            "gathered batch": gathered * (size * (self._product + 3 * 4) + 16) + self.batch * size * 4 * 4,
        }
        if self.settings.sample_rate < 1:
            # Which classes take part, their positions, and a block of classes on their way through the permutation.
            memory["sampling"] = self.shard + 8 * self.taken + 6 * 8 * min(self.shard, _SAMPLED_AT_A_TIME)
        if self.settings.center is not None:
            memory["centres"] = self.shard * size * 4
        if self.device == "cpu":
            memory["process (a constant)"] = _PROCESS
        return memory

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that the rank sends, by collective, each run as a ring."""
        size, gathered = self.embedding_size, self.gathered

        def ring(payload: int) -> int:
            return payload * (self.ranks - 1) // self.ranks

        return {
            "all-gather of embeddings": ring(gathered * size * self._product),
            "all-gather of labels and norms": ring(gathered * 16),
            "all-reduce of statistics": 2 * ring(gathered * 8),
            "reduce-scatter of gradients": ring(gathered * size * 4),
        }

    @property
    def _moves(self) -> config.Optimizer:
        return self.settings.optimizer or self.optimizer or config.SGD()

    @property
    def _moments(self) -> int:
        """How many moments of its length a row has."""
        return 2 if isinstance(self._moves, config.AdamW) else 1

    @property
    def _product(self) -> int:
        """Bytes of a number in the matrix products."""
        precision = self.settings.precision
        # Of GPUs, which need not be here, those from Ampere on are planned for.
        planned = "bfloat16" if precision == "auto" and self.device == "cuda" else precision
        return product_type(planned, torch.device(self.device)).itemsize

    @property
    def _workspace(self) -> int:
        """What a chunk of classes needs: its logits, and copies of its rows where they cannot be used in place."""
        if self.device == "cuda" and self.settings.backend != "torch" and self.settings.chunk is None:
            # The gradient by the products of three chunks, and all else of one, as large as there is room for.
            everything = self.taken * (3 * self.gathered * self._product + self.embedding_size * (self._product + 4))
            return min(self.settings.workspace_mib << 20, everything)
        chunk = min((self.settings.chunk or head_chunk(self.device)) * self.settings.subcenters, self.taken)
        # Products, logits and gradient in float32, and the gradient once more where products are of another type.
        logits = self.gathered * chunk * (3 * 4 + (self._product if self._product != 4 else 0))
        in_place = self.settings.row_format == "float32" and self.settings.sample_rate == 1
        copies = 0
        if not in_place or self._product != 4:
            copies += self._product
        if not in_place:
            # Rows and moments in float32, as they were and as they will be.
            copies += 2 * 4 * (1 + self._moments)
        if self.settings.row_format == "bfloat16":
            # Random bits: words, and what becomes of them.
            copies += 4 + 4
        cached_exp = 0
        if self.settings.chunk is None and self.settings.subcenters == 1 and self.settings.filter is None:
            # Exponentials, of which some losses keep none; in float32, the rows' gradient and its product with them.
            cached_exp = min(self.settings.workspace_mib << 20, self.gathered * self.taken * self._product)
            copies += 2 * 4
        return logits + chunk * self.embedding_size * copies + cached_exp
