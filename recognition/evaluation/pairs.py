"""Reading of one verification set: an InsightFace `.bin` file, or a list of pairs with a folder of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from recognition.errors import UserError
from recognition.evaluation.bin_files import is_pickle, read_bin
from recognition.evaluation.folds import is_uneven, spread_evenly
from recognition.evaluation.image_lookup import ImageLookup, find_folder, is_respelled
from recognition.evaluation.pair_lists import PairList, read_list
from recognition.images import Undecodable, decode
from recognition.tracking import progress
from recognition.tracking.terminal import escape

Missing = Literal["refuse", "skip"]
Folds = Literal["file", "even"]
NAMED = 3
"""Number of unusable images that a message names."""


@dataclass(frozen=True, eq=False)
class PairSet:
    """Verification set: pairs of face images, genuine or impostor. Pair `i` is images `2i` and `2i + 1`."""

    path: Path
    """The file that the set was read from."""
    images: Sequence[bytes]
    """2P encoded images."""
    same: np.ndarray
    """bool [P]: true for a genuine pair, false for an impostor pair."""
    files: Sequence[Path] = ()
    """2P image files, if each image has one."""
    pair_names: Sequence[str] = ()
    """Names of the P pairs in messages; empty for "pair 1", "pair 2", ..."""
    label: str = ""
    """The set's name, if it is not the file's."""
    form: str = ""
    """Description of the file's form."""
    warnings: Sequence[str] = ()
    """Sentences for a reader of the set's results, on flaws that affect them."""

    def __len__(self) -> int:
        return len(self.same)

    @property
    def name(self) -> str:
        """Name of the set in results: `label`, or the file's name without its suffix."""
        return self.label or escape(self.path.stem)

    @property
    def summary(self) -> str:
        """Form and number of pairs, in one line."""
        genuine = int(self.same.sum())
        return f"{self.name}: {self.form}, {genuine:,} genuine and {len(self) - genuine:,} impostor pairs, in 10 folds"

    def describe(self, image: int) -> str:
        """Name an image in an error: the set's file, the pair (from 1), the image's place in it and its file."""
        return f"{escape(str(self.path))}: {self._place(image)}"

    def _place(self, image: int) -> str:
        pair = self.pair_names[image // 2] if self.pair_names else f"pair {image // 2 + 1}"
        file = f" ({escape(str(self.files[image]))})" if self.files else ""
        return f"image {image % 2 + 1} of {pair}{file}"

    def decode(self, image: int) -> np.ndarray:
        """Decode image `image` to uint8 [H, W, 3]: see `recognition.images.decode`. Raises UserError if that fails."""
        try:
            return decode(self.images[image])
        except Undecodable as error:
            raise UserError(
                f"{self.describe(image)} cannot be decoded: {error}; replace the image, or make the set without it"
            ) from None

    def select(self, order: np.ndarray) -> "PairSet":
        """Return the set of the pairs `order` (numbers from 0), in that order."""
        both = [2 * int(pair) + image for pair in order for image in (0, 1)]
        pair_names = self.pair_names or [f"pair {number}" for number in range(1, len(self) + 1)]
        return replace(
            self,
            images=[self.images[image] for image in both],
            same=self.same[order],
            files=[self.files[image] for image in both] if self.files else (),
            pair_names=[pair_names[int(pair)] for pair in order],
        )

    def without(self, faults: Mapping[int, str], missing: Missing) -> "PairSet":
        """Return the set without the pairs of the images in `faults`, which maps images to reasons.

        Raises UserError, naming the first of them, if there are any and `missing` is "refuse".
        """
        if not faults:
            return self
        first = [f"{self._place(image)}: {reason}" for image, reason in list(faults.items())[:NAMED]]
        more = [f"and {len(faults) - NAMED:,} more"] if len(faults) > NAMED else []
        counted = f"{len(faults):,} of {2 * len(self):,} images cannot be used"
        if missing == "refuse":
            raise UserError(
                f"{escape(str(self.path))}: {counted}:\n"
                + "".join(f"  {line}\n" for line in [*first, *more])
                + "Put right images in their places, or leave their pairs out: evaluation.missing_images=skip, and "
                "--skip-missing for recognition evaluate"
            )
        lost = {image // 2 for image in faults}
        kept = self.select(np.array([pair for pair in range(len(self)) if pair not in lost], int))
        note = f"{len(lost):,} of {len(self):,} pairs left out, for {counted}: {'; '.join([*first, *more])}"
        return replace(kept, warnings=[*self.warnings, note])


def read_pairs(
    path: Path | str, images: Path | None = None, *, missing: Missing = "refuse", folds: Folds = "file"
) -> PairSet:
    """Read a verification set: a `.bin`, or a list of pairs, whatever its name, with its images in files.

    `.bin`: a pickle, protocol 0 to 5, of (list of 2P encoded images, list of P booleans), each image bytes, a Python-2
    string or a NumPy uint8 array. Lists: the forms of `recognition.evaluation.pair_lists`.

    The names in a list are searched in the folder `images`; by default in the list's own folder or a folder in it,
    whichever has most images of the first pairs. Image j of a person in LFW is `name/name_000j` or `name_000j` with any
    image suffix.

    A set keeps the order of its file, whose ten consecutive parts are the folds. With `folds` "even", both kinds of
    pairs are spread evenly over the folds; so they are in a list that does not announce ten sets, if its own order
    would be uneven.

    Raises UserError if the file is missing, empty, truncated or of another kind, would run code, or does not hold two
    images per pair; and if images are missing, unless `missing` is "skip", which leaves their pairs out.
    """
    path = Path(path)
    name = escape(str(path))
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.bin")) + sorted(path.glob("*.txt"))), path / "lfw.bin")
        raise UserError(f"{name}: cannot be read: it is a folder; give a file in it, such as {escape(str(inside))}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise UserError(f"{name}: the file is empty; copy or download it again")
    even = folds == "even"
    if is_pickle(path, data):
        pairs = PairSet(path, *read_bin(name, data), form="a .bin file")
    else:
        listed = read_list(name, data)
        pairs = _read_images(path, listed, images, missing)
        even |= is_uneven(pairs.same) if listed.sets is None else listed.sets != 10
    if not len(pairs):
        raise UserError("; ".join([f"{name}: the set holds no pairs; make it again", *pairs.warnings]))
    if even:
        pairs = replace(pairs.select(spread_evenly(pairs.same)), form=f"{pairs.form}, both kinds spread over the folds")
    return replace(pairs, warnings=[*pairs.warnings, *_warn_of_repeats(pairs)])


def _read_images(path: Path, listed: PairList, images: Path | None, missing: Missing) -> PairSet:
    """Find and read the images of a list. Raises UserError as `read_pairs` does."""
    name, entries = escape(str(path)), listed.entries
    folder = (
        ImageLookup(images) if images else find_folder(path.parent, [(entry.first, entry.second) for entry in entries])
    )
    if folder is None or not folder.root.is_dir():
        where = images or f"{path.parent} or a folder in it"
        raise UserError(
            f"{name}: no image {escape(entries[0].first[0])} nor one of the next in {escape(str(where))}; put the "
            "images' folder beside the file, or name it: evaluation.image_folder, and --images for recognition evaluate"
        )
    read: dict[Path, bytes] = {}
    files, faults, respelled = [], {}, []
    wanted = [names for entry in entries for names in (entry.first, entry.second)]
    with progress.task(f"reading the images of {name}", len(wanted)) as advance:
        for image, names in enumerate(wanted):
            advance(image)
            file = folder.find(names)
            files.append(file or folder.root / names[0])
            if file is None:
                faults[image] = "no such file"
                continue
            if is_respelled(file, names):
                respelled.append(file)
            if file not in read:
                try:
                    read[file] = file.read_bytes()
                except OSError as error:
                    faults[image] = f"cannot be read: {error.strerror or error}"
                    continue
            if not read[file]:
                faults[image] = "the file is empty"
    warnings = []
    if respelled:
        warnings = [
            f"{len(respelled):,} images are under names that are spelled otherwise in the list, such as "
            f"{escape(str(respelled[0]))}"
        ]
    same = np.array([entry.same for entry in entries])
    found = [read.get(file, b"") for file in files]
    pair_names = [f"pair {number} in line {entry.line}" for number, entry in enumerate(entries, 1)]
    return PairSet(path, found, same, files, pair_names, form=listed.form, warnings=warnings).without(faults, missing)


def _warn_of_repeats(pairs: PairSet) -> list[str]:
    """Return warnings on repeated pairs and on pairs of an image and itself."""
    contents, kinds = [], dict[frozenset[bytes], set[bool]]()
    for pair, same in enumerate(pairs.same.tolist()):
        content = frozenset(pairs.images[2 * pair : 2 * pair + 2])
        if b"" not in content:  # an image that is missing
            contents.append(content)
            kinds.setdefault(content, set()).add(same)
    counts = {
        "pairs are in the set already, and count each time": len(contents) - len(kinds),
        "pairs are of an image and itself": sum(len(content) == 1 for content in contents),
        "pairs are in the set both as genuine and as impostor": sum(len(kind) == 2 for kind in kinds.values()),
    }
    return [f"{count:,} of {len(pairs):,} {what}" for what, count in counts.items() if count]
