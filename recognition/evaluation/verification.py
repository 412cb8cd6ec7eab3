"""1:1 verification: LFW's 10-fold protocol as in arcface_torch's `eval/verification.py`, and TAR@FAR."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recognition.errors import UserError
from recognition.evaluation.embedder import Embedder
from recognition.evaluation.folds import FOLDS
from recognition.evaluation.pairs import PairSet
from recognition.images import fit as fit_image

THRESHOLDS = np.arange(0, 4, 0.01)
"""Thresholds that are tried: squared distances of unit vectors."""
FARS = {f"1e-{exponent}": 10**exponent for exponent in range(1, 5)}
"""Reported false accept rates, each with the number of impostor pairs per false accept."""


@dataclass(frozen=True)
class Verification:
    """Results of one verification set."""

    accuracy: float
    """Mean of the folds' accuracies, in [0, 1]."""
    accuracy_std: float
    """Standard deviation of the folds' accuracies (ddof 0)."""
    threshold: float
    """Mean threshold of the folds: squared Euclidean distance of unit vectors, in [0, 4)."""
    tar_at_far: dict[str, float | None]
    """True accept rate at each false accept rate; None if there are too few impostor pairs to measure it."""
    pairs: int
    """Number of pairs, P."""
    scores: tuple[np.ndarray, np.ndarray] = field(
        default_factory=lambda: (np.empty(0), np.empty(0)), compare=False, repr=False
    )
    """Cosines of the genuine pairs and of the impostor pairs."""

    def to_json(self) -> dict[str, Any]:
        """Return the results as JSON's types, without the scores."""
        names = ("accuracy", "accuracy_std", "threshold", "tar_at_far", "pairs")
        return {name: getattr(self, name) for name in names}


def embed_pairs(
    embedder: Embedder, pairs: PairSet, batch: int, part: range | None = None, fit: str = "resize"
) -> np.ndarray:
    """Embed the set's images, or those with numbers in `part`, as f(x) + f(flip(x)), float32 [n, D], not normalised.

    `batch` images are decoded and embedded at a time; `fit` (as `data.fit`) is the treatment of images of another size
    than the embedder's. Raises UserError for an image that does not decode, and for one of another size if `fit` is
    "exact".
    """
    part = range(2 * len(pairs)) if part is None else part
    embeddings = np.empty((len(part), embedder.embedding_size), np.float32)
    for start in range(0, len(part), batch):
        images = np.stack([_decode(pairs, image, embedder.image_size, fit) for image in part[start : start + batch]])
        flipped = np.ascontiguousarray(images[:, :, ::-1])
        embeddings[start : start + batch] = embedder(images) + embedder(flipped)
    return embeddings


def _decode(pairs: PairSet, image: int, size: int, how: str) -> np.ndarray:
    pixels = pairs.decode(image)
    try:
        return fit_image(pixels, size, how)
    except ValueError as error:
        raise UserError(
            f"{pairs.describe(image)} is {error}, which is what the model takes. Align the faces to that size in the "
            "way of the training images, or let them be scaled: data.fit=resize or data.fit=crop, and --fit of "
            "recognition evaluate"
        ) from None


def verify(embeddings: np.ndarray, same: np.ndarray) -> Verification:
    """Compute the verification results of embeddings [2P, D] (normalised here) and `same`, bool [P].

    Protocol of deepinsight/insightface, recognition/arcface_torch/eval/verification.py: squared Euclidean distance of
    unit vectors; a pair is accepted below a threshold of `arange(0, 4, 0.01)`; folds are consecutive pairs, the first
    P mod 10 one larger; each is judged by the threshold that is most accurate on the other nine, the lowest of equals.
    TAR@FAR is over all pairs, at the highest threshold whose false accept rate is at most the one asked for (no
    interpolation). An embedding that is zero stays so.

    Raises UserError for fewer than ten pairs, pairs of one kind only, or embeddings that are not finite.
    """
    embeddings = np.asarray(embeddings, np.float64)
    same = np.asarray(same, bool)
    if len(embeddings) != 2 * len(same):
        raise ValueError(f"{len(embeddings)} embeddings for {len(same)} pairs")
    require_both_kinds(same)
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise UserError(
            f"{np.sum(~finite)} of {len(finite)} embeddings are not finite, the first that of image {first % 2 + 1} of "
            f"pair {first // 2 + 1}: the model is broken. Of a run, `recognition export RUN --output FILE "
            "--which best` may give a whole one; another run can begin at an earlier checkpoint: backbone.weights=..."
        )
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(norms == 0, 1, norms)
    distances = np.square(unit[0::2] - unit[1::2]).sum(axis=1)
    cosines = (unit[0::2] * unit[1::2]).sum(axis=1)
    accuracies, thresholds = _folds(distances, same)
    return Verification(
        accuracy=float(accuracies.mean()),
        accuracy_std=float(accuracies.std()),
        threshold=float(thresholds.mean()),
        tar_at_far=_tar_at_far(distances[same], distances[~same]),
        pairs=len(same),
        scores=(cosines[same], cosines[~same]),
    )


def require_both_kinds(same: np.ndarray) -> None:
    """Raise UserError for fewer than ten pairs, or pairs of one kind only, which the protocol cannot judge."""
    if len(same) < FOLDS:
        raise UserError(f"{len(same)} pairs, but {FOLDS}-fold verification takes {FOLDS} at least: use a larger set")
    if same.all() or not same.any():
        kind, missing = ("genuine", "impostor") if same.all() else ("impostor", "genuine")
        raise UserError(
            f"all {len(same)} pairs are {kind}, so accuracy has no meaning: use a set with {missing} pairs too"
        )


def _folds(distances: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return accuracy and threshold of each fold, [10] each."""
    folds = list(zip(np.array_split(distances, FOLDS), np.array_split(same, FOLDS), strict=True))
    correct = np.stack([_correct(*fold) for fold in folds])
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    sizes = np.array([len(fold) for _, fold in folds])
    return correct[np.arange(FOLDS), best] / sizes, THRESHOLDS[best]


def _correct(distances: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Count the pairs of a fold that each threshold classifies correctly, [400]."""
    accepted_genuine = np.searchsorted(np.sort(distances[same]), THRESHOLDS, side="left")
    accepted_impostors = np.searchsorted(np.sort(distances[~same]), THRESHOLDS, side="left")
    return accepted_genuine + np.sum(~same) - accepted_impostors


def _tar_at_far(genuine: np.ndarray, impostors: np.ndarray) -> dict[str, float | None]:
    impostors = np.sort(impostors)
    rates: dict[str, float | None] = {}
    for name, per_accept in FARS.items():
        accepts = len(impostors) // per_accept
        rates[name] = float(np.mean(genuine < impostors[accepts])) if accepts else None
    return rates
