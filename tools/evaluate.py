"""Verify a model on pairs of faces: 10-fold accuracy and TAR@FAR of each set."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import numpy as np
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from recognition.cli.argument_types import path, positive
    from recognition.deploy.onnx_embedder import OnnxEmbedder, OnnxOptions
    from recognition.errors import UserError
    from recognition.evaluation.embedder import Embedder
    from recognition.evaluation.pairs import PairSet
    from recognition.evaluation.verification import FARS, embed_pairs, verify
    from recognition.evaluation.verification_sets import open_sets
    from recognition.tracking import progress, terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    return program.run(lambda: _evaluate(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=path, required=True, help="an ONNX file, or the folder of a run")
    parser.add_argument(
        "--pairs",
        type=path,
        nargs="+",
        required=True,
        help="InsightFace .bin files, or lists of pairs: LFW's pairs.txt, CALFW's, CPLFW's, lines `path path label`",
    )
    parser.add_argument("--images", type=path, help="image folder of the lists (default: looked for beside them)")
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out pairs one of whose images is missing or cannot be decoded (default: refuse)",
    )
    parser.add_argument(
        "--folds",
        choices=("file", "even"),
        default="file",
        help="ten folds of the file's order, or with both kinds of pairs spread evenly first (default: %(default)s)",
    )
    parser.add_argument(
        "--fit",
        choices=("resize", "crop", "exact"),
        default="resize",
        help="what becomes of images of another size than the model's, as data.fit has it (default: %(default)s)",
    )
    parser.add_argument("--batch", type=positive, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    others = parser.add_argument_group("ONNX files of other programs")
    others.add_argument("--size", type=positive, help="height and width of the images, where the file leaves them free")
    others.add_argument("--output", metavar="NAME", help="the output that is the embedding, where several may be")
    channels = "one number, or one for each of the network's channels"
    others.add_argument("--mean", type=float, nargs="+", help=f"what is subtracted from levels 0 to 255: {channels}")
    others.add_argument("--std", type=float, nargs="+", help=f"what the difference is divided by: {channels}")
    others.add_argument(
        "--bgr", action=argparse.BooleanOptionalAction, help="whether the network's channels are blue, green, red"
    )
    return parser


def _evaluate(options: argparse.Namespace) -> int:
    onnx_options = OnnxOptions(options.size, options.output, options.mean, options.std, options.bgr)
    with progress.task("loading the model"):
        embedder = load_embedder(options.model, onnx_options)
    for note in getattr(embedder, "notes", ()):
        terminal.write(f"{terminal.escape(str(options.model))}: {note}")
    sets = open_sets(
        options.pairs,
        embedder.image_size,
        folder=options.images,
        missing="skip" if options.skip_missing else "refuse",
        folds=options.folds,
        fit=options.fit,
    )
    for pairs in sets:
        terminal.write(pairs.summary)
        for warning in pairs.warnings:
            terminal.write(f"WARNING {pairs.name}: {warning}")
    results = {str(pairs.path): evaluate(embedder, pairs, options.batch, options.fit) for pairs in sets}
    Console().print(_table(options.model, list(results.values())))
    if options.json:
        first = next(iter(results.values()))
        print(json.dumps(first if len(results) == 1 else {**first, "sets": results}))
    return 0


def load_embedder(model: Path, reading: OnnxOptions | None = None) -> Embedder:
    """The embedder of an ONNX file, or of a run folder: its `model.onnx`, else its newest checkpoint."""
    reading = reading or OnnxOptions()
    if not model.is_dir():
        return OnnxEmbedder(model, reading)
    if (model / "model.onnx").is_file():
        return OnnxEmbedder(model / "model.onnx", reading)
    if reading != OnnxOptions():
        raise UserError(f"{model}: --size, --output, --mean, --std and --bgr are for ONNX files; leave them out")
    import torch

    from recognition.models.backbone import BackboneEmbedder
    from recognition.runs.folder import load_backbone

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, _ = load_backbone(model)
    return BackboneEmbedder(backbone.to(device), device, float32=True)


def evaluate(embedder: Embedder, pairs: PairSet, batch: int, fit: str = "resize") -> dict[str, Any]:
    """The verification numbers of one set, its name, what to know of it, and the seconds that they took."""
    start, images = time.perf_counter(), 2 * len(pairs)
    parts = []
    with progress.task(f"verifying {pairs.name}", images) as advance:
        for first in range(0, images, batch):
            part = range(first, min(first + batch, images))
            parts.append(embed_pairs(embedder, pairs, batch, part, fit))
            advance(part.stop)
    try:
        result = verify(np.concatenate(parts), pairs.same).to_json()
    except UserError as error:
        raise UserError(f"{pairs.name}: {error}") from None
    seconds = round(time.perf_counter() - start, 3)
    return {"name": pairs.name, **result, "doubts": list(pairs.warnings), "seconds": seconds}


def _table(model: Path, results: list[dict[str, Any]]) -> Table:
    # As Text, for rich takes brackets in a text for markup.
    table = Table("", title=Text(terminal.escape(str(model))), title_justify="left", box=SIMPLE)
    for result in results:
        table.add_column(Text(result["name"]), justify="right")
    table.add_row("pairs", *(str(result["pairs"]) for result in results))
    table.add_row(
        "accuracy %", *(f"{100 * item['accuracy']:.2f} ± {100 * item['accuracy_std']:.2f}" for item in results)
    )
    table.add_row("threshold", *(f"{result['threshold']:.3f}" for result in results))
    for far in FARS:
        rates = [result["tar_at_far"][far] for result in results]
        table.add_row(f"TAR@FAR={far} %", *("n/a" if rate is None else f"{100 * rate:.2f}" for rate in rates))
    table.add_row("seconds", *(f"{result['seconds']:.1f}" for result in results))
    return table


if __name__ == "__main__":
    sys.exit(main())
