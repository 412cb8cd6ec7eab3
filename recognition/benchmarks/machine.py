"""Short measurements of a machine: matrix products, convolutions, image decoders, all-reduce, disk.

Every rate is that of this process with its threads, or of one thread where that is stated. Files that are written are
deleted.
"""

import functools
import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from recognition import distributed, hardware
from recognition.data.procedural.dataset import encode
from recognition.distributed.local_ranks import processes
from recognition.errors import UserError
from recognition.files.atomic import temporary_path

_SIDE = {"cpu": 512, "cuda": 4096}
_CHANNELS, _MAP, _BATCH = 64, 28, 32
_FACES = 32
_BATCHES = 16
PARTS = 5
"""Parts that `measure` measures."""


@dataclass(frozen=True)
class Effort:
    """Amount of work in each measurement."""

    seconds: float = 0.4
    """Duration of each measurement, after a warm-up; at least one repeat."""
    bucket: int = 25 << 20
    """Bytes per all-reduce."""
    file: int = 256 << 20
    """Bytes of the file that is written and read."""


QUICK = Effort(seconds=0.05, bucket=1 << 20, file=16 << 20)


@dataclass(frozen=True)
class Convolution:
    """Speed of a 3 x 3 convolution from 64 to 64 channels on 32 maps of 28 x 28; operations per second."""

    precision: str
    channels_last: bool
    forward: float
    backward: float
    """Gradients of input and weight together."""

    @property
    def seconds(self) -> float:
        """Time of a forward and a backward pass, up to a factor common to all convolutions."""
        return 1 / self.forward + 2 / self.backward


@dataclass(frozen=True)
class Exchange:
    """Speed of an all-reduce between processes of this machine."""

    backend: str
    ranks: int
    bytes_per_second: float
    """Bytes of the tensor per second of an all-reduce."""


@dataclass(frozen=True)
class Disk:
    """Bytes per second of one large file, written and read sequentially."""

    folder: str
    write: float
    """Rate of writing, including fsync."""
    read: float


@dataclass(frozen=True)
class Measurements:
    """Results of all measurements."""

    products: dict[str, float]
    """Floating-point operations per second of square matrix products, by precision."""
    convolutions: list[Convolution]
    decoding: dict[str, float]
    """Faces (JPEG, 112 x 112) per second of one thread, by decoder."""
    exchange: Exchange
    disk: Disk
    load: float = 0.0
    """Load average over the minute before: the number of processes that wanted a core."""


