"""`recognition benchmark training`."""

import json
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import ABOVE_ONE, ABOVE_ZERO, PATH, WHOLE
from recognition.cli.command import Several, check_cuda, command, device_option, json_option

if TYPE_CHECKING:
    from recognition import config
    from recognition.benchmarks.training import Comparison, Variant

LAYOUTS = {"channels-last": True, "contiguous": False}
EXAMPLES = """
recognition benchmark training --backbone iresnet18 --batch 32 --compiler none
recognition benchmark training --device cuda --recipe ms1mv3_r50 --grid
"""


@command("training", examples=EXAMPLES)
@device_option
@click.option("--backbone", metavar="NAME", help="As backbone.name.  [default: iresnet50]")
@click.option("--recipe", type=PATH, metavar="CONFIG", help="Take the backbone of this recipe or file of settings.")
@click.option("--batch", type=ABOVE_ONE, default=256, help="Images in a step.")
@click.option("--classes", type=ABOVE_ONE, default=93_431, help="Identities; the default is MS1MV3's number.")
@click.option("--image-size", type=ABOVE_ONE, default=112, help="Height and width in pixels.")
@click.option("--steps", type=ABOVE_ONE, default=40, help="Steps of each, after a warm-up.")
@click.option(
    "--compiler",
    type=click.Choice(["inductor", "aot_eager", "none"]),
    default="inductor",
    help="Backend of torch.compile; without a compiler for the machine, aot_eager or none.",
)
@click.option("--threads", type=WHOLE, default=0, help="Threads of torch on a CPU; 0: as many as cores.")
@click.option("--grid", is_flag=True, help="Measure each precision, layout and torch.compile.")
@click.option(
    "--precisions",
    cls=Several,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default=["float32", "bfloat16"],
    metavar="NAME...",
    help="Of the grid: float32, bfloat16, float16.",
)
@click.option(
    "--layouts",
    cls=Several,
    type=click.Choice(list(LAYOUTS)),
    default=list(LAYOUTS),
    metavar="NAME...",
    help="Of the grid.",
)
@click.option("--peak", type=ABOVE_ZERO, metavar="TFLOPS", help="Of the device in bfloat16, for MFU.")
@json_option
def benchmark_training(as_json: bool, **options: Any) -> None:
    """Measure training on one device, on random data.

    Prints images per second and MFU. Three trainings take turns in one run: bfloat16, channels-last and compiled, as
    one should train; the same without a compiler; and the baseline, float16 autocast with a GradScaler (on a CPU:
    float32), NCHW, as arcface_torch does. --grid measures each precision, layout and torch.compile instead, which is
    what the settings that say `auto` rest on.
    """
    if options["backbone"] is not None and options["recipe"] is not None:
        raise click.UsageError("give --backbone or --recipe, not both", click.get_current_context())
    from recognition.tracking.progress import task

    with task("loading torch", after=0):
        from recognition.benchmarks.training import Comparison

    result = _measured(options)
    if isinstance(result, Comparison):
        _show(options, result)
    else:
        _show_grid(options, result)
    if as_json:
        click.echo(
            json.dumps(result.to_json() if isinstance(result, Comparison) else [each.to_json() for each in result])
        )


def _measured(options: dict[str, Any]) -> "Comparison | list[Variant]":
    from recognition import config, distributed
    from recognition.benchmarks.training import compare, measure_grid
    from recognition.tracking.progress import task

    check_cuda(options["device"])
    settings = config.Distributed(backend="nccl" if options["device"] == "cuda" else "gloo")
    backbone = _backbone(options)
    ranks = distributed.start(settings, options["threads"])
    sizes = {"batch": options["batch"], "classes": options["classes"], "steps": options["steps"]}
    compiler = None if options["compiler"] == "none" else options["compiler"]
    try:
        with task("measuring training"):
            if options["grid"]:
                return measure_grid(
                    backbone,
                    ranks.device,
                    **sizes,
                    precisions=list(options["precisions"]),
                    layouts=[LAYOUTS[name] for name in options["layouts"]],
                    compiler=compiler,
                )
            peak = None if options["peak"] is None else 1e12 * options["peak"]
            return compare(backbone, ranks.device, **sizes, compiler=compiler, peak=peak)
    finally:
        distributed.stop()


def _backbone(options: dict[str, Any]) -> "config.Backbone":
    from pydantic import ValidationError

    from recognition import config
    from recognition.config import recipes
    from recognition.config.extending import read_extended
    from recognition.errors import UserError

    recipe = options["recipe"]
    try:
        if recipe:
            tree = read_extended(recipes.find(recipe), config.Config).get("backbone", {})
        else:
            tree = {"name": _name(options)}
        return config.Backbone.model_validate(tree | {"image_size": options["image_size"]})
    except ValidationError as error:
        raise UserError("; ".join(item["msg"] for item in error.errors())) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def _show_grid(options: dict[str, Any], variants: "list[Variant]") -> None:
    on = _device(options)
    click.echo(f"{_name(options)}, {options['batch']} images a step, {options['classes']:,} classes, on {on}")
    click.echo(f"{'precision':<10} {'layout':<14} {'':<9} {'img/s':>8} {'compilation':>12} {'pays after':>16}")
    for each in sorted(variants, key=lambda variant: -variant.images_per_second):
        layout = "channels-last" if each.channels_last else "contiguous"
        row = f"{each.precision:<10} {layout:<14} {'compiled' if each.compiled else 'eager':<9}"
        row += f" {each.images_per_second:>8,.1f}"
        if each.compile_seconds is not None:
            pays = "never" if each.pays_after_images is None else f"{each.pays_after_images:,} images"
            row += f" {each.compile_seconds:>10.1f} s {pays:>16}"
        click.echo(row)


def _name(options: dict[str, Any]) -> str:
    return str(options["recipe"] or options["backbone"] or "iresnet50")


def _device(options: dict[str, Any]) -> str:
    import torch

    if options["device"] == "cuda":
        return torch.cuda.get_device_name()
    return f"the CPU, {torch.get_num_threads()} threads"


def _show(options: dict[str, Any], result: "Comparison") -> None:
    number = "float16 with a GradScaler" if options["device"] == "cuda" else "float32"
    mfu = "not known for want of a peak: give --peak"
    if result.mfu is not None and result.peak_flops is not None:
        mfu = f"{result.mfu:.1%} of {result.peak_flops / 1e12:,.1f} TFLOP/s"
    sizes = f"{options['batch']} images a step, {options['classes']:,} classes"
    lines = [
        ("training", f"{_name(options)}, {sizes}, on {_device(options)}"),
        ("compiled", f"{result.images_per_second:,.1f} img/s: bfloat16, channels-last, {options['compiler']}"),
        ("eager", f"{result.eager_images_per_second:,.1f} img/s: the same, not compiled"),
        ("baseline", f"{result.baseline_images_per_second:,.1f} img/s: {number}, NCHW, not compiled"),
        ("times faster", f"{result.baseline_ratio:.2f} than the baseline, {result.eager_ratio:.2f} than eager"),
        (
            "achieved",
            f"{result.flops_per_second / 1e12:,.3f} TFLOP/s, {result.flops_per_image / 1e9:,.2f} GFLOP an image",
        ),
        ("MFU", mfu),
    ]
    if result.memory_bytes is not None:
        lines.append(("peak memory", f"{result.memory_bytes / 1e9:.2f} GB, compiled"))
    for name, value in lines:
        click.echo(f"{name:<16} {value}")
