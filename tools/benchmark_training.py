"""Measure training on this device: images per second and MFU of a backbone under the head, on data made up there.

Three trainings take turns in one run: bfloat16, channels-last and compiled, as one should train; the same without a
compiler; and the baseline, float16 autocast with a GradScaler (on a CPU: float32), NCHW, as arcface_torch does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from pydantic import ValidationError

from recognition import config, distributed
from recognition.benchmark import Result, measure
from recognition.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--backbone", default="iresnet50", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--batch", type=_above_one, default=256, help="images in a step (default: %(default)s)")
    parser.add_argument("--classes", type=_above_one, default=93_431, help="identities (default: MS1MV3's 93431)")
    parser.add_argument("--image-size", type=_above_one, default=112, help="pixels a side (default: %(default)s)")
    parser.add_argument("--steps", type=_above_one, default=40, help="of each, after a warm-up (default: %(default)s)")
    parser.add_argument(
        "--compiler",
        choices=("inductor", "aot_eager", "none"),
        default="inductor",
        help="torch.compile's backend; without a compiler for the machine, aot_eager or none (default: %(default)s)",
    )
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of the device in bfloat16, where it is not known")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    try:
        result = _measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _show(options, result)
    if options.json:
        print(json.dumps(result.to_json()))
    return 0


def _measure(options: argparse.Namespace) -> Result:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    try:
        backbone = config.Backbone(name=options.backbone, image_size=options.image_size)
    except ValidationError as error:
        raise UserError("; ".join(item["msg"] for item in error.errors())) from None
    settings = config.Distributed(backend="nccl" if options.device == "cuda" else "gloo")
    ranks = distributed.start(settings)
    try:
        return measure(
            backbone,
            ranks.device,
            batch=options.batch,
            classes=options.classes,
            steps=options.steps,
            compiler=None if options.compiler == "none" else options.compiler,
            peak=None if options.peak is None else 1e12 * options.peak,
        )
    finally:
        distributed.stop()


def _show(options: argparse.Namespace, result: Result) -> None:
    on = torch.cuda.get_device_name() if options.device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    number = "float16 with a GradScaler" if options.device == "cuda" else "float32"
    mfu = "not known for want of a peak: give --peak"
    if result.mfu is not None and result.peak_flops is not None:
        mfu = f"{result.mfu:.1%} of {result.peak_flops / 1e12:,.1f} TFLOP/s"
    lines = [
        ("training", f"{options.backbone}, {options.batch} images a step, {options.classes:,} classes, on {on}"),
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


def _above_one(text: str) -> int:
    """BatchNorm needs two images, and a loss two classes."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
