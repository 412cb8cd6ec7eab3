"""`recognition tune`."""

import click

from recognition.cli.argument_types import POSITIVE
from recognition.cli.command import Several, command


@command("tune", examples="recognition tune --batch 1024 8192 --write")
@click.option(
    "--batch", cls=Several, type=POSITIVE, default=[1024], metavar="N...", help="Images of all ranks together."
)
@click.option("--classes", type=POSITIVE, default=262_144, help="Classes of this GPU.")
@click.option("--embedding-size", type=POSITIVE, default=512, help="Length of an embedding.")
@click.option(
    "--work", cls=Several, metavar="NAME...", help="Classes of work, as the table names them.  [default: all]"
)
@click.option("--workspace", type=POSITIVE, default=256, metavar="MIB", help="Memory of a chunk.")
@click.option("--write", is_flag=True, help="Put the section into the table.")
def tune(
    batch: tuple[int, ...], classes: int, embedding_size: int, work: tuple[str, ...], workspace: int, write: bool
) -> None:
    """Measure the tiles of the head's Triton kernels on this GPU.

    Prints the section of recognition/head/backends/tiles.toml for this GPU; with --write, it takes its place in the
    file. Entries of work that is not measured stay as they are.
    """
    from recognition.tracking import progress, terminal

    with progress.task("loading torch", after=0):
        import torch

        from recognition.benchmarks import tune as tuning
        from recognition.errors import UserError
        from recognition.files.atomic import write_text
        from recognition.files.outputs import check_output
        from recognition.head.backends import select, tiles

    if wrong := set(work) - set(tuning.ALL_WORK):
        raise UserError(f"--work: {', '.join(sorted(wrong))}: not one of {', '.join(tuning.ALL_WORK)}")
    if write:
        check_output(tiles.TABLE, kind="file")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device here: run this on the GPU whose tiles are to be found")
    device = torch.device("cuda", torch.cuda.current_device())
    select.select_backend("triton", device)
    with progress.task("measuring tiles", unit="kernels") as advance:
        name, section = tuning.tune(
            device,
            batches=batch,
            classes=classes,
            embedding_size=embedding_size,
            work=[each for each in tuning.ALL_WORK if each in (work or tuning.ALL_WORK)],
            workspace=workspace << 20,
            report=terminal.write,
            advance=advance,
        )
    click.echo(section.to_toml(name), nl=False)
    if write:
        write_text(tiles.TABLE, tiles.put(tiles.TABLE.read_text(encoding="utf-8"), name, section))
        click.echo(f"written to {tiles.TABLE}", err=True)
