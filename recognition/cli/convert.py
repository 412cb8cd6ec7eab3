"""`recognition convert`."""

from pathlib import Path

import click

from recognition.cli.argument_types import PATH, POSITIVE
from recognition.cli.command import command


@command("convert", examples="recognition convert ms1mv3_r50.py --gpus 8 --output ms1mv3_r50.toml")
@click.argument("file", type=PATH, metavar="FILE.py")
@click.option(
    "--gpus", type=POSITIVE, default=8, help="GPUs that the batch of the file is meant for, one process each."
)
@click.option("--output", type=PATH, metavar="FILE.toml", help="File to write.  [default: standard output]")
def convert(file: Path, gpus: int, output: Path | None) -> None:
    """Turn a configuration of arcface_torch into one of ours.

    arcface_torch is the training program of InsightFace. FILE.py is read, not run. Settings without a counterpart here
    are listed on standard error.
    """
    from recognition.config.arcface_torch import convert_file
    from recognition.files.atomic import write_text
    from recognition.files.outputs import check_output

    if output is not None:
        check_output(output, kind="file", inputs=[file])
    converted = convert_file(file, gpus=gpus)
    for note in converted.notes:
        click.echo(f"note: {note}", err=True)
    if output is None:
        click.echo(converted.toml, nl=False)
    else:
        write_text(output, converted.toml)
        click.echo(output)
