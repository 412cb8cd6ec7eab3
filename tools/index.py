"""Build, show, filter or merge the indexes of training sets."""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import numpy as np

    from recognition.cli.argument_types import path
    from recognition.data.derived_index import filter_index, merge_indexes
    from recognition.data.image_sizes import describe_sizes
    from recognition.data.index import Index, LostFile, build_index, open_index
    from recognition.data.quarantine import BadImage, check_header
    from recognition.errors import UserError
    from recognition.files.outputs import check_output
    from recognition.files.paths import shown
    from recognition.tracking.progress import task

_DATA = "a .rec file, a folder with .rec files, one folder per identity, or what filter or merge wrote"
_SAMPLED = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Index as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _main(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if options.cache is not None:
        check_output(options.cache, kind="folder")
    if options.command == "build":
        index = build_index(options.path, options.cache)
    elif options.command == "show":
        index = open_index(options.path, options.cache)
    elif options.command == "filter":
        check_output(options.output, kind="folder")
        source = open_index(options.path, options.cache)
        index = filter_index(source, _kept(source, options), options.output)
    else:
        check_output(options.output, kind="folder")
        sources = [open_index(each, options.cache) for each in options.paths]
        for each, source in zip(options.paths, sources, strict=True):
            for note in source.notes:
                print(f"warning: {shown(each)}: {note}", file=sys.stderr)
        index = merge_indexes(sources, options.output, same_identities=options.same_identities)
    _show(index)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {
        name: commands.add_parser(name, help=what, description=what)
        for name, what in (
            ("build", "index the data anew"),
            ("show", "say what the index holds; it is built if there is none"),
            ("filter", "write an index without some identities or images; data.path takes its folder"),
            ("merge", "write an index of several sets; data.path takes its folder"),
        )
    }
    for name, command in adders.items():
        if name == "merge":
            command.add_argument("output", type=path, help="folder for the new index")
            command.add_argument("paths", type=path, nargs="+", metavar="path", help=_DATA)
        else:
            command.add_argument("path", type=path, help=_DATA)
        command.add_argument("--cache", type=path, help="where the index of read-only data goes")
    adders["merge"].add_argument(
        "--same-identities", action="store_true", help="equal names or labels mean the same person (default: never)"
    )
    command = adders["filter"]
    command.add_argument("output", type=path, help="folder for the new index")
    command.add_argument("--min-images", type=int, default=1, help="leave out identities with fewer images")
    command.add_argument("--exclude-identities", type=path, metavar="FILE", help="names or labels, one a line")
    command.add_argument("--exclude-samples", type=path, metavar="FILE", help="a run's quarantine.jsonl")
    return parser


def _kept(index: Index, options: argparse.Namespace) -> np.ndarray:
    """Which samples the options of `filter` leave: bool [N]."""
    keep = np.ones(len(index), bool)
    if options.exclude_samples:
        keep[_samples(index, options.exclude_samples)] = False
    if options.exclude_identities:
        wanted = set(_read(options.exclude_identities).split(b"\n")) - {b""}
        names = [name.encode(errors="surrogateescape") for name in index.identities]
        if missing := wanted - set(names):
            name = shown(min(missing).decode(errors="surrogateescape"))
            raise UserError(
                f"{shown(options.exclude_identities)}: {len(missing)} of its names are no identities, as {name}"
            )
        keep &= ~np.isin(index.labels, [label for label, name in enumerate(names) if name in wanted])
    counts = np.bincount(index.labels[keep], minlength=index.num_identities)
    return keep & (counts >= options.min_images)[index.labels]


def _samples(index: Index, path: Path) -> list[int]:
    """The samples that a quarantine lists."""
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


def _show(index: Index) -> None:
    counts = np.bincount(index.labels, minlength=index.num_identities)
    sampled, sizes = _sizes(index)
    for name, value in (
        ("images", f"{index.num_images:,}"),
        ("identities", f"{index.num_identities:,}"),
        (
            "images per identity",
            f"min {counts.min()}, median {np.median(counts):g}, mean {counts.mean():.1f}, max {counts.max()}",
        ),
        ("with one image", f"{int((counts == 1).sum()):,} identities"),
        ("files", _files(index)),
        ("image bytes", f"{int(index.ranges['length'].sum(dtype=np.int64)):,}"),
        ("width x height", f"{sizes} (of {sampled:,} images)"),
        ("fingerprint", index.fingerprint),
        ("index", shown(index.folder)),
        *(("note", note) for note in index.notes),
    ):
        print(f"{name:<20} {value}")


def _sizes(index: Index) -> tuple[int, str]:
    """How many images were looked at, evenly over the index, and the sizes that their headers give."""
    samples = np.unique(np.linspace(0, len(index) - 1, min(len(index), _SAMPLED)).astype(np.int64)).tolist()
    sizes: Counter[tuple[int, int]] = Counter()
    unusable = 0
    with task("reading headers", total=len(samples), unit="images") as advance:
        for done, sample in enumerate(samples, 1):
            try:
                sizes[check_header(index.read(sample))] += 1
            except (BadImage, LostFile):
                unusable += 1
            advance(done)
    texts = ([describe_sizes(sizes)] if sizes else []) + ([f"unusable: {unusable:,}"] if unusable else [])
    return len(samples), ", ".join(texts)


def _files(index: Index) -> str:
    if len(index.files) > 4:
        return f"{len(index.files):,} in {', '.join(shown(root) for root, _ in index.files.roots)}"
    pairs = zip(index.files, index.sizes.tolist(), strict=True)
    return ", ".join(f"{shown(file)} ({size:,} bytes)" for file, size in pairs)


if __name__ == "__main__":
    sys.exit(main())
