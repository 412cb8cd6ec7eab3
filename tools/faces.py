"""Render procedural faces: a training set in InsightFace's format and a verification set of other identities."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    from PIL import Image

    from recognition.cli.argument_types import path, positive, whole
    from recognition.data.procedural.dataset import contact_sheet, write_faces
    from recognition.files.atomic import replacing
    from recognition.files.outputs import check_output


def main(arguments: Sequence[str] | None = None) -> int:
    """Render as the command line says; returns the exit status."""
    return program.run(lambda: _main(arguments))


def _main(given: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--identities", type=positive, default=400, metavar="N", help="identities to train on (default 400)"
    )
    parser.add_argument("--images", type=positive, default=24, metavar="M", help="images of each (default 24)")
    parser.add_argument("--output", type=path, metavar="DIR", help="folder for train.rec, train.idx and pairs.bin")
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="key of all that is drawn (default 0)")
    parser.add_argument("--pairs", type=positive, default=1200, metavar="P", help="verification pairs (default 1200)")
    parser.add_argument("--image-size", type=positive, default=112, metavar="H", help="pixels a side (default 112)")
    parser.add_argument("--workers", type=positive, metavar="W", help="processes (default: as many as cores)")
    parser.add_argument("--contact-sheet", type=path, metavar="PNG", help="also draw a picture of some of the faces")
    arguments = parser.parse_args(given)
    if arguments.output is None and arguments.contact_sheet is None:
        parser.error("give --output DIR, --contact-sheet PNG, or both")
    if arguments.output is not None:
        check_output(arguments.output, kind="folder")
    if arguments.contact_sheet is not None:
        check_output(arguments.contact_sheet, kind="file")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.output is not None:
        write_faces(
            arguments.output,
            identities=arguments.identities,
            images_per_identity=arguments.images,
            pairs=arguments.pairs,
            seed=arguments.seed,
            image_size=arguments.image_size,
            workers=arguments.workers,
        )
        print(f"{arguments.output}: {arguments.identities} identities x {arguments.images} images")
    if arguments.contact_sheet is not None:
        sheet = contact_sheet(arguments.seed, range(5), 8)
        # A palette and dither: a third of the size of full colour.
        sheet = sheet.quantize(palette=sheet.quantize(256, kmeans=2), dither=Image.Dither.FLOYDSTEINBERG)
        arguments.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        with replacing(arguments.contact_sheet) as temporary:
            sheet.save(temporary, format="PNG", optimize=True)
        print(arguments.contact_sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())
