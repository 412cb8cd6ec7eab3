"""Batches by step number: select the samples, read their bytes ahead, and have a loader decode and augment them.

The content of a step's global batch is a function of the data, the seed, the step and the batch size. Neither the
number of ranks nor the number of batches read ahead changes it, so a run resumes by starting at its step.
"""

import io
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recognition import config, hardware
from recognition.data.augment import draw_parameters
from recognition.data.groups import sample_order
from recognition.data.image_sizes import SizeCounter
from recognition.data.index import Index, LostFile
from recognition.data.loader import EncodedBatch, Loader, LoaderOptions
from recognition.data.order import batch_positions
from recognition.data.quarantine import BadImage, Quarantine, check_header
from recognition.errors import UserError
from recognition.images import Undecodable, decode, fit

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One rank's images of a step."""

    images: torch.Tensor
    """[b, 3, H, W] float32, RGB, (x - 127.5) / 127.5, on the pipeline's device."""
    labels: torch.Tensor
    """[b] int64, on the pipeline's device."""
    samples: torch.Tensor
    """[b] int64, on the CPU: numbers of the images in the index."""


class Pipeline:
    """Endless iterator over this rank's batches of steps start_step, start_step + 1, ...

    `batch` is the global batch of one forward pass, split over the `world` ranks as evenly as possible. Images of
    another size than `image_size` pixels a side are treated as `config.fit` says, and rank 0 logs how many of its
    images had one. An image that cannot be read or decoded is recorded in the file `quarantine` and replaced by the
    next usable one of the index, with that one's label; so a group of `config.images_per_identity` images may then
    contain another identity. Threads read ahead, and the loader makes the images of `config.prefetch` batches ahead.

    Raises UserError if a rank has no image or DALI is requested but not installed, and in `__next__` if too many images
    are unusable, or an image has another size and `config.fit` is "exact".
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
        self._index, self._config, self._seed = index, config, seed
        self._batch, self._rank, self._world = batch, rank, world
        self._loader_type = _loader_type(hardware.loader(config.loader))
        self._options = LoaderOptions(
            batch=len(self._positions(start_step)),
            image_size=image_size,
            fit=config.fit,
            channels_last=channels_last,
            device=device,
            threads=config.threads,
            prefetch=config.prefetch,
        )
        self._order = sample_order(index.labels, config.images_per_identity, seed)
        self._quarantine = Quarantine(index, quarantine, resumed=start_step > 0)
        self._sizes = SizeCounter(image_size, config.fit) if rank == 0 else None
        self._epoch_ends = start_step + -(-index.num_images // batch)
        self._decoded_here: set[int] = set()
        self._readers = ThreadPoolExecutor(config.prefetch, thread_name_prefix="read")
        self._reading: deque[Future[EncodedBatch]] = deque()
        self._handed_over: deque[EncodedBatch] = deque()
        self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the batch of the next step."""
        while True:
            try:
                images = self._loader.next_images()
                break
            except RuntimeError as error:
                self._recover(error)
        samples = self._handed_over.popleft().samples
        self.step += 1
        if self.step == self._epoch_ends:
            self._report_sizes()
        labels = torch.from_numpy(self._index.labels[samples])
        if images.device.type == "cuda":
            labels = labels.pin_memory()
        return Batch(images, labels.to(images.device, non_blocking=labels.is_pinned()), torch.from_numpy(samples))

    def close(self) -> None:
        """Stop reading and decoding ahead, and free memory and threads. Batches that were returned stay valid."""
        self._readers.shutdown(cancel_futures=True)
        self._report_sizes()
        self._reading.clear()
        self._handed_over.clear()
        self._loader.close()

    def _start(self) -> None:
        """Start to read ahead at `self.step`, with a new loader."""
        self._ahead = self.step
        self._reading.clear()
        self._handed_over.clear()
        for _ in range(self._config.prefetch):
            self._read_another()
        self._loader = self._loader_type(iter(self._hand_over, None), self._options)

    def _positions(self, step: int) -> range:
        return batch_positions(step, self._batch, self._rank, self._world)

    def _read_another(self) -> None:
        self._reading.append(self._readers.submit(self._prepare, self._ahead))
        self._ahead += 1

    def _prepare(self, step: int) -> EncodedBatch:
        """Select and read this rank's samples of a step, and draw their augmentation, in a reader's thread."""
        positions = np.arange(self._positions(step).start, self._positions(step).stop)  # positions: [b]
        occasions, ordered = self._order(positions)  # occasions, ordered: [b]
        samples, size = self._quarantine.replace(ordered), self._options.image_size
        encoded, resize = [b""] * len(samples), np.zeros(len(samples), np.bool_)
        for i in range(len(samples)):
            samples[i], encoded[i], resize[i] = self._read(int(samples[i]))
        parameters = draw_parameters(self._config.augment, self._seed, occasions, samples, size)
        return EncodedBatch(samples, encoded, {"resize": resize} | parameters.arrays())

    def _read(self, sample: int) -> tuple[int, bytes, bool]:
        """Read a sample, or the next usable one; return it, its image for the loader, and whether to resize that."""
        while True:
            try:
                encoded = self._index.read(sample)
                height, width = check_header(encoded)
                if (sizes := self._sizes) is not None:
                    sizes.add(height, width)
                return sample, *self._fit(sample, encoded, height, width)
            except BadImage as error:
                self._quarantine.add(sample, str(error))
            except LostFile as error:
                self._quarantine.add(sample, error.reason, lost=True)
            sample = int(self._quarantine.replace(np.array([sample]))[0])

    def _fit(self, sample: int, encoded: bytes, height: int, width: int) -> tuple[bytes, bool]:
        """Return an image for the loader, and whether that needs resizing; decode it here where the loader cannot.

        Raises BadImage if it does not decode, and UserError for another size where `data.fit` is "exact".
        """
        size, how = self._options.image_size, self._options.fit
        other_size = (height, width) != (size, size)
        if other_size and how == "exact":
            raise UserError(
                f"{self._index.describe(sample)} is {width} x {height} pixels, but data.fit is exact and "
                f"backbone.image_size is {size}: data.fit=resize or data.fit=crop lets it in"
            )
        if sample not in self._decoded_here and self._loader_type.decodes_identically(encoded):
            return encoded, other_size
        try:
            pixels = fit(decode(encoded), size, how)
        except Undecodable as error:
            raise BadImage(str(error)) from None
        return b"P6 %d %d 255\n" % (size, size) + pixels.tobytes(), False

    def _report_sizes(self) -> None:
        """Log once, after an epoch or at the end, which other sizes were read."""
        if self._sizes is not None and (report := self._sizes.report()):
            _log.warning("%s", report)
        self._sizes = None

    def _hand_over(self) -> EncodedBatch:
        """Hand the next step to the loader, which calls this once per step that it makes ahead."""
        inputs = self._reading.popleft().result()
        self._read_another()
        self._handed_over.append(inputs)
        return inputs

    def _recover(self, error: RuntimeError) -> None:
        """Start again at the current step after the loader has failed.

        The images at fault are quarantined, or decoded here from now on if that is possible. Raises `error` if no image
        is at fault.
        """
        if not self._loader.can_decode(_good_image()):
            raise error  # the images are not the cause
        found = False
        for inputs in self._handed_over:
            for sample, encoded in zip(inputs.samples.tolist(), inputs.encoded, strict=True):
                if not self._loader.can_decode(encoded):
                    found = True
                    try:
                        decode(encoded)
                        self._decoded_here.add(sample)
                    except Undecodable as reason:
                        self._quarantine.add(sample, str(reason))
        if not found:
            raise error
        self._loader.close()
        for future in self._reading:
            future.cancel()
        self._start()


def _loader_type(name: str) -> type[Loader]:
    """Return the loader called `name`; DALI is imported only where it is used."""
    if name == "dali":
        from recognition.data.dali_loader import DaliLoader

        return DaliLoader
    from recognition.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader


def _good_image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()
