"""`recognition faces`."""

import logging
from pathlib import Path

import click

from recognition.cli.argument_types import PATH, POSITIVE, WHOLE
from recognition.cli.command import command

EXAMPLES = """
recognition faces --output faces --identities 100 --images 10 --pairs 200
recognition faces --contact-sheet sheet.png
"""


@command("faces", examples=EXAMPLES)
@click.option("--identities", type=POSITIVE, default=400, help="Identities to train on.")
@click.option("--images", type=POSITIVE, default=24, help="Images of each identity.")
@click.option("--output", type=PATH, metavar="DIR", help="Folder for train.rec, train.idx and pairs.bin.")
@click.option("--seed", type=WHOLE, default=0, help="Seed of all that is drawn.")
@click.option("--pairs", type=POSITIVE, default=1200, help="Verification pairs, of other identities.")
@click.option("--image-size", type=POSITIVE, default=112, help="Height and width in pixels.")
@click.option("--workers", type=POSITIVE, help="Processes.  [default: as many as cores]")
@click.option("--contact-sheet", type=PATH, metavar="PNG", help="Also draw a picture of some of the faces.")
def faces(
    identities: int,
    images: int,
    output: Path | None,
    seed: int,
    pairs: int,
    image_size: int,
    workers: int | None,
    contact_sheet: Path | None,
) -> None:
    """Render procedural faces, to train and to verify on.

    DIR gets a training set in InsightFace's format, and a verification set of other identities.
    """
    from recognition.files.outputs import check_output

    if output is None and contact_sheet is None:
        raise click.UsageError("give --output DIR, --contact-sheet PNG, or both", click.get_current_context())
    if output is not None:
        check_output(output, kind="folder")
    if contact_sheet is not None:
        check_output(contact_sheet, kind="file")
    from recognition.data.procedural.dataset import write_faces

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if output is not None:
        write_faces(
            output,
            identities=identities,
            images_per_identity=images,
            pairs=pairs,
            seed=seed,
            image_size=image_size,
            workers=workers,
        )
        click.echo(f"{output}: {identities} identities x {images} images")
    if contact_sheet is not None:
        _draw(contact_sheet, seed)
        click.echo(contact_sheet)


def _draw(path: Path, seed: int) -> None:
    """Write a picture of five identities, eight images each."""
    from PIL import Image

    from recognition.data.procedural.dataset import contact_sheet
    from recognition.files.atomic import replacing
    from recognition.tracking.progress import task

    with task("drawing the contact sheet"):
        sheet = contact_sheet(seed, range(5), 8)
        # A palette and dither: a third of the size of full colour.
        sheet = sheet.quantize(palette=sheet.quantize(256, kmeans=2), dither=Image.Dither.FLOYDSTEINBERG)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
