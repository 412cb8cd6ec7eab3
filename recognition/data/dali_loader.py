"""Loader by NVIDIA DALI: encoded bytes and augmentation parameters go into its graph, normalised tensors come out.

DALI does not exist for every system, so this module is imported only where `data.loader` is "dali".
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import do_not_convert

from recognition.data.augment import MEAN_GRAY
from recognition.data.loader import EncodedBatch, LoaderOptions
from recognition.images import png_is_intact, read_jpeg_header


class DaliLoader:
    """Loader (see `loader.Loader`) that decodes on the GPU where `options.device` is one, else in CPU threads."""

    def __init__(self, batches: Iterator[EncodedBatch], options: LoaderOptions) -> None:
        first = next(batches)
        self._batches, self._options = chain([first], batches), options
        self._copied: tuple[Any, torch.cuda.Event] | None = None
        self._probe: _Probe | None = None
        self._graph: Any = _graph(
            self._source,
            {name: (_DALI_TYPES[array.dtype.name], array.ndim - 1) for name, array in first.arrays.items()},
            decoder=self._decoder,
            image_size=options.image_size,
            crop=options.fit == "crop",
            layout="HWC" if options.channels_last else "CHW",
            **self._resources(options.batch, options.prefetch),
        )

    def next_images(self) -> torch.Tensor:
        """Return the images of the next step [b, 3, H, W]."""
        (images,) = self._graph.run()
        # DALI does not reuse a buffer that something refers to, so on the CPU nothing is copied.
        tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        if self._options.device.type == "cuda":
            # The GPU may copy long after the host has moved on: the buffer is held until it has.
            if self._copied:
                self._copied[1].synchronize()
            tensor, source = tensor.clone(), tensor
            event = torch.cuda.Event()
            event.record()
            self._copied = (source, event)
        return tensor.permute(0, 3, 1, 2) if self._options.channels_last else tensor

    def can_decode(self, encoded: bytes) -> bool:
        """Tell whether DALI decodes an image, with a graph of its own."""
        if self._probe is None:
            self._graph = None  # its memory may be needed
            self._probe = _Probe(self._decoder, self._resources(1, 1))
        return self._probe.can_decode(encoded)

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """Return true for common kinds: 8-bit JPEG of YCbCr or grey, PNG of up to 8 bits, WebP without metadata.

        DALI rounds 16-bit levels differently, does not read text PNM, 1-bit TIFF and the EXIF of WebP, and turns images
        with broken EXIF by other rules; its GPU decoders may differ on CMYK, TIFF and JPEG 2000. In a large batch an
        image whose header it cannot read ends the process, so it gets no unusual ones.
        """
        if encoded.startswith(b"\xff\xd8"):
            frame = read_jpeg_header(encoded)
            usual = frame.regular and frame.marker in (0xC0, 0xC1, 0xC2) and frame.components in (1, 3)
            return usual and frame.adobe in (None, 1) and encoded.count(b"Exif\0\0") < 2
        if encoded.startswith(b"\x89PNG"):
            return encoded[24] <= 8 and b"eXIf" not in encoded and png_is_intact(encoded)
        return encoded[8:16] in (b"WEBPVP8 ", b"WEBPVP8L")

    def close(self) -> None:
        """Free the graph and its memory."""
        if self._copied:
            self._copied[1].synchronize()
        self._graph = self._copied = self._probe = None

    @property
    def _decoder(self) -> str:
        return "mixed" if self._options.device.type == "cuda" else "cpu"

    def _resources(self, batch: int, depth: int) -> dict[str, Any]:
        device = self._options.device
        on_gpu = device.type == "cuda"
        current = torch.cuda.current_device() if on_gpu and device.index is None else device.index
        return {
            "batch_size": batch,
            "num_threads": self._options.threads,
            "device_id": current if on_gpu else None,
            "prefetch_queue_depth": depth,
        }

    def _source(self) -> list[Any]:
        batch = next(self._batches)
        return [[np.frombuffer(each, np.uint8) for each in batch.encoded], *batch.arrays.values()]


_DALI_TYPES = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}


@pipeline_def(enable_conditionals=True)
def _graph(
    source: Any,
    inputs: dict[str, tuple[Any, int]],
    decoder: str,
    image_size: int,
    crop: bool,
    layout: str,
) -> Any:
    """Build the graph. `inputs` describe the arrays that come with the encoded images, as name: (type, number of axes).

    DALI rewrites this function: an `if` on a value within the graph decides for each image separately.
    """
    encoded, parameters = _sources(source, inputs)
    images = _decoded(encoded, decoder)
    if parameters["resize"]:
        if crop:
            images = _square(images)
        images = fn.resize(images, size=[image_size, image_size])
    if "matrix" in parameters:
        images = fn.warp_affine(images, matrix=parameters["matrix"])  # beyond the border, the border's pixels go on
    if "color" in parameters:
        images = fn.coord_transform(images, MT=parameters["color"], dtype=types.UINT8)
    if "erase_shape" in parameters:
        images = fn.erase(
            images,
            anchor=parameters["erase_anchor"],
            shape=parameters["erase_shape"],
            axis_names="HW",
            fill_value=MEAN_GRAY,
        )
    return fn.crop_mirror_normalize(
        images,
        mirror=parameters.get("flip", 0),
        mean=[127.5] * 3,
        std=[127.5] * 3,
        dtype=types.FLOAT,
        output_layout=layout,
    )


@do_not_convert
def _decoded(encoded: Any, decoder: str) -> Any:
    # The GPU's decoder then scales JPEG's chroma up as libjpeg does.
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)


@do_not_convert
def _square(images: Any) -> Any:
    """Crop the largest square in the middle, as `recognition.images.fit` does."""
    shape = images.shape()
    side = fn.cast(math.min(shape[0], shape[1]), dtype=types.FLOAT)
    return fn.crop(images, crop_h=side, crop_w=side, rounding="truncate")


@do_not_convert
def _sources(source: Any, inputs: dict[str, tuple[Any, int]]) -> tuple[Any, dict[str, Any]]:
    encoded, *arrays = fn.external_source(
        source=source,
        num_outputs=1 + len(inputs),
        dtype=[types.UINT8, *(dtype for dtype, _ in inputs.values())],
        ndim=[1, *(axes for _, axes in inputs.values())],
    )
    return encoded, dict(zip(inputs, arrays, strict=True))


class _Probe:
    """Graph that decodes one image at a time, to find those that do not decode."""

    def __init__(self, decoder: str, resources: dict[str, Any]) -> None:
        self._decoder, self._resources = decoder, resources
        self._encoded = b""
        self._graph: Any = None

    def can_decode(self, encoded: bytes) -> bool:
        self._encoded = encoded
        if self._graph is None:
            self._graph = _decoding_graph(self._source, self._decoder, **self._resources)
        try:
            self._graph.run()
        except RuntimeError:
            self._graph = None  # a graph that failed once does not run again
            return False
        return True

    def _source(self) -> list[NDArray[np.uint8]]:
        return [np.frombuffer(self._encoded, np.uint8)]


@pipeline_def
def _decoding_graph(source: Any, decoder: str) -> Any:
    encoded = fn.external_source(source=source, dtype=types.UINT8, ndim=1)
    return _decoded(encoded, decoder)
