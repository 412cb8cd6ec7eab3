"""The ten folds of a verification set: consecutive pairs, the first P mod 10 folds one larger."""

import numpy as np

FOLDS = 10


def is_uneven(same: np.ndarray) -> bool:
    """Whether some fold's share of genuine pairs is far from the set's: a quarter of it, and two pairs at least."""
    share = same.mean() if len(same) else 0
    return any(abs(fold.sum() - share * len(fold)) >= max(2, len(fold) / 4) for fold in np.array_split(same, FOLDS))


def spread(same: np.ndarray) -> np.ndarray:
    """An order of the pairs in which each fold has its share of both kinds, each in the order it had."""
    place = np.empty(len(same))
    for kind in (True, False):
        count = np.sum(same == kind)
        place[same == kind] = (np.arange(count) + 0.5) / max(count, 1)
    return np.lexsort((~same, place))


def doubts(same: np.ndarray) -> list[str]:
    """What is said of a set whose accuracy over ten folds means less than it seems to."""
    found = []
    if is_uneven(same):
        genuine = ", ".join(str(int(fold.sum())) for fold in np.array_split(same, FOLDS))
        found.append(
            f"its ten folds hold {genuine} genuine pairs, so thresholds chosen on nine of them do not suit the tenth, "
            "and accuracy and its deviation mean little: evaluation.folds=even (--folds even for tools/evaluate.py) "
            "spreads both kinds over the folds"
        )
    rarer = min(same.mean(), 1 - same.mean()) if len(same) else 0
    if 0 < rarer < 0.2:
        kind = "genuine" if same.mean() < 0.5 else "impostor"
        found.append(
            f"only {rarer:.1%} of its pairs are {kind}, so a model that takes no image for another's has an accuracy "
            f"of {1 - rarer:.1%} already: go by TAR@FAR"
            if kind == "genuine"
            else f"only {rarer:.1%} of its pairs are {kind}, so a model that takes all images for one person's has an "
            f"accuracy of {1 - rarer:.1%} already: go by TAR@FAR"
        )
    return found
