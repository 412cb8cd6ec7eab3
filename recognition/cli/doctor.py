"""`recognition doctor`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import PATH, POSITIVE
from recognition.cli.command import check_cuda, command, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from recognition.benchmarks import machine

EXAMPLES = """
recognition doctor
recognition doctor --ranks 8 --folder /data --quick --json
"""


@command("doctor", examples=EXAMPLES)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to measure.")
@click.option("--ranks", type=POSITIVE, help="Processes on this machine.  [default: one a GPU, else 2]")
@click.option("--folder", type=PATH, default=".", help="Folder whose disk is measured.")
@click.option("--quick", is_flag=True, help="Measure a tenth as long, which is less certain.")
@json_option
def doctor(device: str, ranks: int | None, folder: Path, quick: bool, as_json: bool) -> None:
    """Describe this machine and measure its speed.

    Also prints the values that `auto` settings have here. Takes less than a minute. Each part is measured by itself:
    for the effect of precision, layout and torch.compile on whole training steps, run `recognition benchmark training
    --grid`.
    """
    found = _examine(device, ranks, folder, quick)
    if as_json:
        click.echo(json.dumps(found))


def _examine(device_name: str, ranks: int | None, folder: Path, quick: bool) -> dict[str, Any]:
    """Print what is found, and return it as JSON values by name."""
    from recognition.errors import UserError
    from recognition.files.outputs import check_output
    from recognition.tracking.progress import task

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "No such file or directory"
        raise UserError(f"{folder}: {what}: name another folder with --folder")
    check_output(folder, kind="folder")
    with task("loading torch", after=0):
        import torch
        from rich.console import Console

        from recognition import config, hardware
        from recognition.benchmarks import doctor, machine

    check_cuda(device_name)
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    ranks = ranks or (torch.cuda.device_count() if on_gpu else min(2, hardware.cores()))
    console = Console()

    system, packages = doctor.system(device), doctor.packages()
    rows = [[name, value] for name, value in system.items()]
    rows += [[name, version or f"missing: {doctor.PACKAGES[name]}"] for name, version in packages.items()]
    _print(console, ["machine", ""], rows)

    anything = config.Config(data=config.Data(path=folder))
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
    with task("measuring this machine", machine.PARTS, "parts") as advance:
        effort = machine.QUICK if quick else machine.Effort()
        measured = machine.measure(device, folder, ranks=ranks, effort=effort, advance=advance)
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


def _print_measured(console: "Console", measured: "machine.Measurements", threads: int) -> None:
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


def _print(console: "Console", columns: list[str], rows: list[list[str]], *, numbers: bool = False) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def _giga(rate: float) -> str:
    """Return a rate in thousands of millions, to three figures."""
    value = rate / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
