"""Benchmark of training on one device, with the data in its memory: images per second of a backbone with the head.

`measure_grid` measures each precision and memory format, with and without torch.compile; the defaults rest on it.
`compare` lets three trainings take turns, under the same load of the machine: this package's, in bfloat16,
channels-last and compiled; the package's without compilation; and the baseline, which trains as arcface_torch does:
float16 autocast with a GradScaler (float32 on a CPU, which has no fast float16 convolutions), NCHW, torch's layers and
optimizer. All three have this package's head, so the difference lies in the backbone.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from recognition import config, hardware
from recognition.distributed import split
from recognition.head import ShardedSoftmax
from recognition.models.backbone import build_backbone
from recognition.models.layers import GroupedConv2d, PReLU
from recognition.planning.backbone import backbone_cost
from recognition.training.optimizer import build_optimizer, clip_gradients, step_if_finite

_PEAK_TFLOPS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200 NVL": 836,
    "H200": 989,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
}
"""Peak rates of dense bfloat16 matrix products in NVIDIA's data sheets, by a part of the device's name; the first part
that matches counts."""
_WARM_UP = 4
_ROUNDS = 4
_SGD = config.SGD(lr=0.01)
_CLIP_NORM = 5.0


@dataclass(frozen=True)
class Variant:
    """Precision, memory format and compilation of a training, and its speed."""

    precision: str
    channels_last: bool
    compiled: bool
    images_per_second: float
    """Median over the rounds."""
    compile_seconds: float | None = None
    """Additional time of the first step compared with later ones; None without compilation."""
    pays_after_images: int | None = None
    """Number of images after which compilation has paid off, compared with the fastest variant without it; None if that
    one is faster."""

    def to_json(self) -> dict[str, str | bool | float | int | None]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Speed of the three trainings, medians over the rounds."""

    images_per_second: float
    """bfloat16, channels-last, compiled."""
    eager_images_per_second: float
    """bfloat16, channels-last, not compiled."""
    baseline_images_per_second: float
    """float16 autocast (float32 on a CPU), NCHW, not compiled."""
    eager_ratio: float
    """Ratio of the compiled to the eager training."""
    baseline_ratio: float
    """Ratio of the compiled training to the baseline."""
    flops_per_image: int
    """Floating-point operations of the backbone's convolutions and matrix products, forward and backward. The head's
    are not counted."""
    flops_per_second: float
    """Rate of floating-point operations in the compiled training."""
    peak_flops: float | None
    """Peak rate of the device; None if unknown."""
    mfu: float | None
    """Model FLOP utilisation: `flops_per_second` over `peak_flops`."""
    memory_bytes: int | None
    """Peak GPU memory allocated by the compiled training; None on a CPU."""

    def to_json(self) -> dict[str, float | int | None]:
        """Return the fields by name."""
        return asdict(self)


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's peak rate of bfloat16 operations per second, or None if it is not in the table."""
    return next((1e12 * peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)


def compare(
    backbone: config.Backbone,
    device: torch.device,
    *,
    batch: int,
    classes: int,
    steps: int,
    compiler: str | None = "inductor",
    peak: float | None = None,
) -> Comparison:
    """Measure `steps` steps of each of the three trainings, after a warm-up, with `batch` images in a step.

    `backbone`: its precision, layout and compilation are overridden. `compiler`: torch.compile's backend; None: no
    compilation. `peak`: operations per second of the device, if its name does not tell. Needs a process group of one
    rank. Raises UserError if the memory does not suffice or a loss is not finite.
    """
    own = backbone.model_copy(update={"precision": "bfloat16", "channels_last": True, "compile": False})
    memory = None
    try:
        # The compiled training warms up alone, so that the peak memory is its own.
        compiled = TrainingLoop(own, device, batch, classes)
        if compiler is not None:
            compiled.backbone.trunk.compile(backend=compiler)
        compiled.run_steps(_WARM_UP)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        trainings: list[TrainingLoop] = [
            compiled,
            TrainingLoop(own, device, batch, classes),
            BaselineLoop(own, device, batch, classes),
        ]
        for training in trainings[1:]:
            training.run_steps(_WARM_UP)
        seconds: list[list[float]] = [[] for _ in trainings]
        for block in split(steps, min(steps, _ROUNDS)):
            for training, found in zip(trainings, seconds, strict=True):
                found.append(training.run_steps(block) / block)
    except torch.OutOfMemoryError as error:
        raise config.UserError(f"the GPU's memory has run out: take a smaller batch\n{error}") from None
    ours, eager, baseline = (batch / statistics.median(found) for found in seconds)
    flops = 3 * backbone_cost(own).forward_flops
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device))
    return Comparison(
        images_per_second=ours,
        eager_images_per_second=eager,
        baseline_images_per_second=baseline,
        eager_ratio=ours / eager,
        baseline_ratio=ours / baseline,
        flops_per_image=flops,
        flops_per_second=flops * ours,
        peak_flops=peak,
        mfu=None if peak is None else flops * ours / peak,
        memory_bytes=memory,
    )


