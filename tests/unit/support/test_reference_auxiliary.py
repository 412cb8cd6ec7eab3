"""The references of the losses on embeddings against torch's own, scipy's distances, and numbers worked out by hand."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist
from torch import Tensor

from recognition import config
from tests.support.reference_losses import DenseHead

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])
TRIPLET = config.Head(triplet=config.Triplet(weight=2.0, margin=0.3))
CONTRASTIVE = config.Head(contrastive=config.Contrastive(weight=2.0, margin=1.5))


def embeddings() -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def auxiliary(settings: config.Head, x: Tensor, labels: Tensor = LABELS) -> Tensor:
    return DenseHead.initial(settings, torch.eye(4, 3)).auxiliary(x, labels)


def test_batch_hard_triplets_are_the_worst_of_all() -> None:
    unit = F.normalize(embeddings())
    hardest: dict[int, float] = {}
    for a, p, n in product(range(7), repeat=3):
        if a != p and LABELS[a] == LABELS[p] != LABELS[n]:
            loss = F.triplet_margin_loss(unit[a], unit[p], unit[n], margin=0.3, eps=0).item()
            hardest[a] = max(hardest.get(a, 0.0), loss)
    assert min(hardest.values()) == 0
    assert auxiliary(TRIPLET, embeddings()).item() == pytest.approx(2 * sum(hardest.values()) / 5)


def test_contrastive_means_are_over_each_kind_of_pair() -> None:
    apart = torch.from_numpy(pdist(F.normalize(embeddings()).numpy()))
    genuine = torch.from_numpy(pdist(LABELS[:, None].numpy()) == 0)
    expected = apart[genuine].square().mean() + (1.5 - apart[~genuine]).clamp(min=0).square().mean()
    assert auxiliary(CONTRASTIVE, embeddings()).item() == pytest.approx(2 * expected.item())


def test_pairs_that_are_missing_count_as_zero_and_equal_embeddings_have_a_gradient() -> None:
    for settings in (TRIPLET, CONTRASTIVE):
        assert auxiliary(settings, embeddings()[:1], LABELS[:1]) == 0
        assert torch.autograd.gradcheck(partial(auxiliary, settings), embeddings().requires_grad_())
        x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(auxiliary(settings, x, LABELS[1:5]), x)
        assert not gradient.any()
    assert auxiliary(TRIPLET, embeddings(), torch.zeros(7, dtype=torch.long)) == 0
    assert auxiliary(TRIPLET, embeddings()[:4], torch.arange(4)) == 0


def test_centers_by_hand() -> None:
    head = DenseHead.initial(config.Head(center=config.Center(weight=0.1, rate=0.5)), torch.eye(3, 2))
    x, labels = torch.tensor([[3.0, 0.0], [0.0, 6.0], [2.0, 2.0]], dtype=torch.float64), torch.tensor([1, 1, 2])
    assert head.auxiliary(x, labels).item() == pytest.approx(0.05 * (9 + 36 + 8) / 3)
    head.move_centers(x, labels)
    assert head.centers is not None
    assert head.centers.flatten().tolist() == pytest.approx([0, 0, 0.5, 1, 0.5, 0.5])
    assert head.auxiliary(x, labels).item() == pytest.approx(0.05 * (7.25 + 25.25 + 4.5) / 3)
