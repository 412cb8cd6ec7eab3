"""Render procedural faces: a training set in InsightFace's format and a verification set of other identities."""

import argparse
import logging
import sys
from pathlib import Path

from PIL import Image

from recognition.config import UserError
from recognition.data.faces import contact_sheet, write_faces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--identities", type=int, default=400, metavar="N", help="identities to train on (default 400)")
    parser.add_argument("--images", type=int, default=24, metavar="M", help="images of each (default 24)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for train.rec, train.idx and pairs.bin")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="key of all that is drawn (default 0)")
    parser.add_argument("--pairs", type=int, default=1200, metavar="P", help="verification pairs (default 1200)")
    parser.add_argument("--image-size", type=int, default=112, metavar="H", help="pixels a side (default 112)")
    parser.add_argument("--workers", type=int, metavar="W", help="processes (default: as many as cores)")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="also draw a picture of some of the faces")
    arguments = parser.parse_args()
    if arguments.output is None and arguments.contact_sheet is None:
        parser.error("give --output DIR, --contact-sheet PNG, or both")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.output is not None:
            write_faces(
                arguments.output,
                identities=arguments.identities,
                images=arguments.images,
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
            sheet.save(arguments.contact_sheet, format="PNG", optimize=True)
            print(arguments.contact_sheet)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
