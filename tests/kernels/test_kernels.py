"""The kernels in Triton's interpreter, against autograd on all logits at once in float64."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition.head.backends import tiles, triton_backend
from recognition.head.backends.chunk_loop import backward
from recognition.head.backends.problem import (
    ActiveClasses,
    Chunk,
    LogitOptions,
    LogitProblem,
    LossGradient,
    NegativeTerm,
    rows_of,
)
from recognition.head.backends.products import target_products
from recognition.head.backends.triton_backend import TritonBackend
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowSelection, WeightShard
from recognition.head.losses.negatives import (
    AffineNegatives,
    CurricularNegatives,
    FilteredNegatives,
    Negatives,
    SphereFaceRNegatives,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the device")
BATCH = 37
ROUNDING = 1e-5
"""Error of sums in float32, relative to the largest: 6e-8 of a logit of up to 96, which its exponential multiplies."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are several, with ragged edges, and several splits."""
    monkeypatch.setattr(tiles, "tile", lambda *_, **__: tiles.Tile(16, 32, 32, 4, 2))
    monkeypatch.setattr(triton_backend, "_PROCESSORS", 4)


def filled(count: int, size: int, *, bias: bool = False, state: str = "float32") -> WeightShard:
    rows = WeightShard.initial(range(count), size, bias=bias, seed=1, device=torch.device("cpu"), row_format=state)  # type: ignore[arg-type]
    if rows.bias is not None:
        rows.bias.normal_(generator=torch.Generator().manual_seed(3))
    return rows


def batch(rows: WeightShard, labels: Tensor, centers: int = 1, size: int = BATCH) -> Tensor:
    """Unit embeddings from very near to opposite their class: the first and the last lie on it."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(size, rows.weight.shape[1], generator=generator)
    pull = torch.linspace(3, -3, size)[:, None]
    near = F.normalize(rows.read(labels * centers))
    x = F.normalize(near * pull + F.normalize(noise))
    x[0], x[-1] = near[0], -near[-1]
    return x


def expected(problem: LogitProblem, loss: LossGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, gradient by x, gradient by the rows that take part: autograd on all logits at once, in float64."""
    rows, options, term = problem.weights, problem.options, problem.term
    classes = torch.arange(problem.count) if problem.active.classes is None else problem.active.classes
    part = rows_of(classes, options.centers)
    w, x = rows.read(part).double().requires_grad_(), problem.x.double().requires_grad_()
    dots = x @ (F.normalize(w) if options.unit_rows else w).T
    if rows.bias is not None:
        dots = dots + rows.bias[part].double()
    cosine = dots.view(len(x), -1, options.centers).amax(2)
    hard_boundary = None if term.hard_boundary is None else term.hard_boundary.double()
    own = torch.arange(len(classes)) == problem.active.target_columns[:, None]
    z = term.negatives.logits(cosine, hard_boundary).masked_fill(own, -torch.inf)
    lse, grad_lse, grad_target = (vector.double() for vector in (loss.lse, loss.grad_lse, loss.grad_target))
    if term.logistic:
        sums = torch.stack([F.softplus(z).sum(1), torch.sigmoid(z).sum(1)], 1)
        objective = (grad_lse * sums[:, 0]).sum()
    else:
        sums = z.exp().sum(1, keepdim=True)
        objective = (grad_lse * sums[:, 0] * (-lse).exp()).sum()
    objective = objective + (grad_target[:, None] * cosine * own).sum()
    grad_x, by_w = torch.autograd.grad(objective, (x, w))
    return sums.detach(), grad_x, by_w


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


