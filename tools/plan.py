"""Plan a run before there is one: memory per GPU, bytes on the wire, the time of a step, and what would fit.

Nothing is allocated. GB are 10^9 bytes. The floor is what no step can beat at the given rates, an H100's by default;
the throughput that is expected is the floor's, times `--efficiency`, an assumption.
"""

import argparse
import json
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    from pydantic import ValidationError

    from recognition import config
    from recognition.cli.argument_types import above_zero, positive
    from recognition.errors import UserError
    from recognition.planning.backbone import BackboneCost, backbone_cost
    from recognition.planning.head import HeadPlan

FRAMEWORK_BYTES = 2_000_000_000
"""An estimate: CUDA's context, buffers of NCCL, workspaces of cuBLAS and cuDNN, and what the allocator cannot use."""
BATCHES_WAITING = 3
"""Batches of images on a GPU: what is trained on, and what is decoded ahead."""
IN_A_MACHINE = 8
MOST_GPUS = 8192
LINKS = (450.0, 50.0)
"""GB/s that leave a GPU: within a machine of 8 (NVLink), and between machines (400 Gb/s for each GPU)."""
OPTIMIZERS: dict[str, config.Optimizer] = {"sgd": config.SGD(), "adamw": config.AdamW()}
GRADIENT = "all-reduce of the backbone's gradient"


@dataclass(frozen=True)
class Rates:
    """Of a GPU, per second."""

    flops: float
    """Of matrix products in bfloat16."""
    memory: float
    """Bytes."""
    link: float | None
    """Bytes that it sends; None: by the number of GPUs."""
    efficiency: float
    """Share of the floor's throughput that is expected."""


