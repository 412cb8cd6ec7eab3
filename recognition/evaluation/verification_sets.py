"""Reading of all verification sets of a run, with distinct names and a check of every image before the first step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from recognition import images
from recognition.errors import UserError
from recognition.evaluation import folds
from recognition.evaluation.pairs import Folds, Missing, PairSet, read_pairs
from recognition.evaluation.verification import require_both_kinds
from recognition.tracking import progress
from recognition.tracking.terminal import escape


def open_sets(
    paths: Sequence[Path],
    image_size: int,
    *,
    folder: Path | None = None,
    missing: Missing = "refuse",
    folds: Folds = "file",
    fit: str = "resize",
) -> list[PairSet]:
    """Read and check the verification sets at `paths`, with distinct names, for models of `image_size` pixels a side.

    `folder` is `images` of `read_pairs`; `missing` and `folds` are as there, `fit` is as `data.fit`.

    Raises UserError if a set cannot be read, has pairs of one kind only or is given twice, and if images do not decode,
    unless `missing` is "skip", which leaves their pairs out.
    """
    names = distinct_names(paths)
    sets = []
    with progress.task("reading verification sets", len(paths), "sets") as advance:
        for done, (path, name) in enumerate(zip(paths, names, strict=True)):
            advance(done)
            pairs = replace(read_pairs(path, folder, missing=missing, folds=folds), label=name)
            sets.append(check_pairs(pairs, image_size, missing=missing, fit=fit))
    return sets


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name each set by its file's stem, with suffix or folders in front where others share that.

    Raises UserError for a file that is given twice.
    """
    resolved = [path.resolve() for path in paths]
    twice = next((path for path, count in Counter(resolved).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{escape(str(twice))} is given twice as a verification set: name it once")
    choices = [[choice for depth in range(1, len(path.parts)) for choice in _names(path, depth)] for path in resolved]
    counts = Counter(choice for of_path in choices for choice in set(of_path))
    return [
        next((choice for choice in of_path if counts[choice] == 1), escape(str(path)))
        for path, of_path in zip(resolved, choices, strict=True)
    ]


def _names(path: Path, depth: int) -> tuple[str, str]:
    folders = "".join(f"{escape(part)}/" for part in path.parts[-depth:-1])
    return f"{folders}{escape(path.stem)}", f"{folders}{escape(path.name)}"


def check_pairs(pairs: PairSet, image_size: int, *, missing: Missing = "refuse", fit: str = "resize") -> PairSet:
    """Check a set before training, so that `embed_pairs` and `verify` do not fail after hours of it.

    The header of each image is read; images of a kind without an end mark are decoded. Returns the set without the
    pairs that `missing` leaves out, with warnings. Raises UserError as `open_sets` does.
    """
    faults: dict[int, str] = {}
    sizes: Counter[tuple[int, int]] = Counter()
    with progress.task(f"checking {pairs.name}", len(pairs.images)) as advance:
        for image in range(len(pairs.images)):
            if image % 100 == 0:
                advance(image)
            try:
                sizes[_size(pairs, image)] += 1
            except images.Undecodable as error:
                faults[image] = str(error)
    pairs = pairs.without(faults, missing)
    try:
        require_both_kinds(pairs.same)
    except UserError as error:
        raise UserError("; ".join([f"{escape(str(pairs.path))}: {error}", *pairs.warnings])) from None
    others = {size: count for size, count in sizes.items() if size != (image_size, image_size)}
    found = folds.fold_warnings(pairs.same)
    if others:
        listed = ", ".join(
            f"{count:,} of {width} x {height}" for (width, height), count in Counter(others).most_common(3)
        )
        many = f"{sum(others.values()):,} images are not {image_size} x {image_size} pixels ({listed})"
        if fit == "exact":
            raise UserError(
                f"{escape(str(pairs.path))}: {many}: align the faces to that size in the way of the training images, "
                "or set data.fit to resize or crop (--fit for recognition evaluate)"
            )
        found.append(f"{many}: {'scaled' if fit == 'resize' else 'their middle is scaled'} to that, as data.fit says")
    return replace(pairs, warnings=[*pairs.warnings, *found])


def _size(pairs: PairSet, image: int) -> tuple[int, int]:
    """Return width and height of an image. Raises Undecodable."""
    encoded = pairs.images[image]
    if not encoded:
        raise images.Undecodable("there is no image")
    height, width = images.size(encoded)
    if not encoded.startswith((b"\xff\xd8", b"\x89PNG")):
        images.decode(encoded)  # truncation shows only in decoding
    return width, height