def measure(
    device: torch.device,
    folder: Path,
    *,
    ranks: int,
    effort: Effort,
    advance: Callable[[int], None] = lambda done: None,
) -> Measurements:
    """Measure everything, the disk in `folder`; `advance` gets the number of parts done.

    Raises UserError if `folder` is not writable.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    # The disk comes first, because a mistake in the folder's name shows there.
    on_disk = disk(folder, effort.file)
    advance(1)
    by_product = products(device, effort.seconds)
    advance(2)
    by_convolution = convolutions(device, effort.seconds)
    advance(3)
    by_decoder = decoding([encode(0, identity, 0) for identity in range(_FACES)], device, effort.seconds)
    advance(4)
    return Measurements(by_product, by_convolution, by_decoder, exchange(device, ranks, effort), on_disk, load)


def products(device: torch.device, seconds: float) -> dict[str, float]:
    """Measure products of square matrices; return floating-point operations per second by precision."""
    side = _SIDE[device.type]
    found = {}
    for precision in _precisions(device, float16=True):
        a, b = (torch.randn(side, side, device=device).to(hardware.DTYPES[precision]) for _ in range(2))
        found[precision] = 2 * side**3 / _seconds(functools.partial(torch.mm, a, b), device, seconds)
    return found


def convolutions(device: torch.device, seconds: float) -> list[Convolution]:
    """Measure a convolution in each precision and layout."""
    flops = 2 * _BATCH * _MAP**2 * _CHANNELS**2 * 9
    found = []
    # float16 is left out on processors, where it is tens of times slower.
    for precision in _precisions(device, float16=device.type == "cuda"):
        for layout in (torch.channels_last, torch.contiguous_format):
            shapes = (_BATCH, _CHANNELS, _MAP, _MAP), (_CHANNELS, _CHANNELS, 3, 3)
            x, weight = (
                torch.randn(*shape, device=device).to(hardware.DTYPES[precision], memory_format=layout).requires_grad_()
                for shape in shapes
            )
            forward = functools.partial(torch.nn.functional.conv2d, x, weight, padding=1)
            y = forward()
            backward = functools.partial(torch.autograd.grad, y, (x, weight), torch.randn_like(y), retain_graph=True)
            rates = flops / _seconds(forward, device, seconds), 2 * flops / _seconds(backward, device, seconds)
            found.append(Convolution(precision, layout == torch.channels_last, *rates))
    return found


def decoding(faces: Sequence[bytes], device: torch.device, seconds: float) -> dict[str, float]:
    """Measure DALI, if installed, and Pillow, one thread each; return JPEG files decoded per second by decoder.

    The loader without DALI decodes with Pillow.
    """

    def decode_all() -> None:
        for face in faces:
            Image.open(io.BytesIO(face)).convert("RGB")

    found = {}
    if hardware.loader("auto") == "dali":
        decoders = {"DALI": "cpu"} | ({"DALI, on the GPU": "mixed"} if device.type == "cuda" else {})
        for name, decoder in decoders.items():
            found[name] = _BATCHES * len(faces) / _seconds(_dali(faces, decoder), device, seconds)
    found["Pillow"] = len(faces) / _seconds(decode_all, torch.device("cpu"), seconds)
    return found


def exchange(device: torch.device, ranks: int, effort: Effort) -> Exchange:
    """Measure an all-reduce of a bucket of gradients: NCCL's over `ranks` GPUs, or gloo's over processes."""
    on_gpus = device.type == "cuda" and 2 <= ranks <= torch.cuda.device_count()
    ranks = max(2, ranks)
    with processes(
        ranks,
        _AllReduceRank,
        device="cuda" if on_gpus else "cpu",
        threads=1,
        less="fewer ranks",
        preload="recognition.benchmarks.machine",
    ) as group:
        taken = max(group.call("seconds", effort.bucket, effort.seconds))
    return Exchange("NCCL" if on_gpus else "gloo", ranks, effort.bucket / taken)


def disk(folder: Path, size: int) -> Disk:
    """Write a file of `size` bytes into `folder` and read it. Raises UserError if that fails."""
    path = temporary_path(folder / "doctor")
    block = os.urandom(1 << 20)
    blocks = max(1, size >> 20)
    try:
        try:
            start = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(blocks):
                    file.write(block)
                os.fsync(file.fileno())
                written = time.perf_counter() - start
                if hasattr(os, "posix_fadvise"):
                    # Otherwise the file would be read from memory.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
            read = time.perf_counter() - start
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}: name another folder with --folder") from None
    return Disk(str(folder), (blocks << 20) / written, (blocks << 20) / read)


class _AllReduceRank:
    """Rank that takes part in all-reduces."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, size: int, budget: float) -> float:
        """Return the median time of an all-reduce of `size` bytes of float32, repeated for about `budget` seconds."""
        tensor = torch.zeros(size // 4, device=self.device)
        reduce = functools.partial(dist.all_reduce, tensor)
        first = _seconds(reduce, self.device, 0)
        repeats = distributed.broadcast_object(max(1, min(100, int(budget / first))))
        taken = []
        for _ in range(repeats):
            start = _now(self.device)
            reduce()
            taken.append(_now(self.device) - start)
        return statistics.median(taken)


def _dali(faces: Sequence[bytes], decoder: str) -> Callable[[], Any]:
    """Return a function that decodes the faces `_BATCHES` times, in one thread."""
    from nvidia.dali import Pipeline, fn

    arrays = [np.frombuffer(face, np.uint8) for face in faces]
    device = torch.cuda.current_device() if decoder == "mixed" else None
    graph = Pipeline(batch_size=len(faces), num_threads=1, device_id=device, prefetch_queue_depth=1)
    with graph:
        encoded = fn.external_source(source=lambda: arrays, device="cpu")
        graph.set_outputs(fn.decoders.image(encoded, device=decoder))

    def decode() -> None:
        # DALI decodes one batch ahead, which matters little among several.
        for _ in range(_BATCHES):
            graph.run()

    return decode


def _precisions(device: torch.device, *, float16: bool) -> list[str]:
    return [name for name in hardware.DTYPES if float16 or name != "float16"]


def _seconds(work: Callable[[], Any], device: torch.device, budget: float) -> float:
    """Return the median time of `work`, repeated for `budget` seconds, at least once, after a warm-up."""
    work()
    taken: list[float] = []
    while not taken or sum(taken) < budget:
        start = _now(device)
        work()
        taken.append(_now(device) - start)
    return statistics.median(taken)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