def measure_grid(
    backbone: config.Backbone,
    device: torch.device,
    *,
    batch: int,
    classes: int,
    steps: int,
    precisions: Sequence[hardware.Precision],
    layouts: Sequence[bool] = (True, False),
    compiler: str | None = "inductor",
) -> list[Variant]:
    """Measure `steps` steps of each variant, in turns, after a warm-up, with `batch` images in a step.

    `layouts`: values of `channels_last`. `compiler`: torch.compile's backend; None: eager variants alone. Caches of
    earlier compilations are not used. Needs a process group of one rank. Raises UserError if the memory does not
    suffice or a loss is not finite.
    """
    ways = list(itertools.product(precisions, layouts, (False,) if compiler is None else (False, True)))
    seconds: list[list[float]] = [[] for _ in ways]
    first: list[float] = []
    try:
        with fresh_cache():
            trainings = []
            for precision, channels_last, compiled in ways:
                chosen = {"precision": precision, "channels_last": channels_last, "compile": False}
                training = TrainingLoop(backbone.model_copy(update=chosen), device, batch, classes)
                if compiled:
                    training.backbone.trunk.compile(backend=compiler)
                first.append(training.run_steps(1))
                training.run_steps(1)
                trainings.append(training)
            for block in split(steps, min(steps, _ROUNDS)):
                for training, found in zip(trainings, seconds, strict=True):
                    found.append(training.run_steps(block) / block)
    except torch.OutOfMemoryError as error:
        raise config.UserError(f"the GPU's memory has run out: take a smaller batch\n{error}") from None
    steady = [statistics.median(found) for found in seconds]
    eager = min(each for (*_, compiled), each in zip(ways, steady, strict=True) if not compiled)
    variants = []
    for way, step, start in zip(ways, steady, first, strict=True):
        spent = max(0.0, start - step) if way[2] else None
        pays = None if spent is None or step >= eager else math.ceil(batch * spent / (eager - step))
        variants.append(Variant(*way, batch / step, spent, pays))
    return variants


class TrainingLoop:
    """Backbone, head and optimizers that repeat the trainer's step on one batch."""

    def __init__(self, settings: config.Backbone, device: torch.device, batch: int, classes: int) -> None:
        self.device = device
        self.backbone = build_backbone(settings).to(device)
        self.head = ShardedSoftmax(
            config.Head(), classes, settings.embedding_size, seed=0, device=device, optimizer=_SGD
        )
        self.optimizer = self._optimizer()
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(batch, 3, settings.image_size, settings.image_size, generator=generator) * 2 - 1
        self.images = images.to(device).contiguous(memory_format=self.backbone.memory_format)
        self.labels = torch.randint(classes, (batch,), generator=generator).to(device)
        self.steps = 0

    def run_steps(self, count: int) -> float:
        """Run `count` steps; return their duration in seconds. Raises UserError if the last loss is not finite."""
        start = self._now()
        for _ in range(count):
            loss = self._step()
            self.steps += 1
        seconds = self._now() - start
        if not loss.isfinite():
            raise config.UserError(f"{type(self).__name__}: the loss is {loss.item()} after {self.steps} steps")
        return seconds

    def _optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.backbone, _SGD, decay_norms_and_biases=False)

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        output = self.head(self.backbone(self.images), self.labels, lr=_SGD.lr, step=self.steps)
        output.loss.backward()
        norm = clip_gradients(self.backbone.parameters(), _CLIP_NORM)
        step_if_finite(self.optimizer, output.finite & norm.isfinite())
        return output.loss.detach()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class BaselineLoop(TrainingLoop):
    """Training step of arcface_torch's train_v2.py (https://github.com/deepinsight/insightface)."""

    def __init__(self, settings: config.Backbone, device: torch.device, batch: int, classes: int) -> None:
        settings = settings.model_copy(update={"precision": "float32", "channels_last": False})
        super().__init__(settings, device, batch, classes)
        half = device.type == "cuda"
        use_torchs_layers(self.backbone)
        if half:
            self.backbone.trunk = Float16(self.backbone.trunk)
        self.scaler = torch.amp.GradScaler(device.type, growth_interval=100, enabled=half)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=_SGD.lr, momentum=_SGD.momentum, weight_decay=_SGD.weight_decay)

    def _step(self) -> Tensor:
        self.optimizer.zero_grad()
        scale = self.scaler.scale(torch.ones((), device=self.device))
        output = self.head(self.backbone(self.images), self.labels, lr=_SGD.lr, step=self.steps, loss_scale=scale)
        self.scaler.scale(output.loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.backbone.parameters(), _CLIP_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return output.loss.detach()


class Float16(nn.Module):
    """Wrapper that runs a module in float16 autocast, even where the caller turns autocast off."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Run the module in float16 autocast."""
        with torch.autocast(x.device.type, dtype=torch.float16):
            return self.module(x)


def use_torchs_layers(module: nn.Module) -> None:
    """Replace this package's layers by torch's own, in place; on a GPU they are torch's already."""
    for layer in module.modules():
        for ours, torchs in ((PReLU, nn.PReLU), (GroupedConv2d, nn.Conv2d)):
            if isinstance(layer, ours):
                object.__setattr__(layer, "__class__", torchs)
