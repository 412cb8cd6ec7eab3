"""Measure the data pipeline: images per second that it reads, decodes, augments and puts on the device.

A CPU-second is one of all threads of the process together.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import torch

    from recognition import hardware
    from recognition.cli.argument_types import path, positive
    from recognition.config import Augment, Data
    from recognition.data.index import Index, open_index
    from recognition.data.pipeline import Pipeline
    from recognition.errors import UserError

AUGMENTS = {
    "flip": Augment(),
    "everything": Augment(
        shift=0.06,
        zoom=0.12,
        rotate_degrees=10.0,
        brightness=0.2,
        contrast=0.25,
        saturation=0.3,
        gray=0.1,
        erase=0.3,
    ),
}
_WARM_UP = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=path, required=True, metavar="DIR", help="a data set, as in data.path")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--loader",
        nargs="+",
        choices=("auto", "dali", "torchvision"),
        default=["auto"],
        help="as in data.loader; several take turns, and are compared (default: auto)",
    )
    parser.add_argument("--batch", type=positive, default=256, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=100, help="batches, after a warm-up (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="that decode on the CPU (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    found: dict[str, float] = {}
    loaders = list(dict.fromkeys(map(hardware.loader, options.loader)))
    with tempfile.TemporaryDirectory() as cache:
        index = open_index(options.data, Path(cache))
        for name, augment in AUGMENTS.items():
            rates = [_rates(index, augment, loader, options) for loader in loaders]
            for loader, (per_second, per_cpu_second) in zip(loaders, rates, strict=True):
                prefix = name if len(loaders) == 1 else f"{loader}_{name}"
                found[f"{prefix}_images_per_second"] = per_second
                found[f"{prefix}_images_per_cpu_second"] = per_cpu_second
                print(
                    f"{name:<12} {loader:<12} {per_second:>7,.0f} img/s, {per_cpu_second:>7,.0f} per CPU-second"
                    f" ({per_second / rates[0][0]:.2f} x, {per_cpu_second / rates[0][1]:.2f} x {loaders[0]}),"
                    f" batch {options.batch}, on {options.device}"
                )
    if options.json:
        print(json.dumps(found))
    return 0


def _rates(index: Index, augment: Augment, loader: str, options: argparse.Namespace) -> tuple[float, float]:
    """Images per second, and per CPU-second."""
    pipeline = Pipeline(
        index,
        Data(path=options.data, threads=options.threads, augment=augment, loader=loader),
        seed=0,
        batch=options.batch,
        rank=0,
        world=1,
        device=torch.device(options.device),
        image_size=112,
        channels_last=True,
    )
    try:
        for _ in range(_WARM_UP):
            next(pipeline)
        _wait(options.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            next(pipeline)
        _wait(options.device)
        images = options.batch * options.steps
        return images / (time.perf_counter() - start), images / (time.process_time() - cpu_start)
    finally:
        pipeline.close()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