@dataclass(frozen=True)
class Plan:
    """A run, and what it costs each GPU."""

    head: HeadPlan
    backbone: BackboneCost
    image_size: int
    gpu_bytes: float
    rates: Rates

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
            "images": BATCHES_WAITING * batch * 3 * self.image_size**2 * 4,
            "framework (a constant)": FRAMEWORK_BYTES,
        }

    @property
    def fits(self) -> bool:
        """Whether a GPU has room for all parts."""
        return sum(self.memory.values()) <= self.gpu_bytes

    @property
    def wire(self) -> dict[str, int]:
        """Bytes that the GPU sends in a step, by collective."""
        ranks = self.head.ranks
        return self.head.wire | {GRADIENT: 2 * 4 * self.backbone.parameters * (ranks - 1) // ranks}

    @property
    def backbone_flops(self) -> int:
        """Floating-point operations of a step, forward and backward."""
        return 3 * self.backbone.forward_flops * self.head.batch

    @property
    def seconds(self) -> dict[str, float]:
        """The floor, by what has to follow each other; whatever else can overlap does so perfectly."""
        link = self.rates.link or 1e9 * LINKS[self.head.ranks > IN_A_MACHINE]
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
        """Of a step."""
        return sum(self.seconds.values())

    @property
    def images_per_second(self) -> float:
        """Expected, over all GPUs."""
        return self.rates.efficiency * self.head.gathered / self.floor_seconds

    def nearest(self) -> list[tuple[str, "Plan"]]:
        """What fits with one thing changed, or with rows in bfloat16 and the number of GPUs."""
        settings = self.head.settings
        lighter = self._with(settings=settings.model_copy(update={"row_format": "bfloat16"}))
        changes = []
        if settings.row_format != "bfloat16":
            changes.append(("--state bfloat16", lighter))
        if isinstance(self.head.optimizer, config.AdamW):
            changes.append(("--optimizer sgd", self._with(optimizer=config.SGD())))
        # BatchNorm needs two images.
        batches = range(2, self.head.batch)
        fitting = bisect_left(batches, True, key=lambda batch: not self._with(batch=batch).fits)
        if fitting:
            changes.append((f"--batch {batches[fitting - 1]}", self._with(batch=batches[fitting - 1])))
        changes += self._on_more_gpus("")
        if settings.row_format != "bfloat16" and not lighter.fits:
            changes += lighter._on_more_gpus("--state bfloat16 ")
        return [(change, plan) for change, plan in changes if plan.fits]

    def _on_more_gpus(self, change: str) -> list[tuple[str, "Plan"]]:
        """On the fewest that have room, whole machines if one is not enough."""
        ranks = self.head.ranks
        while ranks < MOST_GPUS:
            ranks += 1 if ranks < IN_A_MACHINE else IN_A_MACHINE - ranks % IN_A_MACHINE
            plan = self._with(ranks=ranks)
            if plan.fits:
                return [(f"{change}--gpus {ranks}", plan)]
        return []

    def _with(self, **changes: Any) -> "Plan":
        return replace(self, head=replace(self.head, **changes))

    def to_json(self) -> dict[str, Any]:
        """The numbers by name."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=positive, required=True, help="identities")
    parser.add_argument("--gpus", type=positive, required=True, help="in all")
    parser.add_argument("--gpu-memory", type=above_zero, required=True, metavar="GB", help="of each")
    parser.add_argument("--backbone", default="iresnet100", metavar="NAME", help="as backbone.name (%(default)s)")
    parser.add_argument("--batch", type=positive, default=128, help="images per GPU (%(default)s)")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="Partial FC's fraction of classes (%(default)s)")
    parser.add_argument(
        "--state", choices=("float32", "split", "bfloat16"), default="float32", help="how rows are kept"
    )
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="of backbone and rows")
    parser.add_argument("--embedding-size", type=positive, default=512, help="(%(default)s)")
    parser.add_argument("--image-size", type=positive, default=112, help="pixels (%(default)s)")
    parser.add_argument("--tflops", type=above_zero, default=790.0, help="of bfloat16 products (%(default)s)")
    parser.add_argument("--bandwidth", type=above_zero, default=3.0, metavar="TB/S", help="of memory (%(default)s)")
    parser.add_argument(
        "--link",
        type=above_zero,
        metavar="GB/S",
        help=f"out of a GPU ({LINKS[0]:g} up to {IN_A_MACHINE} GPUs, else {LINKS[1]:g})",
    )
    parser.add_argument("--efficiency", type=above_zero, default=0.4, help="share of the floor's speed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    plan = _plan(options)
    nearest = [] if plan.fits else plan.nearest()
    _show(plan, nearest)
    if options.json:
        changes = [{"change": change} | other.to_json() for change, other in nearest]
        print(json.dumps(plan.to_json() | {"nearest": changes}))
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    given = {"sample_rate": options.sample_rate, "row_format": options.state}
    try:
        settings = config.Head.model_validate(given)
    except ValidationError as error:
        mistakes = [f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()]
        raise UserError("; ".join(mistakes)) from None
    # As on the GPUs that are planned for, whatever this machine has.
    backbone = config.Backbone(
        name=options.backbone,
        embedding_size=options.embedding_size,
        image_size=options.image_size,
        precision="bfloat16",
    )
    head = HeadPlan(
        settings,
        classes=options.classes,
        ranks=options.gpus,
        batch=options.batch,
        embedding_size=options.embedding_size,
        device="cuda",
        optimizer=OPTIMIZERS[options.optimizer],
    )
    link = None if options.link is None else 1e9 * options.link
    rates = Rates(1e12 * options.tflops, 1e12 * options.bandwidth, link, options.efficiency)
    return Plan(head, backbone_cost(backbone), options.image_size, 1e9 * options.gpu_memory, rates)


def _show(plan: Plan, nearest: list[tuple[str, Plan]]) -> None:
    total = sum(plan.memory.values())
    print("memory of a GPU")
    for name, size in [*plan.memory.items(), ("all", total)]:
        print(f"  {name:<36} {size / 1e9:>12,.3f} GB")
    print("sent by a GPU in a step")
    for name, size in [*plan.wire.items(), ("all", sum(plan.wire.values()))]:
        print(f"  {name:<36} {size / 1e6:>12,.3f} MB")
    print("floating-point operations of a GPU in a step")
    for name, flops in (("head", plan.head.flops), ("backbone", plan.backbone_flops)):
        print(f"  {name:<36} {flops / 1e12:>12,.3f} TFLOP")
    print("floor of a step")
    for name, seconds in [*plan.seconds.items(), ("all", plan.floor_seconds)]:
        print(f"  {name:<36} {1e3 * seconds:>12,.3f} ms")
    print(f"expected: {plan.images_per_second:,.0f} img/s, {plan.rates.efficiency:g} of the floor's speed")
    if plan.fits:
        print(f"it fits: {total / 1e9:,.1f} of {plan.gpu_bytes / 1e9:,.1f} GB")
        return
    print(f"it does not fit: {total / 1e9:,.1f} of {plan.gpu_bytes / 1e9:,.1f} GB; what does:")
    for change, other in nearest:
        size = sum(other.memory.values())
        print(f"  {change:<36} {size / 1e9:>12,.1f} GB, {other.images_per_second:,.0f} img/s")
    if not nearest:
        print("  nothing near: take smaller parts at once, or GPUs with more memory")


if __name__ == "__main__":
    sys.exit(main())
