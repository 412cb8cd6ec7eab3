"""The head's Triton kernels on a GPU: against float64, against PyTorch on the GPU, and over many steps.

The data and the float64 losses are those of `tests/distributed`.
"""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recognition import config, distributed
from recognition.head import ShardedSoftmax
from recognition.head.losses.adaptive import ElasticFaceLoss
from recognition.head.sampling import sample_rows
from tests.support.reference_losses import LOSSES, DenseHead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
DEVICE = "cuda"
PRECISION = "bfloat16"
CLASSES, BATCH, SIZE = 1003, 96, 512
MOMENTUM, DECAY, BETAS, EPS = 0.9, 0.01, (0.8, 0.95), 1e-3


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    """A group of one, in this process."""
    threads = torch.get_num_threads()
    distributed.start(config.Distributed(), threads=8)
    yield
    distributed.stop()
    torch.set_num_threads(threads)


def data(classes: int, batch: int, size: int, centers: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings from near to opposite their class, labels, rows and bias: float32 numbers, in float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes * centers, size, generator=generator) * 0.1
    bias = torch.randn(classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    pull = torch.linspace(1.5, -1.0, batch + 2)[1:-1, None]
    noise = torch.randn(batch, size, generator=generator)
    x = F.normalize(weight[labels * centers]) * pull + F.normalize(noise)
    return (x * (0.1 + 3 * torch.rand(batch, 1, generator=generator))).double(), labels, weight.double(), bias.double()


def build(
    settings: config.Head, classes: int, size: int, *, update_in_backward: bool = True, **options: Any
) -> ShardedSoftmax:
    section = config.Head.model_validate(settings.model_dump() | {"precision": PRECISION} | options)
    optimizer_config = config.SGD(momentum=MOMENTUM, weight_decay=DECAY)
    return ShardedSoftmax(
        section, classes, size, seed=0, device=DEVICE, optimizer=optimizer_config, update_in_backward=update_in_backward
    )


def fill(head: ShardedSoftmax, weight: Tensor, bias: Tensor) -> None:
    head.rows.load(weight.float(), None if head.rows.bias is None else bias.float())


def take_step(head: ShardedSoftmax, x: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the embeddings, of a step with backward pass."""
    local = x.detach().float().to(DEVICE).requires_grad_()
    output = head(local, labels.to(DEVICE), **{"lr": 0.1, "step": 0} | options)
    output.loss.backward()
    assert local.grad is not None
    return output.loss.detach(), local.grad


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def gradients(
    settings: config.Head, kernels: str, classes: int, batch: int, size: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and what the loss keeps: of the head, and of the reference in float64."""
    x, labels, weight, bias = data(classes, batch, size, settings.subcenters)
    x.requires_grad_()
    head = build(settings, classes, size, update_in_backward=False, backend=kernels, **options)
    fill(head, weight, bias)
    margins = None
    if isinstance(settings.loss, config.ElasticFace):
        assert isinstance(head.loss, ElasticFaceLoss)
        margins = head.loss.draw(2, batch, torch.device(DEVICE)).double().cpu()
    loss, grad_x = take_step(head, x, labels, step=2)
    assert head.accumulated is not None
    found = {"loss": loss, "x": grad_x, "rows": head.accumulated.weight}
    dense = DenseHead.initial(settings, weight, bias)
    dense_loss = dense.loss(x, labels, step=2, margins=margins)
    dense_loss.backward()
    assert x.grad is not None and dense.weight.grad is not None
    expected = {"loss": dense_loss, "x": x.grad, "rows": dense.weight.grad}
    if dense.bias is not None:
        assert head.accumulated.bias is not None and dense.bias.grad is not None
        found["bias"], expected["bias"] = head.accumulated.bias, dense.bias.grad
    for name, value in dense.state.items():
        found[name], expected[name] = head.loss.running[name], value
    for number, (ours, theirs) in enumerate(zip(head.scalars.gradients, dense.scalars.values(), strict=True)):
        assert theirs.grad is not None
        found[f"scalar {number}"], expected[f"scalar {number}"] = ours, theirs.grad
    return found, expected


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_bfloat16(name: str) -> None:
    settings = LOSSES[name]
    # The error of a logit, and so of its exponential, grows with the scale; and at a threshold a negative jumps.
    jumps = settings.filter is not None or isinstance(settings.loss, config.CurricularFace | config.MVSoftmax)
    tolerance = 1e-2 * max(1, getattr(settings.loss, "scale", 0.0) / 64) * (5 if jumps else 1)
    plain, _ = gradients(settings, "torch", CLASSES, BATCH, SIZE)
    found, expected = gradients(settings, "triton", CLASSES, BATCH, SIZE)
    for key, value in expected.items():
        assert error(found[key], value) <= tolerance, f"{key} against float64"
        assert error(found[key], plain[key]) <= tolerance, f"{key} against PyTorch on the GPU"


@pytest.mark.parametrize("name", ["softmax", "arcface", "curricularface", "uce", "arcface-subcenters"])
def test_float32_is_not_tf32(name: str) -> None:
    found, expected = gradients(LOSSES[name], "triton", CLASSES, BATCH, SIZE, precision="float32")
    assert {key for key, value in expected.items() if not error(found[key], value) <= 1e-4} == set()


@pytest.mark.parametrize("name", ["arcface", "curricularface", "cosface-filter"])
@pytest.mark.parametrize(("classes", "batch", "size"), [(1, 5, 64), (7, 1, 24), (130, 257, 512), (4099, 33, 100)])
def test_sizes_that_fill_no_tile(name: str, classes: int, batch: int, size: int) -> None:
    settings, sizes = LOSSES[name], (classes, batch, size)
    found, expected = gradients(settings, "triton", *sizes, precision="float32")
    assert {key for key, value in expected.items() if not error(found[key], value) <= 1e-4} == set()
    # In few dimensions bfloat16 is far from float64, but both round the same operands.
    plain, _ = gradients(settings, "torch", *sizes)
    found, _ = gradients(settings, "triton", *sizes)
    assert {key for key, value in plain.items() if not error(found[key], value) <= 1e-2} == set()


@dataclass
class Reference:
    """CosFace's rows in training, in float64: each step's gradient by autograd, its update as the papers write it."""

    settings: config.Head
    weight: Tensor
    moments: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.moments = [torch.zeros_like(self.weight) for _ in range(2)]
        self.updates = torch.zeros(len(self.weight), 1, dtype=torch.float64)

    def step(self, x: Tensor, labels: Tensor, lr: float, step: int) -> tuple[Tensor, Tensor]:
        """The loss and its gradient by x."""
        dense = DenseHead.initial(self.settings, self.weight)
        classes, rate = len(self.weight), self.settings.sample_rate
        taken = sample_rows(labels, classes, rate, 0, step, range(classes)) if rate < 1 else None
        x = x.detach().requires_grad_()
        loss = dense.loss(x, labels, taken=taken)
        loss.backward()
        assert dense.weight.grad is not None and x.grad is not None
        moving = slice(None) if taken is None or self.settings.inactive_rows == "lazy" else taken
        w, g, (first, second) = self.weight[moving], dense.weight.grad[moving], self.moments
        if isinstance(self.settings.optimizer, config.AdamW):
            self.updates[moving] += 1
            first[moving] = BETAS[0] * first[moving] + (1 - BETAS[0]) * g
            second[moving] = BETAS[1] * second[moving] + (1 - BETAS[1]) * g**2
            mean = first[moving] / (1 - BETAS[0] ** self.updates[moving])
            square = second[moving] / (1 - BETAS[1] ** self.updates[moving])
            self.weight[moving] = w - lr * DECAY * w - lr * mean / (square.sqrt() + EPS)
        else:
            first[moving] = MOMENTUM * first[moving] + g + DECAY * w
            self.weight[moving] = w - lr * first[moving]
        return loss.detach(), x.grad


ADAMW = {"optimizer": {"name": "adamw", "betas": BETAS, "eps": EPS, "weight_decay": DECAY}}
SAMPLED = {"sample_rate": 0.3}
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "split": {"row_format": "split"},
    "bfloat16": {"row_format": "bfloat16"},
    "adamw": ADAMW,
    "adamw split": ADAMW | {"row_format": "split"},
    "adamw bfloat16": ADAMW | {"row_format": "bfloat16"},
    "sampled": SAMPLED,
    "sampled split": SAMPLED | {"row_format": "split"},
    "sampled bfloat16": SAMPLED | {"row_format": "bfloat16"},
    "sampled adamw": SAMPLED | ADAMW,
    "lazy": SAMPLED | {"inactive_rows": "lazy"},
    "lazy split": SAMPLED | {"inactive_rows": "lazy", "row_format": "split"},
    "small chunks": {"chunk": 100},
    "small workspace": {"workspace_mib": 1},
}


@pytest.mark.parametrize("name", FORMS)
def test_training_in_every_format(name: str) -> None:
    settings = config.Head.model_validate(config.Head(loss=config.CosFace(scale=16.0)).model_dump() | FORMS[name])
    x, labels, weight, bias = data(CLASSES, 6 * BATCH, SIZE)
    reference = Reference(settings, weight.clone())
    heads = {kernels: build(settings, CLASSES, SIZE, backend=kernels) for kernels in ("torch", "triton")}
    for head in heads.values():
        fill(head, weight, bias)
    lr = 0.02 if "adamw" in name else 0.5
    for step in range(6):
        part = slice(step * BATCH, (step + 1) * BATCH)
        loss, grad_x = reference.step(x[part], labels[part], lr, step)
        for kernels, head in heads.items():
            found, found_x = take_step(head, x[part], labels[part], lr=lr, step=step)
            assert error(found, loss) <= 1e-2, f"loss of step {step}, {kernels}"
            assert error(found_x, grad_x) <= 2e-2, f"gradient by x of step {step}, {kernels}"
    rows = {}
    for kernels, head in heads.items():
        head.state_dict_tensors()
        rows[kernels] = head.rows.read(slice(None)).cpu()
        assert error(rows[kernels], reference.weight) <= 1e-2, f"rows, {kernels}"
        if settings.row_format != "bfloat16":
            moved = error(rows[kernels] - weight, reference.weight - weight)
            assert moved <= 2e-2, f"what rows moved by, {kernels}: {moved}"
    # The same random bits round both, so most numbers are the very same.
    if settings.row_format == "bfloat16":
        assert (rows["triton"] == rows["torch"]).float().mean() > 0.9


def test_rows_beyond_the_reach_of_32_bits() -> None:
    classes, size, batch = (1 << 22) + 4096, 512, 64
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of the GPU's memory")
    last = torch.arange(classes - batch, classes)
    labels = torch.cat([last, torch.arange(batch)])
    x = torch.randn(2 * batch, size, generator=torch.Generator().manual_seed(1))
    found = []
    for kernels in ("torch", "triton"):
        gc.collect()
        torch.cuda.empty_cache()
        head = build(config.Head(loss=config.CosFace(), row_format="bfloat16"), classes, size, backend=kernels)
        before = head.rows.read(labels.to(DEVICE)).cpu()
        loss, grad_x = take_step(head, x, labels)
        head.state_dict_tensors()
        found.append([loss, grad_x, head.rows.read(labels.to(DEVICE)).cpu() - before])
        assert found[-1][2].abs().amax(1).min() > 0, "rows of the batch that did not move"
        del head
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert error(ours, theirs) <= 2e-2


STEPS, EARLY = 1000, 100


@dataclass
class Long:
    """What was seen of a training of `STEPS` steps."""

    losses: Tensor
    memory: dict[int, int] = field(default_factory=dict)
    """Bytes allocated after so many steps."""
    peaks: list[int] = field(default_factory=list)
    """The most that was allocated up to `EARLY` steps, and after them."""


def learn(kernels: str, precision: str, *, steps: int = STEPS, classes: int = 2000, **options: Any) -> Long:
    """Train a linear map under the head, on noisy images of identities."""
    inputs, size, batch = 128, 64, 256
    generator = torch.Generator().manual_seed(7)
    people = torch.randn(classes, inputs, generator=generator).to(DEVICE)
    images = torch.randn(64, batch, inputs, generator=generator).to(DEVICE)
    labels = torch.randint(classes, (64, batch), generator=generator).to(DEVICE)
    linear = torch.nn.Linear(inputs, size, bias=False)
    linear.weight.data = torch.randn(size, inputs, generator=generator) / inputs**0.5
    linear.to(DEVICE)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.02, momentum=0.9)
    settings = config.Head(loss=config.CosFace(scale=32.0, margin=0.2))
    head = build(settings, classes, size, backend=kernels, precision=precision, **options)
    seen = Long(torch.zeros(steps, device=DEVICE))
    on_gpu = DEVICE == "cuda"
    for step in range(steps):
        if on_gpu and step in (EARLY, steps - 1):
            gc.collect()
            torch.cuda.synchronize()
            seen.memory[step] = torch.cuda.memory_allocated()
            seen.peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        number = step % len(images)
        embeddings = linear(people[labels[number]] + images[number])
        output = head(embeddings, labels[number], lr=0.1, step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        seen.losses[step] = output.loss.detach()
    head.state_dict_tensors()
    seen.losses = seen.losses.cpu()
    return seen


@pytest.fixture(scope="module")
def reference_run() -> Long:
    return learn("torch", "float32")


@pytest.mark.parametrize("state", ["float32", "split", "bfloat16"])
def test_a_thousand_steps_follow_float32(state: str, reference_run: Long) -> None:
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    found = learn("triton", PRECISION, row_format=state)
    assert found.losses.isfinite().all()
    # Means over 50 steps: a single batch tells little.
    ours, theirs = (run.losses.view(-1, 50).mean(1) for run in (found, reference_run))
    assert theirs[-1] < 0.5 * theirs[0], "the reference did not learn"
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)
    assert found.memory[STEPS - 1] <= found.memory[EARLY], "memory grows from step to step"
    assert found.peaks[1] <= 1.05 * found.peaks[0], "the peak grows"


