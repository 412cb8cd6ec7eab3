"""The ten folds of a verification set: consecutive pairs; the first P mod 10 folds have one more."""

import numpy as np

FOLDS = 10


def is_uneven(same: np.ndarray) -> bool:
    """Tell whether the folds' shares of genuine pairs differ from the set's by far more than an even order's would.

    They do if one fold is off by a quarter of its pairs (at least two), or if the sum over the folds is at least 80 %
    of the way from the even order to the order with all pairs of one kind first.
    """
    found, best, worst = (_distances(order) for order in (same, same[spread_evenly(same)], np.sort(same)))
    sizes = np.array([len(fold) for fold in np.array_split(same, FOLDS)])
    in_one = np.any(found >= np.maximum(2, sizes / 4))
    in_all = worst.sum() > best.sum() and found.sum() >= best.sum() + 0.8 * (worst.sum() - best.sum())
    return bool(in_one or in_all)


def _distances(same: np.ndarray) -> np.ndarray:
    """Return by how many genuine pairs each fold differs from its share, [10]."""
    share = same.mean() if len(same) else 0
    return np.array([abs(fold.sum() - share * len(fold)) for fold in np.array_split(same, FOLDS)])


def spread_evenly(same: np.ndarray) -> np.ndarray:
    """Order the pairs, int64 [P], so that each fold has its share of both kinds; each kind keeps its own order."""
    place = np.empty(len(same))
    for kind in (True, False):
        count = np.sum(same == kind)
        place[same == kind] = np.arange(count) / max(count, 1)
    return np.lexsort((~same, place))


def fold_warnings(same: np.ndarray) -> list[str]:
    """Return sentences on why accuracy over ten folds would mislead for this set; none if it would not."""
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
