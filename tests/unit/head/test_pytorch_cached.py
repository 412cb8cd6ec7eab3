"""What the forward pass keeps for the backward pass, against autograd on all logits at once, in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends.chunk_loop import backward
from recognition.head.backends.problem import ActiveClasses, LogitOptions, LogitProblem, LossGradient, NegativeTerm
from recognition.head.backends.products import target_products
from recognition.head.backends.pytorch import PyTorchBackend
from recognition.head.backends.pytorch_cached import CachedExponentials
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import AffineNegatives, CurricularNegatives

CLASSES, SIZE, BATCH, CHUNK = 131, 64, 37, 29
CHUNK_BYTES = 4 * BATCH * CHUNK
# Of float32 numbers: a logit of 96 is off by 1e-5, and so is its exponential. (With 16, nothing is subtracted from it.)
TOLERANCE = 2e-5
PRODUCTS = LogitOptions(unit_rows=True, dtype=torch.float32, chunk=CHUNK)
SUMMAND = NegativeTerm(AffineNegatives(96.0), None, False, 96.0)
SMALL = NegativeTerm(AffineNegatives(16.0), None, False, 16.0)
ROOM = {"nothing": 0, "two chunks": 3 * CHUNK_BYTES - 1, "all": 1 << 20}
WHERE = ("anywhere", "one class", "another rank", "sampled")


def case(where: str) -> tuple[WeightShard, ActiveClasses, Tensor]:
    """Rows of different lengths; embeddings from very near to opposite their class."""
    generator = torch.Generator().manual_seed(1)
    rows = WeightShard.initial(range(CLASSES), SIZE, bias=False, seed=1, device=torch.device("cpu"))
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
    return rows, ActiveClasses.of(labels, shard, classes), x


def run(
    rows: WeightShard, active: ActiveClasses, x: Tensor, options: LogitOptions, negative_term: NegativeTerm = SUMMAND
) -> dict[str, Tensor]:
    """Both passes of a loss whose gradients by the sum's logarithm and the targets' products are given."""
    grad_lse, grad_target = torch.linspace(0.1, 1, len(x)), torch.linspace(-1, -0.1, len(x))
    x = x.to(options.dtype)
    target = target_products(rows, active, x.float(), options)[0]
    problem, backend = LogitProblem(rows, active, x, options, negative_term), PyTorchBackend()
    found = backend.negative_sums(problem, keep=True)
    lse = found.sums[:, 0].log() + found.shift
    gradients = torch.zeros_like(rows.weight)

    def on_rows(part: RowSelection, gradient: RowGradient) -> None:
        gradients[part] = gradient.dense(rows.read(part))

    loss = LossGradient(lse, grad_lse, target, grad_target)
    grad_x = backward(backend, problem, loss, on_rows, None, found.cached_exp)
    return {"log_sum": lse, "by_x": grad_x, "by_rows": gradients}


def expected(rows: WeightShard, active: ActiveClasses, x: Tensor, scale: float = 96.0) -> dict[str, Tensor]:
    classes = torch.arange(CLASSES) if active.classes is None else active.classes
    w, x = rows.weight.double().requires_grad_(), x.double().requires_grad_()
    cosine = x @ F.normalize(w[classes]).T
    own = torch.arange(len(classes)) == active.target_columns[:, None]
    lse = (scale * cosine).masked_fill(own, -torch.inf).logsumexp(1)
    grad_lse, grad_target = torch.linspace(0.1, 1, len(x)), torch.linspace(-1, -0.1, len(x))
    objective = (grad_lse * lse).sum() + (grad_target[:, None] * cosine * own).sum()
    grad_x, by_rows = torch.autograd.grad(objective, (x, w))
    return {"log_sum": lse.detach(), "by_x": grad_x, "by_rows": by_rows}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("negative_term", [SMALL, SUMMAND], ids=["16", "96"])
def test_gradients_are_those_of_all_logits(negative_term: NegativeTerm, room: str, where: str) -> None:
    rows, active, x = case(where)
    found = run(rows, active, x, replace(PRODUCTS, workspace=ROOM[room]), negative_term)
    wanted = expected(rows, active, x, negative_term.bound or 0.0)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= TOLERANCE * value.abs().max(), name


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_finds_room_changes_nothing(dtype: torch.dtype, where: str) -> None:
    rows, active, x = case(where)
    results = [run(rows, active, x, replace(PRODUCTS, dtype=dtype, workspace=room)) for room in ROOM.values()]
    for name, value in results[0].items():
        assert all(torch.equal(result[name], value) for result in results[1:]), name


@pytest.mark.parametrize("where", WHERE)
def test_bfloat16_products_are_as_close_as_without(where: str) -> None:
    rows, active, x = case(where)
    wanted = expected(rows, active, x.bfloat16())
    errors = []
    for workspace in (None, 1 << 20):
        found = run(rows, active, x, replace(PRODUCTS, dtype=torch.bfloat16, workspace=workspace))
        errors.append({name: ((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted})
    for name, without in errors[0].items():
        assert errors[1][name] <= 1.5 * without + 2e-3, name


@pytest.mark.parametrize(("room", "chunks_kept"), [("nothing", 0), ("two chunks", 2), ("all", 5)])
def test_what_is_kept_stays_within_its_room(room: str, chunks_kept: int) -> None:
    rows, active, x = case("anywhere")
    problem = LogitProblem(rows, active, x, replace(PRODUCTS, workspace=ROOM[room]), SUMMAND)
    cached_exp = PyTorchBackend().negative_sums(problem, keep=True).cached_exp
    assert isinstance(cached_exp, CachedExponentials)
    assert len(cached_exp.exponentials) == chunks_kept
    assert sum(each.nbytes for each in cached_exp.exponentials) <= ROOM[room]


@pytest.mark.parametrize(
    ("options", "negative_term"),
    [
        (PRODUCTS, SUMMAND),
        (
            replace(PRODUCTS, workspace=1 << 20),
            replace(SUMMAND, negatives=CurricularNegatives(16.0, torch.tensor(0.3))),
        ),
        (replace(PRODUCTS, workspace=1 << 20), replace(SUMMAND, logistic=True)),
        (replace(PRODUCTS, workspace=1 << 20), replace(SUMMAND, bound=None)),
        (replace(PRODUCTS, workspace=1 << 20, unit_rows=False), SUMMAND),
    ],
)
def test_other_losses_keep_nothing(options: LogitOptions, negative_term: NegativeTerm) -> None:
    rows, active, x = case("anywhere")
    if negative_term.negatives is not SUMMAND.negatives:
        negative_term = replace(negative_term, hard_boundary=torch.zeros(BATCH))
    problem = LogitProblem(rows, active, x, options, negative_term)
    assert PyTorchBackend().negative_sums(problem, keep=True).cached_exp is None


def test_without_a_backward_pass_nothing_is_kept() -> None:
    rows, active, x = case("anywhere")
    problem = LogitProblem(rows, active, x, replace(PRODUCTS, workspace=1 << 20), SUMMAND)
    kept, found = (PyTorchBackend().negative_sums(problem, keep=keep) for keep in (True, False))
    assert found.cached_exp is None
    torch.testing.assert_close(found.sums, kept.sums, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_rank_without_classes_has_nothing_to_say(sampled: bool) -> None:
    rows = WeightShard.initial(range(7 if sampled else 0), SIZE, bias=False, seed=1, device=torch.device("cpu"))
    active = ActiveClasses(torch.empty(0, dtype=torch.int64) if sampled else None, torch.full((5,), -1))
    options, x = replace(PRODUCTS, workspace=1 << 20), F.normalize(torch.ones(5, SIZE))
    problem, backend = LogitProblem(rows, active, x, options, SUMMAND), PyTorchBackend()
    found = backend.negative_sums(problem, keep=True)
    assert torch.equal(found.sums, torch.zeros(5, 1))
    zeros = torch.zeros(5)
    cached_exp = found.cached_exp
    assert isinstance(cached_exp, CachedExponentials)
    assert not backward(backend, problem, LossGradient(*[zeros] * 4), None, None, cached_exp).any()
