"""The ten folds of a verification set: consecutive pairs, the first P mod 10 folds one larger."""

import numpy as np

FOLDS = 10


def is_uneven(same: np.ndarray) -> bool:
    """Whether the folds' shares of genuine pairs are far from the set's, though another order would give them theirs.

    That is: in one fold by a quarter of it and two pairs, or in all nearly as far as with all genuine pairs first.
    """
    found, best, worst = (_distances(order) for order in (same, same[spread(same)], np.sort(same)))
    sizes = np.array([len(fold) for fold in np.array_split(same, FOLDS)])
    in_one = np.any(found >= np.maximum(2, sizes / 4))
    in_all = worst.sum() > best.sum() and found.sum() >= best.sum() + 0.8 * (worst.sum() - best.sum())
    return bool(in_one or in_all)


def _distances(same: np.ndarray) -> np.ndarray:
    """How many genuine pairs each fold has more or fewer than its share."""
    share = same.mean() if len(same) else 0
    return np.array([abs(fold.sum() - share * len(fold)) for fold in np.array_split(same, FOLDS)])


def spread(same: np.ndarray) -> np.ndarray:
    """An order of the pairs in which each fold has its share of both kinds, each in the order it had."""
    place = np.empty(len(same))
    for kind in (True, False):
        count = np.sum(same == kind)
        place[same == kind] = np.arange(count) / max(count, 1)
    return np.lexsort((~same, place))


def doubts(same: np.ndarray) -> list[str]:
    """What is said of a set whose accuracy over ten folds means less than it seems to."""
    found = []
    if is_uneven(same):
        genuine = ", ".join(str(int(fold.sum())) for fold in np.array_split(same, FOLDS))
        found.append(
            f"its ten folds hold {genuine} genuine pairs, so thresholds chosen on nine of them do not suit the tenth, "
            "and accuracy and its deviation mean little: evaluation.folds=even (--folds even for recognition evaluate) "
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
