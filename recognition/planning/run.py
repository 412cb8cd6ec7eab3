"""Predict what a training run costs each GPU: memory, bytes sent, and the time of a step.

The time is a lower bound ("floor"): products and bytes at the rates given, with perfect overlap inside each part. The
throughput that is expected is that of the floor times `GpuRates.efficiency`, an assumption. Nothing is allocated.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from recognition import config
from recognition.planning.backbone import BackboneCost
from recognition.planning.head import HeadPlan

FRAMEWORK_BYTES = 2_000_000_000
"""Estimate for CUDA's context, NCCL's buffers, workspaces of cuBLAS and cuDNN, and fragmentation of the allocator."""
BATCHES_ON_GPU = 3
"""Batches of images in GPU memory: the one in training and those decoded ahead."""
GPUS_PER_MACHINE = 8
MOST_GPUS = 8192
"""Largest number of GPUs that `RunPlan.alternatives` tries."""
MACHINE_LINK, NETWORK_LINK = 450e9, 50e9
"""Bytes per second that leave a GPU: over NVLink within a machine, over 400 Gb/s for each GPU between machines."""
GRADIENT = "all-reduce of the backbone's gradient"


@dataclass(frozen=True)
class GpuRates:
    """Speed of one GPU."""

    flops: float
    """Floating-point operations per second of matrix products in bfloat16."""
    memory: float
    """Bytes per second between memory and processor."""
    link: float | None
    """Bytes per second that it sends; None: `MACHINE_LINK` or `NETWORK_LINK`, by the number of GPUs."""
    efficiency: float
    """Expected share of the floor's throughput."""


@dataclass(frozen=True)
class RunPlan:
    """A training run and its cost per GPU."""

    head: HeadPlan
    backbone: BackboneCost
    image_size: int
    """Width and height of an image in pixels."""
    gpu_bytes: float
    """Memory of one GPU."""
    rates: GpuRates

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part."""
        parameters, batch = 4 * self.backbone.parameters, self.head.batch
        moments = 2 if isinstance(self.head.optimizer, config.AdamW) else 1
        return {f"head: {name}": size for name, size in self.head.memory.items()} | {
            "backbone: parameters": parameters,
            "backbone: copies in bfloat16": self.backbone.copied_bytes,
            "backbone: gradients": parameters,
            "backbone: moments": moments * parameters,
            "backbone: activations": self.backbone.activation_bytes * batch,
            "images": BATCHES_ON_GPU * batch * 3 * self.image_size**2 * 4,
            "framework (a constant)": FRAMEWORK_BYTES,
        }

    @property
    def fits(self) -> bool:
        """Whether all parts together fit into a GPU's memory."""
        return sum(self.memory.values()) <= self.gpu_bytes

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that a GPU sends in a step, by collective."""
        ranks = self.head.ranks
        return self.head.wire | {GRADIENT: 2 * 4 * self.backbone.parameters * (ranks - 1) // ranks}

    @property
    def backbone_flops(self) -> int:
        """Floating-point operations of the backbone in a step: the backward pass takes twice the forward pass."""
        return 3 * self.backbone.forward_flops * self.head.batch

    @property
    def seconds(self) -> dict[str, float]:
        """Lower bounds of the parts of a step that cannot overlap with each other."""
        link = self.rates.link or (NETWORK_LINK if self.head.ranks > GPUS_PER_MACHINE else MACHINE_LINK)
        backbone = self.backbone_flops / self.rates.flops
        return {
            "backbone": backbone,
            "head": max(self.head.flops / self.rates.flops, self.head.traffic / self.rates.memory),
            "head's collectives": sum(self.head.wire.values()) / link,
            # It travels while the backward pass, two thirds of the work, goes on.
            "gradient, beyond the backward pass": max(0.0, self.wire[GRADIENT] / link - backbone * 2 / 3),
        }

    @property
    def floor_seconds(self) -> float:
        """Lower bound of a step's time."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Expected throughput of all GPUs together."""
        return self.rates.efficiency * self.head.global_batch / self.floor_seconds

    def alternatives(self) -> list[tuple[dict[str, str | int], "RunPlan"]]:
        """Return the plans that fit with one change, or with two: rows in bfloat16 and more GPUs.

        Each comes after its change, the new values of `row_format`, `optimizer`, `batch` or `gpus`.
        """
        settings = self.head.settings
        in_bfloat16 = self._with(settings=settings.model_copy(update={"row_format": "bfloat16"}))
        found: list[tuple[dict[str, str | int], RunPlan]] = []
        if settings.row_format != "bfloat16":
            found.append(({"row_format": "bfloat16"}, in_bfloat16))
        if isinstance(self.head.optimizer, config.AdamW):
            found.append(({"optimizer": "sgd"}, self._with(optimizer=config.SGD())))
        # BatchNorm needs two images.
        batches = range(2, self.head.batch)
        fitting = bisect_left(batches, True, key=lambda batch: not self._with(batch=batch).fits)
        if fitting:
            found.append(({"batch": batches[fitting - 1]}, self._with(batch=batches[fitting - 1])))
        found += [({"gpus": plan.head.ranks}, plan) for plan in self._on_more_gpus()]
        if settings.row_format != "bfloat16" and not in_bfloat16.fits:
            found += [
                ({"row_format": "bfloat16", "gpus": plan.head.ranks}, plan) for plan in in_bfloat16._on_more_gpus()
            ]
        return [(change, plan) for change, plan in found if plan.fits]

    def _on_more_gpus(self) -> list["RunPlan"]:
        """Return the plan on the fewest GPUs that have room, in whole machines beyond one, or nothing."""
        ranks = self.head.ranks
        while ranks < MOST_GPUS:
            ranks += 1 if ranks < GPUS_PER_MACHINE else GPUS_PER_MACHINE - ranks % GPUS_PER_MACHINE
            plan = self._with(ranks=ranks)
            if plan.fits:
                return [plan]
        return []

    def _with(self, **changes: Any) -> "RunPlan":
        return replace(self, head=replace(self.head, **changes))

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "fits": self.fits,
            "memory_bytes": sum(self.memory.values()),
            "memory": self.memory,
            "wire_bytes": sum(self.wire.values()),
            "wire": self.wire,
            "head_flops": self.head.flops,
            "backbone_flops": self.backbone_flops,
            "floor_seconds": self.floor_seconds,
            "floor": self.seconds,
            "images_per_second": self.images_per_second,
        }