CASES: dict[str, tuple[int, int, int, Negatives, dict[str, Any]]] = {
    # classes, D, K, negatives, what else
    "linear": (131, 64, 1, AffineNegatives(32.0), {}),
    "ragged": (67, 40, 1, AffineNegatives(16.0), {}),
    "one class": (1, 32, 1, AffineNegatives(16.0), {}),
    "sampled": (131, 64, 1, AffineNegatives(32.0), {"sampled": 50}),
    "large scale": (131, 64, 1, AffineNegatives(96.0), {"bound": 96.0}),
    "no bound": (131, 64, 1, AffineNegatives(torch.tensor(40.0)), {"bound": None}),
    "bias": (131, 64, 1, AffineNegatives(1.0), {"bound": None, "unit": False}),
    "curricular, sampled": (131, 64, 1, CurricularNegatives(16.0, torch.tensor(0.3)), {"anchor": True, "sampled": 60}),
    "logistic": (131, 64, 1, AffineNegatives(16.0, torch.tensor(-9.0)), {"logistic": True}),
    "logistic, tiny terms": (131, 64, 1, AffineNegatives(8.0, torch.tensor(-30.0)), {"logistic": True}),
    "divided angle": (131, 64, 1, SphereFaceRNegatives(32.0, 1.4), {"bound": 32.0}),
    "filtered": (131, 64, 1, FilteredNegatives(AffineNegatives(16.0), 0.2, zero=False), {}),
    "filtered to zero": (131, 64, 1, FilteredNegatives(AffineNegatives(16.0), 0.2, zero=True), {}),
    "sub-centres, sampled": (61, 64, 3, AffineNegatives(16.0), {"sampled": 40}),
    "split": (131, 64, 1, AffineNegatives(16.0), {"state": "split"}),
    "bfloat16": (131, 64, 1, AffineNegatives(16.0), {"state": "bfloat16"}),
    "no target here": (131, 64, 1, AffineNegatives(16.0), {"targets": "none"}),
    "all targets one": (131, 64, 1, AffineNegatives(16.0), {"targets": "one"}),
    "kept": (131, 64, 1, AffineNegatives(96.0), {"bound": 96.0, "workspace": 1 << 20}),
    "kept, sampled": (131, 64, 1, AffineNegatives(torch.tensor(32.0)), {"sampled": 50, "workspace": 1 << 20}),
    "kept, no target here": (131, 64, 1, AffineNegatives(32.0), {"targets": "none", "workspace": 1 << 20}),
    "too large to keep": (131, 64, 1, AffineNegatives(32.0), {"workspace": 4 * BATCH * 131 - 1}),
    "not to be kept": (
        131,
        64,
        1,
        CurricularNegatives(16.0, torch.tensor(0.3)),
        {"anchor": True, "workspace": 1 << 20},
    ),
    "batch of one": (131, 64, 1, AffineNegatives(16.0), {"batch": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "chunk", lambda *_, **__: 29)
    count, size, centers, negatives, options = CASES[name]
    unit = options.get("unit", True)
    rows = filled(count * centers, size, bias=not unit, state=options.get("state", "float32"))
    generator = torch.Generator().manual_seed(5)
    samples = options.get("batch", BATCH)
    labels = torch.randint(count, (samples,), generator=generator)
    if options.get("targets") == "one":
        labels[:] = count // 2
    x = batch(rows, labels, centers, samples)
    shard = range(count) if options.get("targets") != "none" else range(count, 2 * count)
    classes = None
    if "sampled" in options:
        others = torch.randperm(count, generator=generator)[: options["sampled"]]
        classes = torch.cat([labels, others]).unique()
    active = ActiveClasses.of(labels, shard, classes)
    hard_boundary = torch.linspace(-0.5, 0.5, samples) if options.get("anchor") else None
    negative_term = NegativeTerm(negatives, hard_boundary, options.get("logistic", False), options.get("bound", 16.0))
    logit_options = LogitOptions(unit_rows=unit, dtype=torch.float32, chunk=29, centers=centers)
    logit_options = replace(logit_options, workspace=options.get("workspace"))
    problem = LogitProblem(rows, active, x, logit_options, negative_term)
    loss = LossGradient(
        # As of a loss: the gradient by the sum is a share of it.
        lse=torch.full((samples,), 3.0),
        grad_lse=torch.rand(samples, generator=generator),
        target=target_products(rows, active, x, logit_options)[0],
        grad_target=-torch.rand(samples, generator=generator),
    )
    sums, grad_x, by_w = expected(problem, loss)

    backend = TritonBackend()
    found = backend.negative_sums(problem, keep=True)
    scaled = found.sums if negative_term.logistic else found.sums.double() * found.shift.double().exp()[:, None]
    # Of each sample by itself: some sums are tiny beside others.
    assert error(scaled / sums.clamp(min=1e-30), torch.ones_like(sums) * (sums > 0)) < ROUNDING
    gradients: list[tuple[RowSelection, Tensor]] = []

    def on_rows(part: RowSelection, gradient: RowGradient) -> None:
        gradients.append((part, gradient.dense(rows.read(part))))

    on_embeddings: list[int] = []
    found_x = backward(
        backend, problem, loss, on_rows, lambda _: on_embeddings.append(len(gradients)), found.cached_exp
    )
    assert error(found_x, grad_x) < ROUNDING
    assert error(torch.cat([gradient for _, gradient in gradients]), by_w) < ROUNDING
    assert len(gradients) == math.ceil((count if classes is None else len(classes)) / 29)
    # The other ranks get theirs while the last rows' gradient is yet to come.
    assert on_embeddings == [0 if name.startswith("kept") else max(0, len(gradients) - 2)]
    assert (found.cached_exp is not None) == name.startswith("kept")


@pytest.mark.parametrize("sampled", [False, True])
def test_a_rank_without_classes_has_nothing_to_say(sampled: bool) -> None:
    rows = filled(7 if sampled else 0, 32)
    active = ActiveClasses(torch.empty(0, dtype=torch.int64) if sampled else None, torch.full((5,), -1))
    logit_options = LogitOptions(unit_rows=True, dtype=torch.float32, chunk=29, workspace=1 << 20)
    x, negative_term = F.normalize(torch.ones(5, 32)), NegativeTerm(AffineNegatives(16.0), None, False, 16.0)
    problem, backend = LogitProblem(rows, active, x, logit_options, negative_term), TritonBackend()
    found = backend.negative_sums(problem, keep=True)
    taken: list[RowSelection] = []
    on_embeddings: list[Tensor] = []
    assert torch.equal(found.sums, torch.zeros(5, 1))

    def on_rows(part: RowSelection, gradient: RowGradient) -> None:
        taken.append(part)

    loss = LossGradient(*[torch.ones(5)] * 4)
    grad_x = backward(backend, problem, loss, on_rows, on_embeddings.append, found.cached_exp)
    assert torch.equal(grad_x, torch.zeros(5, 32))
    assert len(on_embeddings) == 1 and not taken


def test_rows_beyond_two_to_the_31st_number() -> None:
    size, count = 512, 4_200_000
    # Never touched but for some rows, so the system gives no memory for the others.
    rows = WeightShard(torch.empty(count, size, dtype=torch.bfloat16), torch.ones(count))
    some = torch.tensor([5, count - 40, count - 3])
    assert int(some[1]) * size > 2**31
    few = filled(3, size, state="bfloat16")
    rows.weight[some], rows.inverse_norm[some] = few.weight, few.inverse_norm
    x, logit_options = batch(few, torch.arange(3), size=3), LogitOptions(unit_rows=True, dtype=torch.float32, chunk=64)
    negative_term = NegativeTerm(AffineNegatives(16.0), None, False, 16.0)
    targets = torch.tensor([0, 1, 2])
    sampled = LogitProblem(rows, ActiveClasses(some, targets), x, logit_options, negative_term)
    of_few = LogitProblem(few, ActiveClasses(None, targets), x, logit_options, negative_term)
    loss, backend = LossGradient(torch.zeros(3), torch.ones(3), torch.ones(3), torch.ones(3)), TritonBackend()
    found, wanted = (backend.negative_sums(problem, keep=False).sums for problem in (sampled, of_few))
    torch.testing.assert_close(found, wanted)
    assert torch.equal(backward(backend, sampled, loss, None), backward(backend, of_few, loss, None))
    # A run of rows, as of a whole shard.
    tail = WeightShard(rows.weight[-40:], rows.inverse_norm[-40:])
    tail.weight[:] = tail.weight[37]
    nowhere = ActiveClasses(None, torch.full((3,), -1))
    far, near = (
        backend.chunk_gradient(
            LogitProblem(weights, nowhere, x, logit_options, negative_term),
            Chunk(start, 40, slice(start, start + 40)),
            loss,
            rows_wanted=True,
        )[0]
        for weights, start in ((rows, count - 40), (tail, 0))
    )
    assert torch.equal(far.a, near.a)


def test_the_ops_are_what_torch_expects_of_ops() -> None:
    rows = filled(70, 32)
    x = batch(rows, torch.arange(5), size=5)
    for classes in (None, torch.tensor([0, 3, 60])):
        columns = torch.full((5,), -1)
        columns[0] = 1
        tensors = (x, rows.weight, rows.low, rows.inverse_norm, None, classes, columns, None, torch.tensor([16.0, 0.0]))
        options: dict[str, Any] = {"negatives": "AffineNegatives", "threshold": None, "zero_filtered": False}
        options |= {"logistic": False, "centers": 1}
        torch.library.opcheck(triton_backend.negative_sums, tensors, options | {"offset": None, "keep": False})
        torch.library.opcheck(triton_backend.negative_sums, tensors, options | {"offset": 0.0, "keep": True})
        vectors = [torch.rand(5) for _ in range(4)]
        count = 70 if classes is None else 3
        options |= {"first": 0, "count": count, "threshold": 0.5}
        torch.library.opcheck(triton_backend.logit_gradient, (*tensors, *vectors), options)


def test_negatives_without_a_kernel_are_refused() -> None:
    @dataclass(frozen=True)
    class Squared(Negatives):
        scale: float

        def logits(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
            return self.scale * cosine.square()

        def derivative(self, cosine: Tensor, hard_boundary: Tensor | None) -> Tensor:
            return 2 * self.scale * cosine

    rows = filled(7, 32)
    logit_options = LogitOptions(unit_rows=True, dtype=torch.float32, chunk=7)
    active, x = ActiveClasses(None, torch.zeros(3, dtype=torch.int64)), F.normalize(torch.ones(3, 32))
    problem = LogitProblem(rows, active, x, logit_options, NegativeTerm(Squared(4.0), None, False, 4.0))
    with pytest.raises(NotImplementedError, match="Squared has no kernel_code: take the PyTorch backend"):
        TritonBackend().negative_sums(problem, keep=False)
    del Negatives.kinds["Squared"]


def test_a_workspace_decides_how_large_a_chunk_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = filled(131, 32)
    labels = torch.arange(BATCH)
    x, active = batch(rows, labels), ActiveClasses.of(labels, range(131))
    logit_options = LogitOptions(unit_rows=True, dtype=torch.float32, chunk=7, workspace=1 << 20)
    sizes = []
    monkeypatch.setattr(tiles, "chunk", lambda *_, **options: 64 if options["workspace"] == (1 << 20) // 3 else 1)
    loss = LossGradient(*(torch.rand(BATCH) for _ in range(4)))
    problem = LogitProblem(rows, active, x, logit_options, NegativeTerm(AffineNegatives(16.0), None, False, 16.0))
    whole = backward(TritonBackend(), problem, loss, lambda part, _: sizes.append(part))
    assert sizes == [slice(0, 64), slice(64, 128), slice(128, 131)]
    problem = replace(problem, options=replace(logit_options, workspace=None))
    found = backward(TritonBackend(), problem, loss, lambda part, _: sizes.append(part))
    assert error(found, whole.double()) < ROUNDING
    assert sizes[3] == slice(0, 7)
