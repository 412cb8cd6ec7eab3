"""Writing of procedural faces: a labelled training set and a verification set, rendered in parallel.

An image is a function of (seed, identity, image) alone, whatever the order and the process that draws it. On one
machine its bytes are always the same; another release of NumPy or Pillow may round a pixel differently.
"""

import functools
import json
import logging
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from recognition.data.insightface_rec import InsightFaceWriter
from recognition.data.procedural.identity import Identity, capture_parameters, identity_parameters
from recognition.data.procedural.renderer import SIZE, compress, draw, expose
from recognition.errors import UserError
from recognition.files.atomic import replacing
from recognition.hardware import cores
from recognition.tracking.progress import task

__all__ = ["Identity", "contact_sheet", "encode", "identity_parameters", "render", "verification_pairs", "write_faces"]

FIRST_TEST_IDENTITY = 1_000_000_000
"""Number of the verification set's first identity, above those of any training set."""

FOLDS = 10
"""Number of folds of the verification protocol; an identity belongs to one fold, as in LFW."""

VERSION = 1
"""Version of the drawing; it is raised when faces change, so that finished folders are rendered anew."""

_RECORD = "faces.json"
_PAIRS = "pairs.bin"
_FILES = ("train.rec", "train.idx", "property", _PAIRS)
_CHUNK = 40
_PAIR_STREAM = 3

_log = logging.getLogger(__name__)


def render(seed: int, identity: int, image: int) -> np.ndarray:
    """Render image number `image` of an identity, uint8 [112, 112, 3] RGB, before JPEG."""
    capture = capture_parameters(seed, identity, image)
    return expose(draw(identity_parameters(seed, identity), capture), capture)


def encode(seed: int, identity: int, image: int, size: int = SIZE) -> bytes:
    """Render an image as a JPEG file of `size` pixels a side, with a quality that varies with the image."""
    pixels = render(seed, identity, image)
    if size != SIZE:
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.LANCZOS))
    return compress(pixels, capture_parameters(seed, identity, image))


def verification_pairs(seed: int, pairs: int, identities: int) -> tuple[list[tuple[int, int]], list[bool]]:
    """Choose the images of a verification set as (identity, image), two per pair, and tell which pairs are genuine.

    Genuine and impostor pairs alternate, no image occurs twice, and each of the ten folds has its own identities.
    Raises UserError unless `pairs` is a multiple of 20 and there are two identities or more per fold.
    """
    if pairs < 2 * FOLDS or pairs % (2 * FOLDS):
        raise UserError(f"pairs is {pairs}: give a multiple of {2 * FOLDS}, for {FOLDS} folds that are half genuine")
    if identities < 2 * FOLDS:
        raise UserError(f"the verification set has {identities} identities: give {2 * FOLDS} or more, two a fold")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _PAIR_STREAM))))
    seen = dict.fromkeys(range(identities), 0)

    def fresh(identity: int) -> tuple[int, int]:
        seen[identity] += 1
        return FIRST_TEST_IDENTITY + identity, seen[identity] - 1

    images: list[tuple[int, int]] = []
    same = [pair % 2 == 0 for pair in range(pairs)]
    for pair, genuine in enumerate(same):
        fold = pair * FOLDS // pairs
        first, end = fold * identities // FOLDS, (fold + 1) * identities // FOLDS
        if genuine:
            one = other = first + pair // 2 % (end - first)
        else:
            one, other = (first + int(place) for place in generator.permutation(end - first)[:2])
        images += [fresh(one), fresh(other)]
    return images, same


