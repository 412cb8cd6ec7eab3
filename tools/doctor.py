"""Say what this machine has, what the settings that say `auto` become here, and how fast each part is.

Takes less than a minute. Each measurement stands for itself: what a whole training step does with precision, layout
and torch.compile is told by tools/benchmark_training.py --grid.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import torch
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from recognition import config, hardware
    from recognition.benchmarks import doctor, machine
    from recognition.cli.argument_types import path, positive
    from recognition.errors import UserError
    from recognition.files.outputs import check_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--ranks", type=positive, help="processes on this machine (default: one a GPU, else 2)")
    parser.add_argument("--folder", type=path, default=Path(), help="whose disk is measured (default: this one)")
    parser.add_argument("--quick", action="store_true", help="measure a tenth as long, which is less certain")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    found = _examine(options)
    if options.json:
        print(json.dumps(found))
    return 0


def _examine(options: argparse.Namespace) -> dict[str, Any]:
    """Print what is found, and return it as JSON values by name."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")
    if not options.folder.is_dir():
        what = "is a file" if options.folder.exists() else "No such file or directory"
        raise UserError(f"{options.folder}: {what}: name another folder with --folder")
    check_output(options.folder, kind="folder")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu else min(2, hardware.cores()))
    console = Console()

    system, packages = doctor.system(device), doctor.packages()
    rows = [[name, value] for name, value in system.items()]
    rows += [[name, version or f"missing: {doctor.PACKAGES[name]}"] for name, version in packages.items()]
    _print(console, ["machine", ""], rows)

    anything = config.Config(data=config.Data(path=options.folder))
    resolved = hardware.resolve(anything, hardware.detect(device), local_world=ranks)
    defaults = doctor.defaults(resolved, ranks)
    processes = f"{ranks} processes" if ranks > 1 else "1 process"
    _print(
        console,
        ["auto", f"is, for {processes}", "because"],
        [[each.name, str(each.value).lower(), each.reason] for each in defaults],
    )

    threads = resolved.config.training.threads
    torch.set_num_threads(threads)
    with console.status("measuring"):
        measured = machine.measure(device, options.folder, ranks=ranks, effort=_effort(options))
    _print_measured(console, measured, threads)
    verdicts = doctor.verdicts(resolved, measured, ranks) or ["nothing is unusual"]
    for verdict in verdicts:
        console.print(f"- {verdict}", highlight=False)
    return {
        "system": system,
        "packages": packages,
        "ranks": ranks,
        "resolved": resolved.to_json(),
        "measured": asdict(measured),
        "verdicts": verdicts,
    }


def _effort(options: argparse.Namespace) -> machine.Effort:
    return machine.QUICK if options.quick else machine.Effort()


def _print_measured(console: Console, measured: machine.Measurements, threads: int) -> None:
    on = f"{threads} threads" if threads > 1 else "1 thread"
    table: list[list[str]] = []
    convolutions = {(each.precision, each.channels_last): each for each in measured.convolutions}
    for precision, product in measured.products.items():
        row = [precision, _giga(product)]
        for layout in (True, False):
            each = convolutions.get((precision, layout))
            row += ["", ""] if each is None else [_giga(each.forward), _giga(each.backward)]
        table.append(row)
    _print(
        console,
        [f"GFLOP/s, {on}", "product", "channels-last\nforward", "\nbackward", "contiguous\nforward", "\nbackward"],
        table,
        numbers=True,
    )
    exchange, disk = measured.exchange, measured.disk
    rows = [[f"{name}, 1 thread", f"{rate:,.0f} faces/s decoded"] for name, rate in measured.decoding.items()]
    rows.append([f"{exchange.backend}, {exchange.ranks} ranks", f"{_giga(exchange.bytes_per_second)} GB/s all-reduced"])
    rows.append([f"disk, {disk.folder}", f"{disk.write / 1e6:,.0f} MB/s written, {disk.read / 1e6:,.0f} MB/s read"])
    _print(console, ["what", "rate"], rows)


def _print(console: Console, columns: list[str], rows: list[list[str]], *, numbers: bool = False) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def _giga(rate: float) -> str:
    """In thousands of millions, to three figures."""
    value = rate / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
