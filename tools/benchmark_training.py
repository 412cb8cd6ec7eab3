"""Measure training on this device: images per second and MFU of a backbone under the head, on data made up there.

Three trainings take turns in one run: bfloat16, channels-last and compiled, as one should train; the same without a
compiler; and the baseline, float16 autocast with a GradScaler (on a CPU: float32), NCHW, as arcface_torch does.
`--grid` measures each precision, layout and torch.compile instead, which is what the settings that say `auto` rest on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import torch
    from pydantic import ValidationError

    from recognition import config, distributed, hardware
    from recognition.benchmarks.training import Comparison, Variant, compare, measure_grid
    from recognition.cli.argument_types import above_one, above_zero, path, whole
    from recognition.config import toml
    from recognition.errors import UserError

LAYOUTS = {"channels-last": True, "contiguous": False}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backbone", default="iresnet50", metavar="NAME", help="default: %(default)s")
    which.add_argument("--recipe", type=path, metavar="FILE", help="take the backbone of this configuration")
    parser.add_argument("--batch", type=above_one, default=256, help="images in a step (default: %(default)s)")
    parser.add_argument("--classes", type=above_one, default=93_431, help="identities (default: MS1MV3's 93431)")
    parser.add_argument("--image-size", type=above_one, default=112, help="pixels a side (default: %(default)s)")
    parser.add_argument("--steps", type=above_one, default=40, help="of each, after a warm-up (default: %(default)s)")
    parser.add_argument(
        "--compiler",
        choices=("inductor", "aot_eager", "none"),
        default="inductor",
        help="torch.compile's backend; without a compiler for the machine, aot_eager or none (default: %(default)s)",
    )
    parser.add_argument("--threads", type=whole, default=0, help="of torch on a CPU (default: as many as cores)")
    parser.add_argument("--grid", action="store_true", help="measure each precision, layout and torch.compile")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=tuple(hardware.DTYPES),
        default=["float32", "bfloat16"],
        help="of the grid (default: float32 bfloat16)",
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=tuple(LAYOUTS), default=list(LAYOUTS), help="of the grid (default: both)"
    )
    parser.add_argument("--peak", type=above_zero, metavar="TFLOPS", help="of the device in bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    result = _measure(options)
    if isinstance(result, Comparison):
        _show(options, result)
    else:
        _show_grid(options, result)
    if options.json:
        print(json.dumps(result.to_json() if isinstance(result, Comparison) else [each.to_json() for each in result]))
    return 0


def _measure(options: argparse.Namespace) -> Comparison | list[Variant]:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    settings = config.Distributed(backend="nccl" if options.device == "cuda" else "gloo")
    backbone = _backbone(options)
    ranks = distributed.start(settings, options.threads)
    sizes = {"batch": options.batch, "classes": options.classes, "steps": options.steps}
    compiler = None if options.compiler == "none" else options.compiler
    try:
        if options.grid:
            return measure_grid(
                backbone,
                ranks.device,
                **sizes,
                precisions=options.precisions,
                layouts=[LAYOUTS[name] for name in options.layouts],
                compiler=compiler,
            )
        peak = None if options.peak is None else 1e12 * options.peak
        return compare(backbone, ranks.device, **sizes, compiler=compiler, peak=peak)
    finally:
        distributed.stop()


def _backbone(options: argparse.Namespace) -> config.Backbone:
    try:
        tree = toml.read(options.recipe).get("backbone", {}) if options.recipe else {"name": options.backbone}
        return config.Backbone.model_validate(tree | {"image_size": options.image_size})
    except ValidationError as error:
        raise UserError("; ".join(item["msg"] for item in error.errors())) from None
    except ValueError as error:
        raise UserError(str(error)) from None


def _show_grid(options: argparse.Namespace, variants: list[Variant]) -> None:
    on = _device(options)
    print(f"{_name(options)}, {options.batch} images a step, {options.classes:,} classes, on {on}")
    print(f"{'precision':<10} {'layout':<14} {'':<9} {'img/s':>8} {'compilation':>12} {'pays after':>16}")
    for each in sorted(variants, key=lambda variant: -variant.images_per_second):
        layout = "channels-last" if each.channels_last else "contiguous"
        row = f"{each.precision:<10} {layout:<14} {'compiled' if each.compiled else 'eager':<9}"
        row += f" {each.images_per_second:>8,.1f}"
        if each.compile_seconds is not None:
            pays = "never" if each.pays_after_images is None else f"{each.pays_after_images:,} images"
            row += f" {each.compile_seconds:>10.1f} s {pays:>16}"
        print(row)


def _name(options: argparse.Namespace) -> str:
    return str(options.recipe or options.backbone)


def _device(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"


def _show(options: argparse.Namespace, result: Comparison) -> None:
    on = _device(options)
    number = "float16 with a GradScaler" if options.device == "cuda" else "float32"
    mfu = "not known for want of a peak: give --peak"
    if result.mfu is not None and result.peak_flops is not None:
        mfu = f"{result.mfu:.1%} of {result.peak_flops / 1e12:,.1f} TFLOP/s"
    lines = [
        (
            "training",
            f"{_name(options)}, {options.batch} images a step, {options.classes:,} classes, on {on}",
        ),
        ("compiled", f"{result.images_per_second:,.1f} img/s: bfloat16, channels-last, {options.compiler}"),
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
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    sys.exit(main())