def write_faces(
    folder: Path,
    *,
    identities: int,
    images_per_identity: int,
    pairs: int = 1200,
    seed: int = 0,
    image_size: int = SIZE,
    pair_identities: int = 200,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Render a training set `train.rec` with its .idx, and `pairs.bin`, a verification set of other identities.

    The training set has `identities` times `images_per_identity` images in InsightFace's layout; the `pairs` pairs
    are drawn from
    `pair_identities` identities that do not depend on the training set. Images have `image_size` pixels a side.
    `workers` processes render, by default one per core. A folder that holds exactly these faces is left as it is; an
    unfinished or different rendering is replaced. Raises UserError for numbers that make no set, and for a folder with
    files that were not rendered here.
    """
    if not (0 < identities <= FIRST_TEST_IDENTITY and images_per_identity > 0 and seed >= 0 and image_size > 0):
        size = f"{image_size} x {image_size} pixels"
        raise UserError(
            f"cannot render {identities} identities x {images_per_identity} images of {size} with seed {seed}"
        )
    tested, same = verification_pairs(seed, pairs, pair_identities)
    parameters = {
        "version": VERSION,
        "seed": seed,
        "identities": identities,
        "images": images_per_identity,
        "pairs": pairs,
        "pair_identities": pair_identities,
        "image_size": image_size,
    }
    if _is_finished(folder, parameters):
        _log.info("%s holds these faces already", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    # A record without sizes marks the folder as ours, and unfinished.
    _write(folder / _RECORD, json.dumps(parameters | {"sizes": {}}, indent=2).encode() + b"\n")
    # A task is a part of an identity's images, which may be many; the writer needs identities in order.
    parts = [range(start, min(start + _CHUNK, images_per_identity)) for start in range(0, images_per_identity, _CHUNK)]
    trained = ([(identity, image) for image in part] for identity in range(identities) for part in parts)
    verified = [tested[start : start + _CHUNK] for start in range(0, len(tested), _CHUNK)]
    encode_all = functools.partial(_encode_all, seed, image_size)
    with (
        _pool(workers) as pool,
        _counter("rendering faces", identities * images_per_identity + len(tested), progress) as advance,
    ):
        with InsightFaceWriter(folder) as writer:
            for names, encoded in _rendered(pool, encode_all, trained):
                for (identity, _), image in zip(names, encoded, strict=True):
                    writer.add(identity, image)
                advance(len(names))
        files: list[bytes] = []
        for names, encoded in _rendered(pool, encode_all, verified):
            files += encoded
            advance(len(names))
    _write(folder / _PAIRS, pickle.dumps((files, same), protocol=4))
    sizes = {name: (folder / name).stat().st_size for name in _FILES}
    _write(folder / _RECORD, json.dumps(parameters | {"sizes": sizes}, indent=2).encode() + b"\n")


def contact_sheet(seed: int, identities: Sequence[int], images: int) -> Image.Image:
    """Draw a picture of faces with a row per identity and `images` columns."""
    rows = [np.concatenate([render(seed, identity, image) for image in range(images)], 1) for identity in identities]
    return Image.fromarray(np.concatenate(rows, 0))


def _is_finished(folder: Path, parameters: dict[str, int]) -> bool:
    """Tell whether the folder holds exactly these faces. Raises UserError if it holds other data."""
    record = folder / _RECORD
    if not record.exists():
        foreign = [name for name in _FILES if (folder / name).exists()]
        if foreign:
            raise UserError(f"{folder} holds a {foreign[0]} that was not rendered here: choose another folder")
        return False
    try:
        found: Any = json.loads(record.read_bytes())
        sizes = found.pop("sizes")
        return bool(
            found == parameters
            and set(sizes) == set(_FILES)
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _encode_all(seed: int, size: int, names: list[tuple[int, int]]) -> list[bytes]:
    return [encode(seed, identity, image, size) for identity, image in names]


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _pool(workers: int | None) -> Iterator[ProcessPoolExecutor | None]:
    """Start processes to render in, or none if there is one core.

    They are spawned, not forked, as the caller may have threads and use a GPU.
    """
    workers = workers or cores()
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _rendered(
    pool: ProcessPoolExecutor | None,
    encode_all: Callable[[list[tuple[int, int]]], list[bytes]],
    tasks: Iterable[list[tuple[int, int]]],
) -> Iterator[tuple[list[tuple[int, int]], list[bytes]]]:
    """Yield the tasks with their JPEG files by `encode_all`, in order; up to 64 tasks are rendered ahead."""
    if pool is None:
        for names in tasks:
            yield names, encode_all(names)
        return
    waiting: deque[tuple[list[tuple[int, int]], Future[list[bytes]]]] = deque()
    for names in tasks:
        waiting.append((names, pool.submit(encode_all, names)))
        if len(waiting) > 64:
            names, future = waiting.popleft()
            yield names, future.result()
    for names, future in waiting:
        yield names, future.result()


@contextmanager
def _counter(what: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Provide a function that counts images, and shows progress if `show`."""
    if not show:
        yield lambda images: None
        return
    done = 0
    with task(what, total) as advance:

        def count(images: int) -> None:
            nonlocal done
            done += images
            advance(done)

        yield count
