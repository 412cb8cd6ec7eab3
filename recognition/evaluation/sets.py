"""All verification sets of a run: read, named apart, and looked through before the first step."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from recognition import progress
from recognition.config import UserError
from recognition.evaluation import folds
from recognition.evaluation.pairs import Folds, Missing, PairSet, read_pairs
from recognition.evaluation.verification import refuse_without_meaning
from recognition.images import FORMATS, MAX_PIXELS
from recognition.terminal import escape

_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""The last bytes of a whole image."""


def open_sets(
    paths: Sequence[Path],
    image_size: int,
    *,
    images: Path | None = None,
    missing: Missing = "refuse",
    folds: Folds = "file",
    fit: str = "resize",
) -> list[PairSet]:
    """Read the verification sets at `paths`, each with a name of its own, for images of `image_size` pixels a side.

    Raises UserError where a set cannot be read, cannot be judged or is given twice, and where images of it cannot be
    decoded, unless `missing` is "skip", which leaves their pairs out.
    """
    names = names_apart(paths)
    sets = []
    with progress.working("reading verification sets", len(paths), "sets") as advance:
        for done, (path, name) in enumerate(zip(paths, names, strict=True)):
            advance(done)
            pairs = replace(read_pairs(path, images, missing=missing, folds=folds), label=name)
            sets.append(check_pairs(pairs, image_size, missing=missing, fit=fit))
    return sets


def names_apart(paths: Sequence[Path]) -> list[str]:
    """A name for each set: its file's stem, with the suffix or folders above where others have that too.

    Raises UserError for a file that is given twice.
    """
    whole = [path.resolve() for path in paths]
    twice = next((path for path, count in Counter(whole).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{escape(str(twice))} is given twice as a verification set: name it once")
    choices = [[choice for depth in range(1, len(path.parts)) for choice in _names(path, depth)] for path in whole]
    counts = Counter(choice for of_path in choices for choice in set(of_path))
    return [next(choice for choice in of_path if counts[choice] == 1) for of_path in choices]


def _names(path: Path, depth: int) -> tuple[str, str]:
    folders = "".join(f"{escape(part)}/" for part in path.parts[-depth:-1])
    return f"{folders}{escape(path.stem)}", f"{folders}{escape(path.name)}"


def check_pairs(pairs: PairSet, image_size: int, *, missing: Missing = "refuse", fit: str = "resize") -> PairSet:
    """Look through a set: it tells a user before hours of training what `embed_pairs` and `verify` would say then.

    Of each image the header is read; one whose end is not that of its kind is decoded. Returns the set without the
    pairs that `missing` leaves out, with what there is to say of it. Raises UserError as `open_sets` does.
    """
    faults: dict[int, str] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    with progress.working(f"checking {pairs.name}", len(pairs.images)) as advance:
        for image in range(len(pairs.images)):
            if image % 100 == 0:
                advance(image)
            size, fault = _size(pairs, image)
            if fault is not None:
                faults[image] = fault
            else:
                sizes[size] += 1
    before, pairs = len(pairs), pairs.without(faults, missing)
    try:
        refuse_without_meaning(pairs.same)
    except UserError as error:
        left = f" ({before - len(pairs)} were left out)" if len(pairs) < before else ""
        raise UserError(f"{escape(str(pairs.path))}: {error}{left}") from None
    others = {size: count for size, count in sizes.items() if size != (image_size, image_size)}
    found = folds.doubts(pairs.same)
    if others:
        listed = ", ".join(
            f"{count:,} of {width} x {height}" for (width, height), count in Counter(others).most_common(3)
        )
        many = f"{sum(others.values()):,} images are not {image_size} x {image_size} pixels ({listed})"
        if fit == "exact":
            raise UserError(
                f"{escape(str(pairs.path))}: {many}: align the faces to that size in the way of the training images, "
                "or set data.fit to resize or crop (--fit for tools/evaluate.py)"
            )
        found.append(f"{many}: {'scaled' if fit == 'resize' else 'their middle is scaled'} to that, as data.fit says")
    return replace(pairs, doubts=[*pairs.doubts, *found])


def _size(pairs: PairSet, image: int) -> tuple[tuple[int, int], str | None]:
    """Width and height of an image, and why it cannot be decoded if that is so."""
    encoded = pairs.images[image]
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as opened:
            size, kind = opened.size, opened.format or ""
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        return (0, 0), _reason(encoded, error)
    if size[0] * size[1] > MAX_PIXELS:
        return size, f"it has more than {MAX_PIXELS:,} pixels"
    if encoded.rstrip(b"\0").endswith(_ENDS.get(kind, b"\0")):
        return size, None
    try:
        pixels = pairs.decode(image)
    except UserError as error:
        return size, str(error).removeprefix(pairs.describe(image)).lstrip(": ")
    return (pixels.shape[1], pixels.shape[0]), None


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "there is no image"
    if isinstance(error, UnidentifiedImageError):  # its message is the address of a buffer
        return f"{len(encoded):,} bytes that are no image of a kind that is decoded"
    return str(error)
