"""Measure the data pipeline: images per second that it reads, decodes, augments and puts on the device."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from recognition.config import Augment, Data, UserError
from recognition.data.index import Index, open_index
from recognition.data.pipeline import Pipeline

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a data set, as in data.path")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="batches, after a warm-up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the decoder on the CPU (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    found = {}
    try:
        with tempfile.TemporaryDirectory() as cache:
            index = open_index(options.data, Path(cache))
            for name, augment in AUGMENTS.items():
                found[f"{name}_images_per_second"] = rate = _rate(index, augment, options)
                print(f"{name:<16} {rate:,.0f} img/s, batch {options.batch}, on {options.device}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
    return 0


def _rate(index: Index, augment: Augment, options: argparse.Namespace) -> float:
    """Images per second."""
    pipeline = Pipeline(
        index,
        Data(path=options.data, threads=options.threads, augment=augment),
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
        start = time.perf_counter()
        for _ in range(options.steps):
            next(pipeline)
        _wait(options.device)
        return options.batch * options.steps / (time.perf_counter() - start)
    finally:
        pipeline.close()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
