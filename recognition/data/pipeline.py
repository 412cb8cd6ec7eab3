"""Batches by number: encoded bytes and augmentation numbers go into a DALI graph, normalised tensors come out.

The content of a step's batch is a function of the data, the seed, the step and the global batch. What is prepared
ahead, and on how many ranks, changes nothing, so a run resumes by starting at its step.
"""

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert
from PIL import Image

from recognition import config
from recognition.config import UserError
from recognition.data.augment import MEAN_GRAY, draw
from recognition.data.groups import order
from recognition.data.index import Index
from recognition.data.order import Integers, batch_positions
from recognition.data.quarantine import BadImage, Quarantine, check_header


@dataclass
class Batch:
    """One rank's images of a step."""

    images: torch.Tensor
    """[b, 3, H, W] float32, RGB, (x - 127.5) / 127.5, on the pipeline's device."""
    labels: torch.Tensor
    """[b] int64, on the pipeline's device."""
    samples: torch.Tensor
    """[b] int64, on the CPU: which images of the index these are."""


@dataclass(frozen=True)
class _Inputs:
    """What the graph needs for one step: `arrays` go in by name, in the order of the graph's inputs."""

    samples: Integers
    encoded: list[bytes]
    arrays: dict[str, NDArray[Any]]


class Pipeline:
    """An endless iterator over this rank's batches of steps start_step, start_step + 1, ...

    `batch` is the global batch (of one forward pass), split over the `world` ranks as evenly as possible. Images of
    another size are resized to `image_size` pixels a side. An image that cannot be decoded is listed in the file
    `quarantine` and replaced by the next one of the index that can, with its own label: of `config.images_per_identity`
    images that stand together it may then be another identity's. Threads read ahead, and `config.prefetch` batches are
    decoded ahead: on the GPU where `device` is one, else by `config.threads` CPU threads.

    Raises UserError when a rank has no image, and from `__next__` when too many images are bad or data cannot be read.
    """

    def __init__(
        self,
        index: Index,
        config: config.Data,
        *,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        device: torch.device,
        image_size: int,
        channels_last: bool,
        start_step: int = 0,
        quarantine: Path | None = None,
    ) -> None:
        if batch < world:
            raise UserError(f"a batch of {batch} leaves some of {world} ranks without an image: enlarge it")
        self.step = start_step
        self._index, self._config, self._seed, self._image_size = index, config, seed, image_size
        self._batch, self._rank, self._world = batch, rank, world
        self._device, self._channels_last = device, channels_last
        self._order = order(index.labels, config.images_per_identity, seed)
        self._quarantine = Quarantine(index, quarantine)
        self._readers = ThreadPoolExecutor(config.prefetch, thread_name_prefix="read")
        self._reading: deque[Future[_Inputs]] = deque()
        self._decoding: deque[_Inputs] = deque()
        self._graph: Any = None
        self._copied: tuple[Any, torch.cuda.Event] | None = None
        self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The batch of the next step."""
        while True:
            try:
                (images,) = self._graph.run()
                break
            except RuntimeError as error:
                self._recover(error)
        inputs = self._decoding.popleft()
        self.step += 1
        labels = torch.from_numpy(self._index.labels[inputs.samples])
        if self._device.type == "cuda":
            labels = labels.pin_memory().to(self._device, non_blocking=True)
        return Batch(self._to_torch(images), labels, torch.from_numpy(inputs.samples))

    def close(self) -> None:
        """Stop reading and decoding ahead and free what that needs. Batches handed out stay valid."""
        self._readers.shutdown(cancel_futures=True)
        self._reading.clear()
        self._decoding.clear()
        if self._copied:
            self._copied[1].synchronize()
        self._graph = self._copied = None

    def _start(self) -> None:
        """Begin to read ahead at `self.step`, with a graph for it."""
        self._ahead = self.step
        self._reading.clear()
        self._decoding.clear()
        for _ in range(self._config.prefetch):
            self._read_another()
        arrays = self._reading[0].result().arrays
        self._graph = _graph(
            self._feed,
            {name: (_DALI_TYPES[array.dtype.name], array.ndim - 1) for name, array in arrays.items()},
            decoder=self._decoder,
            image_size=self._image_size,
            layout="HWC" if self._channels_last else "CHW",
            **self._resources(len(self._positions(self.step)), self._config.prefetch),
        )

    @property
    def _decoder(self) -> str:
        return "mixed" if self._device.type == "cuda" else "cpu"

    def _resources(self, batch: int, depth: int) -> dict[str, Any]:
        on_gpu = self._device.type == "cuda"
        current = torch.cuda.current_device() if on_gpu and self._device.index is None else self._device.index
        return {
            "batch_size": batch,
            "num_threads": self._config.threads,
            "device_id": current if on_gpu else None,
            "prefetch_queue_depth": depth,
        }

    def _positions(self, step: int) -> range:
        return batch_positions(step, self._batch, self._rank, self._world)

    def _read_another(self) -> None:
        self._reading.append(self._readers.submit(self._prepare, self._ahead))
        self._ahead += 1

    def _prepare(self, step: int) -> _Inputs:
        """Runs in a reader's thread."""
        positions = np.arange(self._positions(step).start, self._positions(step).stop)
        occasions, ordered = self._order(positions)
        samples = self._quarantine.replace(ordered)
        encoded, resize = [b""] * len(samples), np.zeros(len(samples), np.bool_)
        for i in range(len(samples)):
            while True:
                encoded[i] = self._index.read(int(samples[i]))
                try:
                    resize[i] = check_header(encoded[i]) != (self._image_size, self._image_size)
                    break
                except BadImage as error:
                    self._quarantine.add(int(samples[i]), str(error))
                    samples[i] = self._quarantine.replace(samples[i : i + 1])[0]
        numbers = draw(self._config.augment, self._seed, occasions, samples, self._image_size)
        return _Inputs(samples, encoded, {"resize": resize} | numbers.arrays())

    def _feed(self) -> list[Any]:
        """The graph's source: called once per step that is to be decoded ahead."""
        inputs = self._reading.popleft().result()
        self._read_another()
        self._decoding.append(inputs)
        return [[np.frombuffer(each, np.uint8) for each in inputs.encoded], *inputs.arrays.values()]

    def _recover(self, error: RuntimeError) -> None:
        """After a failure of the graph: list the images at fault and begin again at the step that was to come."""
        self._graph = None
        probe = _Probe(self._decoder, self._resources(1, 1))
        if not probe.decodes(_good_image()):
            raise error  # it is not the images
        found = False
        for inputs in self._decoding:
            for sample, encoded in zip(inputs.samples.tolist(), inputs.encoded, strict=True):
                if not probe.decodes(encoded):
                    self._quarantine.add(sample, "it does not decode")
                    found = True
        if not found:
            raise error
        for future in self._reading:
            future.cancel()
        self._start()

    def _to_torch(self, images: Any) -> torch.Tensor:
        # DALI's buffer is a batch's own for as long as someone refers to it, so on the CPU nothing is copied.
        tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        if self._device.type == "cuda":
            # A GPU may get to the copy long after the host has moved on: the buffer is held until it has.
            if self._copied:
                self._copied[1].synchronize()
            tensor, source = tensor.clone(), tensor
            event = torch.cuda.Event()
            event.record()
            self._copied = (source, event)
        return tensor.permute(0, 3, 1, 2) if self._channels_last else tensor


