"""Select the samples of an index by number of images, by lists of identities and by a run's quarantine."""

import json
from pathlib import Path

import numpy as np

from recognition.data.index import Index
from recognition.errors import UserError
from recognition.files.paths import shown


def kept(
    index: Index, *, min_images: int = 1, exclude_identities: Path | None = None, exclude_samples: Path | None = None
) -> np.ndarray:
    """Return which samples remain, bool [N].

    `exclude_identities` lists names or labels, one a line; `exclude_samples` is a run's quarantine.jsonl. Identities
    with fewer than `min_images` images after that are left out. Raises UserError for a list that does not belong to
    the index.
    """
    keep = np.ones(len(index), bool)
    if exclude_samples:
        keep[_samples(index, exclude_samples)] = False
    if exclude_identities:
        wanted = set(_read(exclude_identities).split(b"\n")) - {b""}
        names = [name.encode(errors="surrogateescape") for name in index.identities]
        if missing := wanted - set(names):
            name = shown(min(missing).decode(errors="surrogateescape"))
            raise UserError(f"{shown(exclude_identities)}: {len(missing)} of its names are no identities, as {name}")
        keep &= ~np.isin(index.labels, [label for label, name in enumerate(names) if name in wanted])
    counts = np.bincount(index.labels[keep], minlength=index.num_identities)
    return keep & (counts >= min_images)[index.labels]


def _samples(index: Index, path: Path) -> list[int]:
    """Return the samples that a quarantine lists."""
    samples = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            facts = json.loads(line)
            sample, where = int(facts["sample"]), str(facts["where"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{shown(path)}: line {number} is not a line of quarantine.jsonl: {line!r}") from None
        if not 0 <= sample < len(index) or index.describe(sample) != where:
            raise UserError(f"{shown(path)}: line {number} is about {where}, which is not in {shown(index.path)}")
        samples.append(sample)
    return samples


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(path)}: {error.strerror}") from None
