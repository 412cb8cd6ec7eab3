"""Verification over ranks: all of them read the sets, and each embeds its share of the images."""

import numpy as np
import torch

from recognition import distributed
from recognition.config import Config
from recognition.distributed.coordinator import Coordinator
from recognition.errors import UserError
from recognition.evaluation.embedder import Embedder
from recognition.evaluation.pairs import PairSet
from recognition.evaluation.verification import Verification, embed_pairs, verify
from recognition.evaluation.verification_sets import open_sets
from recognition.tracking.progress import task


def open_on_ranks(config: Config, coordinator: Coordinator) -> list[PairSet]:
    """Read and check the verification sets; to be called by all ranks. Raises UserError as `open_sets` does."""
    settings = config.evaluation

    def read() -> list[PairSet]:
        return open_sets(
            settings.pairs,
            config.backbone.image_size,
            folder=settings.image_folder,
            missing=settings.missing_images,
            folds=settings.folds,
            fit=config.data.fit,
        )

    sets = coordinator.on_each("reading verification sets", read) or []
    numbers = distributed.gather_objects([len(pairs) for pairs in sets])
    for rank, other in enumerate(numbers):
        for pairs, first, count in zip(sets, numbers[0], other, strict=True):
            if count != first:
                raise UserError(
                    f"{pairs.name} has {first} pairs on rank 0 and {count} on rank {rank}: every machine needs its "
                    "images, and the same"
                )
    return sets


def verify_on_ranks(embedder: Embedder, pairs: PairSet, coordinator: Coordinator, batch: int, fit: str) -> Verification:
    """Verify on `pairs`; each rank embeds its share of the images, `batch` at a time. All ranks call together.

    `fit`: how an image of another size is fitted to the backbone's, as in `data.fit`.
    """
    ranks = coordinator.ranks
    sizes = distributed.split(2 * len(pairs), ranks.world)
    start = sum(sizes[: ranks.rank])
    part = range(start, start + sizes[ranks.rank])
    own = np.empty((len(part), embedder.embedding_size), np.float32)
    unit = "images" if ranks.world == 1 else "images on each process"
    with task(f"verifying {pairs.name}", len(part), unit) as advance:

        def embed() -> None:
            for first in range(0, len(part), batch):
                own[first : first + batch] = embed_pairs(embedder, pairs, batch, part[first : first + batch], fit)
                advance(min(first + batch, len(part)))

        coordinator.on_each(f"verifying {pairs.name}", embed)
        embeddings = distributed.all_gather_rows(torch.from_numpy(own).to(ranks.head_device), sizes)
    return verify(embeddings.cpu().numpy(), pairs.same)
