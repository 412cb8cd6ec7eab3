"""Build the index of a training set, or show what is in it."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recognition.config import UserError
from recognition.data.index import Index, build, open_index


def main() -> int:
    """Returns the exit status: 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("build", "index the data anew"), ("show", "say what the index holds; built if there is none")):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("path", type=Path, help="a .rec file, a folder with train.rec, or one folder per identity")
        command.add_argument("--cache", type=Path, help="where the index goes when the data is read-only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        index = _index(build if arguments.command == "build" else open_index, arguments.path, arguments.cache)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    _show(index)
    return 0


def _index(make: Callable[..., Index], path: Path, cache: Path | None) -> Index:
    console = Console(stderr=True)
    columns = TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("indexing", total=None)
        return make(path, cache, lambda done, total: progress.update(task, completed=done, total=total))


def _show(index: Index) -> None:
    counts = np.bincount(index.labels, minlength=index.num_identities)
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
        ("fingerprint", index.fingerprint),
        ("index", str(index.folder)),
    ):
        print(f"{name:<20} {value}")


def _files(index: Index) -> str:
    if len(index.files) > 4:
        roots = ", ".join(str(root) for root, _ in index.files.roots)
        return f"{len(index.files):,} in {roots}"
    return ", ".join(f"{file} ({size:,} bytes)" for file, size in zip(index.files, index.sizes.tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
