"""What the forward pass keeps for the backward pass, against autograd on all logits at once, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends import pytorch
from recognition.head.backends.problem import Kept, Products, Summand, Taking
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import Part, Rows
from recognition.head.losses.negatives import Curricular, Linear

CLASSES, SIZE, BATCH, CHUNK = 131, 64, 37, 29
CHUNK_BYTES = 4 * BATCH * CHUNK
# Of float32 numbers: a logit of 96 is off by 1e-5, and so is its exponential. (With 16, nothing is subtracted from it.)
TOLERANCE = 2e-5
PRODUCTS = Products(unit_rows=True, dtype=torch.float32, chunk=CHUNK)
SUMMAND = Summand(Linear(96.0), None, False, 96.0)
SMALL = Summand(Linear(16.0), None, False, 16.0)
ROOM = {"nothing": 0, "two chunks": 3 * CHUNK_BYTES - 1, "all": 1 << 20}
WHERE = ("anywhere", "one class", "another rank", "sampled")


def case(where: str) -> tuple[Rows, Taking, Tensor]:
    """Rows of different lengths; embeddings from very near to opposite their class."""
    generator = torch.Generator().manual_seed(1)
    rows = Rows.initial(range(CLASSES), SIZE, bias=False, seed=1, device=torch.device("cpu"))
    rows.load(rows.weight * torch.linspace(0.1, 10, CLASSES)[:, None])
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    if where == "one class":
        labels[:] = CHUNK
    noise = F.normalize(torch.randn(BATCH, SIZE, generator=generator))
    x = F.normalize(F.normalize(rows.weight[labels]) * torch.linspace(3, -3, BATCH)[:, None] + noise)
    classes = None
    if where == "sampled":
        classes = torch.cat([labels, torch.randperm(CLASSES, generator=generator)[:60]]).unique()
    shard = range(CLASSES, 2 * CLASSES) if where == "another rank" else range(CLASSES)
    return rows, Taking.of(labels, shard, classes), x


def run(rows: Rows, taking: Taking, x: Tensor, products: Products, summand: Summand = SUMMAND) -> dict[str, Tensor]:
    """Both passes of a loss whose gradients by the sum's logarithm and the targets' products are given."""
    by_sum, by_target = torch.linspace(0.1, 1, len(x)), torch.linspace(-1, -0.1, len(x))
    x = x.to(products.dtype)
    target = pytorch.targets(rows, taking, x.float(), products)[0]
    found = pytorch.statistics(rows, taking, x, products, summand)
    log_sum = found.sums[:, 0].log() + found.shift
    gradients = torch.zeros_like(rows.weight)

    def sink(part: Part, gradient: RowGradient) -> None:
        gradients[part] = gradient.dense(rows.read(part))

    vectors = log_sum, by_sum, target, by_target
    by_x = pytorch.backward(rows, taking, x, products, summand, *vectors, sink, None, found.kept)  # type: ignore[arg-type]
    return {"log_sum": log_sum, "by_x": by_x, "by_rows": gradients}


def expected(rows: Rows, taking: Taking, x: Tensor, scale: float = 96.0) -> dict[str, Tensor]:
    classes = torch.arange(CLASSES) if taking.classes is None else taking.classes
    w, x = rows.weight.double().requires_grad_(), x.double().requires_grad_()
    cosine = x @ F.normalize(w[classes]).T
    own = torch.arange(len(classes)) == taking.columns[:, None]
    log_sum = (scale * cosine).masked_fill(own, -torch.inf).logsumexp(1)
    by_sum, by_target = torch.linspace(0.1, 1, len(x)), torch.linspace(-1, -0.1, len(x))
    objective = (by_sum * log_sum).sum() + (by_target[:, None] * cosine * own).sum()
    by_x, by_rows = torch.autograd.grad(objective, (x, w))
    return {"log_sum": log_sum.detach(), "by_x": by_x, "by_rows": by_rows}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("summand", [SMALL, SUMMAND], ids=["16", "96"])
def test_gradients_are_those_of_all_logits(summand: Summand, room: str, where: str) -> None:
    rows, taking, x = case(where)
    found = run(rows, taking, x, replace(PRODUCTS, workspace=ROOM[room]), summand)
    wanted = expected(rows, taking, x, summand.bound or 0.0)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_finds_room_changes_nothing(dtype: torch.dtype, where: str) -> None:
    rows, taking, x = case(where)
    results = [run(rows, taking, x, replace(PRODUCTS, dtype=dtype, workspace=room)) for room in ROOM.values()]
    for name, value in results[0].items():
        assert all(torch.equal(result[name], value) for result in results[1:]), name


@pytest.mark.parametrize("where", WHERE)
def test_bfloat16_products_are_as_close_as_without(where: str) -> None:
    rows, taking, x = case(where)
    wanted = expected(rows, taking, x.bfloat16())
    errors = []
    for workspace in (None, 1 << 20):
        found = run(rows, taking, x, replace(PRODUCTS, dtype=torch.bfloat16, workspace=workspace))
        errors.append({name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted})
    for name, without in errors[0].items():
        assert errors[1][name] <= 1.5 * without + 2e-3, name


@pytest.mark.parametrize(("room", "chunks_kept"), [("nothing", 0), ("two chunks", 2), ("all", 5)])
def test_what_is_kept_stays_within_its_room(room: str, chunks_kept: int) -> None:
    rows, taking, x = case("anywhere")
    kept = pytorch.statistics(rows, taking, x, replace(PRODUCTS, workspace=ROOM[room]), SUMMAND).kept
    assert isinstance(kept, Kept)
    assert len(kept.exponentials) == chunks_kept
    assert sum(each.nbytes for each in kept.exponentials) <= ROOM[room]


@pytest.mark.parametrize(
    ("products", "summand"),
    [
        (PRODUCTS, SUMMAND),
        (replace(PRODUCTS, workspace=1 << 20), replace(SUMMAND, negatives=Curricular(16.0, torch.tensor(0.3)))),
        (replace(PRODUCTS, workspace=1 << 20), replace(SUMMAND, logistic=True)),
        (replace(PRODUCTS, workspace=1 << 20), replace(SUMMAND, bound=None)),
        (replace(PRODUCTS, workspace=1 << 20, unit_rows=False), SUMMAND),
    ],
)
def test_other_losses_keep_nothing(products: Products, summand: Summand) -> None:
    rows, taking, x = case("anywhere")
    if summand.negatives is not SUMMAND.negatives:
        summand = replace(summand, anchor=torch.zeros(BATCH))
    assert pytorch.statistics(rows, taking, x, products, summand).kept is None


@pytest.mark.parametrize("sampled", [False, True])
def test_a_rank_without_classes_has_nothing_to_say(sampled: bool) -> None:
    rows = Rows.initial(range(7 if sampled else 0), SIZE, bias=False, seed=1, device=torch.device("cpu"))
    taking = Taking(torch.empty(0, dtype=torch.int64) if sampled else None, torch.full((5,), -1))
    products, x = replace(PRODUCTS, workspace=1 << 20), F.normalize(torch.ones(5, SIZE))
    found = pytorch.statistics(rows, taking, x, products, SUMMAND)
    assert torch.equal(found.sums, torch.zeros(5, 1))
    zeros = torch.zeros(5)
    kept = found.kept
    assert isinstance(kept, Kept)
    assert not pytorch.backward(rows, taking, x, products, SUMMAND, *[zeros] * 4, None, None, kept).any()
