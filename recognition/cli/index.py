"""`recognition index`: build, show, filter and merge the indexes of training sets."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import PATH
from recognition.cli.command import SETTINGS, Group, command

if TYPE_CHECKING:
    from recognition.data.index import Index

_SAMPLED = 1000


def _cache_option(function: Callable[..., Any]) -> Callable[..., Any]:
    text = "Folder for the index of data that is read-only.  [default: your cache folder]"
    return click.option("--cache", type=PATH, metavar="DIR", help=text)(function)


@click.group("index", cls=Group, context_settings=SETTINGS)
def index() -> None:
    """Build, show, filter or merge the indexes of training sets.

    DATA is a .rec file, a folder with .rec files, a folder with one folder per identity, or an index that filter or
    merge wrote.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


@command("build", examples="recognition index build /data/ms1m-retinaface-t1")
@click.argument("path", type=PATH, metavar="DATA")
@_cache_option
def build_index(path: Path, cache: Path | None) -> None:
    """Index the data anew."""
    _check_cache(cache)
    from recognition.data import index as indexes

    _show(indexes.build_index(path, cache))


@command("show", examples="recognition index show /data/faces")
@click.argument("path", type=PATH, metavar="DATA")
@_cache_option
def show_index(path: Path, cache: Path | None) -> None:
    """Say what the index holds; it is built if there is none."""
    _check_cache(cache)
    from recognition.data import index as indexes

    _show(indexes.open_index(path, cache))


@command("filter", examples="recognition index filter /data/faces /data/faces-3 --min-images 3")
@click.argument("path", type=PATH, metavar="DATA")
@click.argument("output", type=PATH, metavar="OUTPUT")
@_cache_option
@click.option("--min-images", type=int, default=1, metavar="N", help="Leave out identities with fewer images.")
@click.option("--exclude-identities", type=PATH, metavar="FILE", help="Names or labels to leave out, one a line.")
@click.option("--exclude-samples", type=PATH, metavar="FILE", help="A run's quarantine.jsonl, to leave out its images.")
def filter_index(
    path: Path,
    output: Path,
    cache: Path | None,
    min_images: int,
    exclude_identities: Path | None,
    exclude_samples: Path | None,
) -> None:
    """Write an index without some identities or images.

    It goes into the folder OUTPUT, which data.path takes.
    """
    _check_cache(cache)
    from recognition.data import derived_index
    from recognition.data import index as indexes
    from recognition.data.selection import kept
    from recognition.files.outputs import check_output

    check_output(output, kind="folder")
    source = indexes.open_index(path, cache)
    keep = kept(source, min_images=min_images, exclude_identities=exclude_identities, exclude_samples=exclude_samples)
    _show(derived_index.filter_index(source, keep, output))


@command("merge", examples="recognition index merge /data/both /data/faces /data/ms1m-retinaface-t1")
@click.argument("output", type=PATH, metavar="OUTPUT")
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="DATA...")
@_cache_option
@click.option("--same-identities", is_flag=True, help="Equal names or labels mean the same person.")
def merge_indexes(output: Path, paths: tuple[Path, ...], cache: Path | None, same_identities: bool) -> None:
    """Write an index of several sets.

    It goes into the folder OUTPUT, which data.path takes. Without --same-identities, no identity of one set is one of
    another's.
    """
    _check_cache(cache)
    from recognition.data import derived_index
    from recognition.data import index as indexes
    from recognition.files.outputs import check_output
    from recognition.files.paths import shown

    check_output(output, kind="folder")
    sources = [indexes.open_index(each, cache) for each in paths]
    for each, source in zip(paths, sources, strict=True):
        for note in source.notes:
            click.echo(f"warning: {shown(each)}: {note}", err=True)
    _show(derived_index.merge_indexes(sources, output, same_identities=same_identities))


for _each in (build_index, show_index, filter_index, merge_indexes):
    index.add_command(_each)


def _check_cache(cache: Path | None) -> None:
    from recognition.files.outputs import check_output

    if cache is not None:
        check_output(cache, kind="folder")


def _show(found: "Index") -> None:
    import numpy as np

    from recognition.files.paths import shown

    counts = np.bincount(found.labels, minlength=found.num_identities)
    sampled, sizes = _sizes(found)
    for name, value in (
        ("images", f"{found.num_images:,}"),
        ("identities", f"{found.num_identities:,}"),
        (
            "images per identity",
            f"min {counts.min()}, median {np.median(counts):g}, mean {counts.mean():.1f}, max {counts.max()}",
        ),
        ("with one image", f"{int((counts == 1).sum()):,} identities"),
        ("files", _files(found)),
        ("image bytes", f"{int(found.ranges['length'].sum(dtype=np.int64)):,}"),
        ("width x height", f"{sizes} (of {sampled:,} images)"),
        ("fingerprint", found.fingerprint),
        ("index", shown(found.folder)),
        *(("note", note) for note in found.notes),
    ):
        click.echo(f"{name:<20} {value}")


def _sizes(found: "Index") -> tuple[int, str]:
    """Return the number of images looked at, evenly over the index, and the sizes that their headers give."""
    import numpy as np

    from recognition.data.image_sizes import describe_sizes
    from recognition.data.index import LostFile
    from recognition.data.quarantine import BadImage, check_header
    from recognition.tracking.progress import task

    samples = np.unique(np.linspace(0, len(found) - 1, min(len(found), _SAMPLED)).astype(np.int64)).tolist()
    sizes: Counter[tuple[int, int]] = Counter()
    unusable = 0
    with task("reading headers", total=len(samples), unit="images") as advance:
        for done, sample in enumerate(samples, 1):
            try:
                sizes[check_header(found.read(sample))] += 1
            except (BadImage, LostFile):
                unusable += 1
            advance(done)
    texts = ([describe_sizes(sizes)] if sizes else []) + ([f"unusable: {unusable:,}"] if unusable else [])
    return len(samples), ", ".join(texts)


def _files(found: "Index") -> str:
    from recognition.files.paths import shown

    if len(found.files) > 4:
        return f"{len(found.files):,} in {', '.join(shown(root) for root, _ in found.files.roots)}"
    pairs = zip(found.files, found.sizes.tolist(), strict=True)
    return ", ".join(f"{shown(file)} ({size:,} bytes)" for file, size in pairs)