SILENT: dict[str, config.Head] = {
    "arcface": config.Head(loss=config.ArcFace()),
    "softmax": config.Head(loss=config.Softmax()),
    "curricularface": config.Head(loss=config.CurricularFace()),
    "adacos": config.Head(loss=config.AdaCos()),
    "adaface": config.Head(loss=config.AdaFace()),
    "elasticface": config.Head(loss=config.ElasticFace()),
    "magface": config.Head(loss=config.MagFace()),
    "uce": config.Head(loss=config.UCE()),
    "filtered sub-centres": LOSSES["circle-subcenters-filter"],
    "split": config.Head(row_format="split"),
    "bfloat16": config.Head(row_format="bfloat16"),
    "adamw": config.Head(optimizer=config.AdamW()),
    "sampled": config.Head(sample_rate=0.3),
    "lazy": config.Head(sample_rate=0.3, inactive_rows="lazy"),
}


@pytest.mark.parametrize("name", SILENT)
def test_the_host_does_not_wait_in_a_step(name: str) -> None:
    settings = SILENT[name]
    head = build(settings, CLASSES, SIZE, backend="triton")
    x, labels, _, _ = data(CLASSES, BATCH, SIZE)
    embeddings, labels = x.float().to(DEVICE), labels.to(DEVICE)

    def step(number: int) -> None:
        output = head(embeddings.requires_grad_(), labels, lr=0.1, step=number)
        output.loss.backward()

    for number in range(3):
        step(number)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step(3)
        step(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
