"""`recognition benchmark data`."""

import json
import tempfile
from pathlib import Path

import click

from recognition.cli.argument_types import PATH, POSITIVE
from recognition.cli.command import Several, check_cuda, command, device_option, json_option


@command("data", examples="recognition benchmark data --data runs/demo-faces --loader dali torchvision")
@click.option("--data", type=PATH, required=True, metavar="DIR", help="A data set, as in data.path.")
@device_option
@click.option(
    "--loader",
    cls=Several,
    type=click.Choice(["auto", "dali", "torchvision"]),
    default=["auto"],
    metavar="NAME...",
    help="auto, dali or torchvision, as in data.loader; several take turns, and are compared.",
)
@click.option("--batch", type=POSITIVE, default=256, help="Images in a batch.")
@click.option("--steps", type=POSITIVE, default=100, help="Batches, after a warm-up.")
@click.option("--threads", type=POSITIVE, default=2, help="Threads that decode on the CPU.")
@json_option
def benchmark_data(
    data: Path, device: str, loader: tuple[str, ...], batch: int, steps: int, threads: int, as_json: bool
) -> None:
    """Measure the data pipeline.

    It reads, decodes, augments, and puts batches on the device. Rates are in images per second, and per second of
    processor time, that of all threads of the process together.
    """
    from recognition.tracking.progress import task

    with task("loading torch", after=0):
        import torch

        from recognition import hardware
        from recognition.benchmarks.data import AUGMENTS, WARM_UP, measure, settings_of
        from recognition.data.index import open_index

    check_cuda(device)
    found: dict[str, float] = {}
    loaders = list(dict.fromkeys(map(hardware.loader, loader)))
    with tempfile.TemporaryDirectory() as cache:
        index = open_index(data, Path(cache))
        for name, augment in AUGMENTS.items():
            rates = []
            for each in loaders:
                with task(f"measuring {each}, {name}", WARM_UP + steps, "batches") as advance:
                    settings = settings_of(data, augment, each, threads)
                    on = torch.device(device)
                    rates.append(measure(index, settings, batch=batch, steps=steps, device=on, advance=advance))
            for each, rate in zip(loaders, rates, strict=True):
                prefix = name if len(loaders) == 1 else f"{each}_{name}"
                found[f"{prefix}_images_per_second"] = rate.per_second
                found[f"{prefix}_images_per_cpu_second"] = rate.per_cpu_second
                click.echo(
                    f"{name:<12} {each:<12} {rate.per_second:>7,.0f} img/s, {rate.per_cpu_second:>7,.0f} per CPU-second"
                    f" ({rate.per_second / rates[0].per_second:.2f} x, "
                    f"{rate.per_cpu_second / rates[0].per_cpu_second:.2f} x {loaders[0]}),"
                    f" batch {batch}, on {device}"
                )
    if as_json:
        click.echo(json.dumps(found))
