"""Images by NVIDIA DALI: encoded bytes and augmentation numbers go into its graph, normalised tensors come out.

DALI does not exist for every system: this module is imported only where it makes the images.
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
    """See `Maker`. Images are decoded on the GPU where `making.device` is one, else by `making.threads` CPU threads."""

    def __init__(self, inputs: Iterator[EncodedBatch], making: LoaderOptions) -> None:
        first = next(inputs)
        self._inputs, self._making = chain([first], inputs), making
        self._copied: tuple[Any, torch.cuda.Event] | None = None
        self._probe: _Probe | None = None
        self._graph: Any = _graph(
            self._source,
            {name: (_DALI_TYPES[array.dtype.name], array.ndim - 1) for name, array in first.arrays.items()},
            decoder=self._decoder,
            image_size=making.image_size,
            crop=making.fit == "crop",
            layout="HWC" if making.channels_last else "CHW",
            **self._resources(making.batch, making.ahead),
        )

    def next(self) -> torch.Tensor:
        """The next step's images."""
        (images,) = self._graph.run()
        # DALI's buffer is a batch's own for as long as someone refers to it, so on the CPU nothing is copied.
        tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        if self._making.device.type == "cuda":
            # A GPU may get to the copy long after the host has moved on: the buffer is held until it has.
            if self._copied:
                self._copied[1].synchronize()
            tensor, source = tensor.clone(), tensor
            event = torch.cuda.Event()
            event.record()
            self._copied = (source, event)
        return tensor.permute(0, 3, 1, 2) if self._making.channels_last else tensor

    def decodes(self, encoded: bytes) -> bool:
        """Whether an image can be decoded."""
        if self._probe is None:
            self._graph = None  # whose memory may be needed
            self._probe = _Probe(self._decoder, self._resources(1, 1))
        return self._probe.decodes(encoded)

    @staticmethod
    def decodes_identically(encoded: bytes) -> bool:
        """True of the common kinds: 8-bit JPEG of YCbCr or grey, PNG of up to 8 bits, WebP without metadata.

        Of the others DALI rounds 16 bits otherwise, does not read text PNM, 1-bit TIFF and WebP's EXIF, turns by other
        rules where EXIF is broken, and its GPU decoders may treat each CMYK, TIFF and JPEG 2000 in their own way. An
        image whose header it cannot read ends the process in a large batch, so it gets none that is unusual.
        """
        if encoded.startswith(b"\xff\xd8"):
            frame = read_jpeg_header(encoded)
            usual = frame.regular and frame.marker in (0xC0, 0xC1, 0xC2) and frame.components in (1, 3)
            return usual and frame.adobe in (None, 1) and encoded.count(b"Exif\0\0") < 2
        if encoded.startswith(b"\x89PNG"):
            return encoded[24] <= 8 and b"eXIf" not in encoded and png_is_intact(encoded)
        return encoded[8:16] in (b"WEBPVP8 ", b"WEBPVP8L")

    def close(self) -> None:
        """Free the graph."""
        if self._copied:
            self._copied[1].synchronize()
        self._graph = self._copied = self._probe = None

    @property
    def _decoder(self) -> str:
        return "mixed" if self._making.device.type == "cuda" else "cpu"

    def _resources(self, batch: int, depth: int) -> dict[str, Any]:
        device = self._making.device
        on_gpu = device.type == "cuda"
        current = torch.cuda.current_device() if on_gpu and device.index is None else device.index
        return {
            "batch_size": batch,
            "num_threads": self._making.threads,
            "device_id": current if on_gpu else None,
            "prefetch_queue_depth": depth,
        }

    def _source(self) -> list[Any]:
        inputs = next(self._inputs)
        return [[np.frombuffer(each, np.uint8) for each in inputs.encoded], *inputs.arrays.values()]


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
    """The graph. `inputs` are the arrays that come with the encoded images, name: (type, number of axes).

    DALI rewrites this function, so that an `if` on what is in the graph decides for each image by itself.
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
    # JPEG's colours are then scaled up as libjpeg does it, which the GPU's decoder does not do by itself.
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)


@do_not_convert
def _square(images: Any) -> Any:
    """The largest square in the middle, as `recognition.images.fit` cuts it."""
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
    return _decoded(encoded, decoder)
