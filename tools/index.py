"""Build the index of a training set, or show what is in it."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition import program

with program.imports():
    import numpy as np
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from recognition.argument_types import path
    from recognition.data.index import Index, build, open_index
    from recognition.outputs import check_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Index as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("build", "index the data anew"), ("show", "say what the index holds; built if there is none")):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("path", type=path, help="a .rec file, a folder with train.rec, or one folder per identity")
        command.add_argument("--cache", type=path, help="where the index goes when the data is read-only")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    if arguments.cache is not None:
        check_output(arguments.cache, kind="folder")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    index = _index(build if arguments.command == "build" else open_index, arguments.path, arguments.cache)
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
