"""`recognition plan`."""

import json
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import ABOVE_ZERO, POSITIVE
from recognition.cli.command import command, head_settings, json_option, row_format_option

if TYPE_CHECKING:
    from recognition.planning.run import RunPlan

EXAMPLES = """
recognition plan --classes 10000000 --gpus 8 --gpu-memory 80 \\
    --backbone iresnet100 --batch 128
"""


@command("plan", examples=EXAMPLES)
@click.option("--classes", type=POSITIVE, required=True, help="Identities.")
@click.option("--gpus", type=POSITIVE, required=True, help="GPUs in all.")
@click.option("--gpu-memory", type=ABOVE_ZERO, required=True, metavar="GB", help="Memory of each GPU.")
@click.option("--backbone", default="iresnet100", metavar="NAME", help="As backbone.name.")
@click.option("--batch", type=POSITIVE, default=128, help="Images per GPU.")
@click.option("--sample-rate", type=float, default=1.0, metavar="X", help="Partial FC's fraction of classes.")
@row_format_option
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", help="Of backbone and class weights.")
@click.option("--embedding-size", type=POSITIVE, default=512, help="Length of an embedding.")
@click.option("--image-size", type=POSITIVE, default=112, help="Height and width in pixels.")
@click.option("--tflops", type=ABOVE_ZERO, default=790.0, help="TFLOP/s of matrix products in bfloat16.")
@click.option("--bandwidth", type=ABOVE_ZERO, default=3.0, metavar="TB/S", help="Of a GPU's memory.")
@click.option(
    "--link",
    type=ABOVE_ZERO,
    metavar="GB/S",
    help="Sent by a GPU.  [default: 450 on up to 8 GPUs, 50 on more]",
)
@click.option("--efficiency", type=ABOVE_ZERO, default=0.4, help="Expected share of the floor's speed.")
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Plan a run: its memory, its time, and what would fit.

    Prints memory per GPU, bytes sent, and the time of a step. Nothing is allocated. GB are 10^9 bytes. The floor is
    what no step can beat at the given rates, an H100's by default; the throughput that is expected is the floor's,
    times --efficiency, an assumption.
    """
    from recognition.tracking import progress

    with progress.task("counting the backbone's operations"):
        planned = _planned(options)
    nearest: list[tuple[str, RunPlan]] = []
    if not planned.fits:
        with progress.task("looking for what fits"):
            nearest = [(_flags(change), other) for change, other in planned.alternatives()]
    _show(planned, nearest)
    if as_json:
        changes = [{"change": change} | other.to_json() for change, other in nearest]
        click.echo(json.dumps(planned.to_json() | {"nearest": changes}))


def _flags(change: dict[str, str | int]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in change.items())


def _planned(options: dict[str, Any]) -> "RunPlan":
    from recognition import config
    from recognition.planning.backbone import backbone_cost
    from recognition.planning.head import HeadPlan
    from recognition.planning.run import GpuRates, RunPlan

    settings = head_settings({"sample_rate": options["sample_rate"], "row_format": options["row_format"]})
    # As on the GPUs that are planned for, whatever this machine has.
    backbone = config.Backbone(
        name=options["backbone"],
        embedding_size=options["embedding_size"],
        image_size=options["image_size"],
        precision="bfloat16",
    )
    head = HeadPlan(
        settings,
        classes=options["classes"],
        ranks=options["gpus"],
        batch=options["batch"],
        embedding_size=options["embedding_size"],
        device="cuda",
        optimizer=config.AdamW() if options["optimizer"] == "adamw" else config.SGD(),
    )
    link = None if options["link"] is None else 1e9 * options["link"]
    rates = GpuRates(1e12 * options["tflops"], 1e12 * options["bandwidth"], link, options["efficiency"])
    return RunPlan(head, backbone_cost(backbone), options["image_size"], 1e9 * options["gpu_memory"], rates)


def _show(planned: "RunPlan", nearest: "list[tuple[str, RunPlan]]") -> None:
    total = sum(planned.memory.values())
    click.echo("memory of a GPU")
    for name, size in [*planned.memory.items(), ("all", total)]:
        click.echo(f"  {name:<36} {size / 1e9:>12,.3f} GB")
    click.echo("sent by a GPU in a step")
    for name, size in [*planned.wire.items(), ("all", sum(planned.wire.values()))]:
        click.echo(f"  {name:<36} {size / 1e6:>12,.3f} MB")
    click.echo("floating-point operations of a GPU in a step")
    for name, flops in (("head", planned.head.flops), ("backbone", planned.backbone_flops)):
        click.echo(f"  {name:<36} {flops / 1e12:>12,.3f} TFLOP")
    click.echo("floor of a step")
    for name, seconds in [*planned.seconds.items(), ("all", planned.floor_seconds)]:
        click.echo(f"  {name:<36} {1e3 * seconds:>12,.3f} ms")
    click.echo(f"expected: {planned.images_per_second:,.0f} img/s, {planned.rates.efficiency:g} of the floor's speed")
    if planned.fits:
        click.echo(f"it fits: {total / 1e9:,.1f} of {planned.gpu_bytes / 1e9:,.1f} GB")
        return
    click.echo(f"it does not fit: {total / 1e9:,.1f} of {planned.gpu_bytes / 1e9:,.1f} GB; what does:")
    for change, other in nearest:
        size = sum(other.memory.values())
        click.echo(f"  {change:<36} {size / 1e9:>12,.1f} GB, {other.images_per_second:,.0f} img/s")
    if not nearest:
        click.echo("  nothing near: take smaller parts at once, or GPUs with more memory")
