"""Verification of a set whose images are split over the ranks."""

import numpy as np
import torch

from recognition import distributed
from recognition.evaluation.embedder import Embedder
from recognition.evaluation.pairs import PairSet
from recognition.evaluation.verification import Verification, embed_pairs, verify
from recognition.preparation import Turns
from recognition.progress import working


def verify_on_ranks(embedder: Embedder, pairs: PairSet, turns: Turns, batch: int) -> Verification:
    """Verify on `pairs`, of whose images each rank embeds its share, `batch` at a time; to be called by all ranks."""
    ranks = turns.ranks
    sizes = distributed.split(2 * len(pairs), ranks.world)
    start = sum(sizes[: ranks.rank])
    part = range(start, start + sizes[ranks.rank])
    own = np.empty((len(part), embedder.embedding_size), np.float32)
    unit = "images" if ranks.world == 1 else "images on each process"
    with working(f"verifying {pairs.name}", len(part), unit) as advance:

        def embed() -> None:
            for first in range(0, len(part), batch):
                own[first : first + batch] = embed_pairs(embedder, pairs, batch, part[first : first + batch])
                advance(min(first + batch, len(part)))

        turns.each(f"verifying {pairs.name}", embed)
        embeddings = distributed.all_gather_rows(torch.from_numpy(own).to(ranks.head_device), sizes)
    return verify(embeddings.cpu().numpy(), pairs.same)
