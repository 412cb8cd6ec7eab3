"""Plan a run before there is one: memory per GPU, bytes on the wire, the time of a step, and what would fit.

Nothing is allocated. GB are 10^9 bytes. The floor is what no step can beat at the given rates, an H100's by default;
the throughput that is expected is the floor's, times `--efficiency`, an assumption.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    from pydantic import ValidationError

    from recognition import config
    from recognition.cli.argument_types import above_zero, positive
    from recognition.errors import UserError
    from recognition.planning.backbone import backbone_cost
    from recognition.planning.head import HeadPlan
    from recognition.planning.run import GPUS_PER_MACHINE, MACHINE_LINK, NETWORK_LINK, GpuRates, RunPlan

OPTIMIZERS: dict[str, config.Optimizer] = {"sgd": config.SGD(), "adamw": config.AdamW()}
FLAGS = {"row_format": "state"}
"""Flags whose name is not that of the change that a plan proposes."""


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
        help=f"out of a GPU ({MACHINE_LINK / 1e9:g} up to {GPUS_PER_MACHINE} GPUs, else {NETWORK_LINK / 1e9:g})",
    )
    parser.add_argument("--efficiency", type=above_zero, default=0.4, help="share of the floor's speed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    plan = _plan(options)
    nearest = [] if plan.fits else [(_flags(change), other) for change, other in plan.alternatives()]
    _show(plan, nearest)
    if options.json:
        changes = [{"change": change} | other.to_json() for change, other in nearest]
        print(json.dumps(plan.to_json() | {"nearest": changes}))
    return 0


def _flags(change: dict[str, str | int]) -> str:
    return " ".join(f"--{FLAGS.get(name, name)} {value}" for name, value in change.items())


def _plan(options: argparse.Namespace) -> RunPlan:
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
    rates = GpuRates(1e12 * options.tflops, 1e12 * options.bandwidth, link, options.efficiency)
    return RunPlan(head, backbone_cost(backbone), options.image_size, 1e9 * options.gpu_memory, rates)


def _show(plan: RunPlan, nearest: list[tuple[str, RunPlan]]) -> None:
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
