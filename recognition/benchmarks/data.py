"""Measure the data pipeline: images per second that it reads, decodes, augments and puts on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from recognition.config import Augment, Data
from recognition.data.index import Index
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
"""Augmentations that are measured, by name."""
WARM_UP = 5
"""Batches before the clock starts."""


@dataclass(frozen=True)
class Rates:
    """Throughput of one loader with one augmentation."""

    per_second: float
    """Images per second."""
    per_cpu_second: float
    """Images per second of processor time, all threads of the process together."""


def measure(
    index: Index,
    settings: Data,
    *,
    batch: int,
    steps: int,
    device: torch.device,
    advance: Callable[[int], None] = lambda done: None,
) -> Rates:
    """Time `steps` batches of 112 x 112 pixels after a warm-up; `advance` gets the number of batches done."""
    pipeline = Pipeline(
        index,
        settings,
        seed=0,
        batch=batch,
        rank=0,
        world=1,
        device=device,
        image_size=112,
        channels_last=True,
    )
    try:
        for done in range(WARM_UP):
            next(pipeline)
            advance(done + 1)
        _wait(device)
        start, cpu_start = time.perf_counter(), time.process_time()
        for done in range(steps):
            next(pipeline)
            advance(WARM_UP + done + 1)
        _wait(device)
        images = batch * steps
        return Rates(images / (time.perf_counter() - start), images / (time.process_time() - cpu_start))
    finally:
        pipeline.close()


def settings_of(path: Path, augment: Augment, loader: str, threads: int) -> Data:
    """Return settings of a data set for a measurement."""
    return Data.model_validate({"path": path, "threads": threads, "augment": augment, "loader": loader})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
