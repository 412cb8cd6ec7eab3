"""`recognition benchmark head`."""

import json
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import POSITIVE
from recognition.cli.command import command, device_option, head_settings, json_option, row_format_option

if TYPE_CHECKING:
    from recognition.benchmarks.head import Details, Result
    from recognition.planning.head import HeadPlan

EXAMPLES = """
recognition benchmark head --classes 100000 --batch 64 --reference
recognition benchmark head --device cuda --ranks 8 --classes 10000000
"""


@command("head", examples=EXAMPLES)
@device_option
@click.option("--ranks", type=POSITIVE, default=1, help="Processes, one for each GPU.")
@click.option("--classes", type=POSITIVE, required=True, help="Identities over all ranks.")
@click.option("--batch", type=POSITIVE, default=64, help="Images per rank.")
@click.option("--sample-rate", type=float, default=1.0, metavar="X", help="Partial FC's fraction of classes.")
@click.option("--loss", default="cosface", metavar="NAME", help="As head.loss.name.")
@row_format_option
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto", help="Of the matrix products."
)
@click.option(
    "--backend", "--kernels", "backend", type=click.Choice(["auto", "torch", "triton"]), default="auto", help="Kernels."
)
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", help="Of the class weights.")
@click.option("--embedding-size", type=POSITIVE, default=512, help="Length of an embedding.")
@click.option("--chunk", type=POSITIVE, help="Classes per chunk.  [default: what suits the device]")
@click.option("--steps", type=POSITIVE, default=5, help="Steps to measure, after a warm-up.")
@click.option("--threads", type=POSITIVE, default=1, help="Threads per process on a CPU.")
@click.option("--reference", is_flag=True, help="Also measure three steps of a plain PyTorch head.")
@json_option
def benchmark_head(as_json: bool, **options: Any) -> None:
    """Measure the head on random embeddings.

    Prints time, memory and operations of a training step, and their floor. The ranks are processes that this program
    starts itself. Embeddings are random, as near to their identities as those of a network half trained. The plain head
    of --reference is CosFace on all logits in float32.
    """
    from recognition.tracking.progress import task

    settings = head_settings(
        {
            "loss": {"name": options["loss"]},
            "sample_rate": options["sample_rate"],
            "row_format": options["row_format"],
            "precision": options["precision"],
            "backend": options["backend"],
            "chunk": options["chunk"],
        }
    )
    with task("loading torch", after=0):
        from recognition import config
        from recognition.benchmarks.head import measure
        from recognition.planning.head import HeadPlan

    plan = HeadPlan(
        settings,
        classes=options["classes"],
        ranks=options["ranks"],
        batch=options["batch"],
        embedding_size=options["embedding_size"],
        device=options["device"],
        optimizer=config.AdamW() if options["optimizer"] == "adamw" else config.SGD(),
    )
    with task("measuring the head"):
        result, details = measure(plan, options["steps"], threads=options["threads"], baseline=options["reference"])
    _show(plan, result, details)
    if as_json:
        click.echo(json.dumps(result.to_json()))


def _show(plan: "HeadPlan", result: "Result", details: "Details") -> None:
    import torch

    from recognition import hardware

    sampled = f", {plan.settings.sample_rate:g} of them in a step" if plan.settings.sample_rate < 1 else ""
    device = torch.device(plan.device)
    product = hardware.product_type(plan.settings.precision, device)
    lines: list[tuple[str, Any]] = [
        ("head", f"{plan.settings.loss.name}, {plan.classes:,} classes of {plan.embedding_size} numbers{sampled}"),
        ("ranks", f"{plan.ranks} on {plan.device}, {plan.batch} images each"),
        ("processor", str(hardware.detect(device))),
        ("products", f"in {str(product).removeprefix('torch.')}"),
        ("step", f"{_seconds(result.step_seconds)}, {result.images_per_second:,.0f} img/s over all ranks"),
        ("forward", _seconds(result.forward_seconds)),
        ("backward", f"{_seconds(result.backward_seconds)} with the update"),
        ("peak memory", f"{_bytes(result.peak_bytes)} per rank above the interpreter's"),
        ("state", f"{_bytes(result.state_bytes)} ({_parts(details.state)})"),
        ("achieved", f"{result.flops_per_second / 1e9:,.1f} GFLOP/s per rank, the four matrix products counted"),
        ("machine", f"{details.rates.flops / 1e9:,.1f} GFLOP/s in products, {_bytes(details.rates.bytes)}/s in memory"),
        (
            "floor",
            f"{_seconds(result.floor_seconds)}: the longer of {_seconds(details.products_seconds)} of products and "
            f"{_seconds(details.traffic_seconds)} of memory traffic",
        ),
        ("above the floor", f"{result.floor_ratio:.2f} times"),
    ]
    if result.baseline_step_seconds is not None and result.baseline_peak_bytes is not None:
        how = "in turns with the head" if details.alternating else "after the head, for want of memory"
        lines += [
            ("plain head", f"{_seconds(result.baseline_step_seconds)} a step, measured {how}"),
            ("its peak memory", f"{_bytes(result.baseline_peak_bytes)} per rank"),
            ("times faster", f"{result.baseline_ratio:.2f}"),
        ]
    elif details.baseline_bytes is not None:
        lines.append(("plain head", f"out of memory: it needs about {_bytes(details.baseline_bytes)}"))
    for name, value in lines:
        click.echo(f"{name:<16} {value}")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_bytes(count)}" for name, count in parts.items())