_DALI_TYPES = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}


@pipeline_def(enable_conditionals=True)
def _graph(
    feed: Any,
    inputs: dict[str, tuple[Any, int]],
    decoder: str,
    image_size: int,
    layout: str,
) -> Any:
    """The graph. `inputs` are the arrays that come with the encoded images, name: (type, number of axes).

    DALI rewrites this function, so that an `if` on what is in the graph decides for each image by itself.
    """
    encoded, numbers = _sources(feed, inputs)
    images = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
    if numbers["resize"]:
        images = fn.resize(images, size=[image_size, image_size])
    if "matrix" in numbers:
        images = fn.warp_affine(images, matrix=numbers["matrix"])  # beyond the border, the border's pixels go on
    if "color" in numbers:
        images = fn.coord_transform(images, MT=numbers["color"], dtype=types.UINT8)
    if "erase_shape" in numbers:
        images = fn.erase(
            images, anchor=numbers["erase_anchor"], shape=numbers["erase_shape"], axis_names="HW", fill_value=MEAN_GRAY
        )
    return fn.crop_mirror_normalize(
        images,
        mirror=numbers.get("flip", 0),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        dtype=types.FLOAT,
        output_layout=layout,
    )


@do_not_convert
def _sources(feed: Any, inputs: dict[str, tuple[Any, int]]) -> tuple[Any, dict[str, Any]]:
    encoded, *arrays = fn.external_source(
        source=feed,
        num_outputs=1 + len(inputs),
        dtype=[types.UINT8, *(dtype for dtype, _ in inputs.values())],
        ndim=[1, *(axes for _, axes in inputs.values())],
    )
    return encoded, dict(zip(inputs, arrays, strict=True))


class _Probe:
    """Decodes images one at a time to tell whether they can be."""

    def __init__(self, decoder: str, resources: dict[str, Any]) -> None:
        self._decoder, self._resources = decoder, resources
        self._encoded = b""
        self._graph: Any = None

    def decodes(self, encoded: bytes) -> bool:
        self._encoded = encoded
        if self._graph is None:
            self._graph = _decoding_graph(self._source, self._decoder, **self._resources)
        try:
            self._graph.run()
        except RuntimeError:
            self._graph = None  # a graph that failed once is of no more use
            return False
        return True

    def _source(self) -> list[NDArray[np.uint8]]:
        return [np.frombuffer(self._encoded, np.uint8)]


@pipeline_def
def _decoding_graph(source: Any, decoder: str) -> Any:
    encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB)


def _good_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()
