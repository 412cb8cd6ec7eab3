"""Measure a head on this machine: seconds, memory and floating-point operations of a training step, and their floor.

The ranks are processes that this program starts itself. Embeddings are random, as near to their identities as those
of a network half trained. `--reference` measures the plain PyTorch head as well: CosFace on all logits in float32.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import torch
    from pydantic import ValidationError

    from recognition import config, hardware
    from recognition.benchmarks.head import BASELINE_STEPS, Details, Result, measure
    from recognition.cli.argument_types import positive
    from recognition.errors import UserError
    from recognition.planning.head import HeadPlan

LOSSES = [loss.model_fields["name"].default for loss in get_args(get_args(config.Loss)[0])]
OPTIMIZERS: dict[str, config.Optimizer] = {"sgd": config.SGD(), "adamw": config.AdamW()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--ranks", type=positive, default=1, help="processes, on GPUs one each (default: 1)")
    parser.add_argument("--classes", type=positive, required=True, help="identities over all ranks")
    parser.add_argument("--batch", type=positive, default=64, help="images per rank (default: %(default)s)")
    parser.add_argument("--sample-rate", type=float, default=1.0, help="Partial FC's fraction of classes (default: 1)")
    parser.add_argument("--loss", choices=LOSSES, default="cosface", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--state", choices=("float32", "split", "bfloat16"), default="float32", help="how rows are kept"
    )
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the products")
    parser.add_argument("--kernels", choices=("auto", "torch", "triton"), default="auto", help="what does the work")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="what moves the rows")
    parser.add_argument("--embedding-size", type=positive, default=512, help="default: %(default)s")
    parser.add_argument("--chunk", type=positive, help="classes per chunk (default: what suits the device)")
    parser.add_argument("--steps", type=positive, default=5, help="steps to measure after a warm-up (default: 5)")
    parser.add_argument("--threads", type=positive, default=1, help="threads per process on a CPU (default: 1)")
    parser.add_argument("--reference", action="store_true", help=f"and {BASELINE_STEPS} steps of the plain head")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    plan = _plan(options)
    result, details = measure(plan, options.steps, threads=options.threads, baseline=options.reference)
    _show(plan, result, details)
    if options.json:
        print(json.dumps(result.to_json()))
    return 0


def _plan(options: argparse.Namespace) -> HeadPlan:
    try:
        settings = config.Head.model_validate(
            {
                "loss": {"name": options.loss},
                "sample_rate": options.sample_rate,
                "state": options.state,
                "precision": options.precision,
                "kernels": options.kernels,
                "chunk": options.chunk,
            }
        )
    except ValidationError as error:
        mistakes = [f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()]
        raise UserError("; ".join(mistakes)) from None
    return HeadPlan(
        settings,
        classes=options.classes,
        ranks=options.ranks,
        batch=options.batch,
        embedding_size=options.embedding_size,
        device=options.device,
        optimizer=OPTIMIZERS[options.optimizer],
    )


def _show(plan: HeadPlan, result: Result, details: Details) -> None:
    sampled = f", {plan.settings.sample_rate:g} of them in a step" if plan.settings.sample_rate < 1 else ""
    device = torch.device(plan.device)
    product = hardware.product_type(plan.settings.precision, device)
    lines: list[tuple[str, Any]] = [
        ("head", f"{plan.settings.loss.name}, {plan.classes:,} classes of {plan.embedding_size} numbers{sampled}"),
        ("ranks", f"{plan.ranks} on {plan.device}, {plan.batch} images each"),
        ("processor", str(hardware.of(device))),
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
        print(f"{name:<16} {value}")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {_bytes(count)}" for name, count in parts.items())


if __name__ == "__main__":
    sys.exit(main())
