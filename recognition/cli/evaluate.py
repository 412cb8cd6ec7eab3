"""`recognition evaluate`."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.argument_types import PATH, POSITIVE
from recognition.cli.command import Several, command, json_option

if TYPE_CHECKING:
    from rich.table import Table

    from recognition.deploy.onnx_embedder import OnnxOptions
    from recognition.evaluation.embedder import Embedder
    from recognition.evaluation.pairs import PairSet

EXAMPLES = """
recognition evaluate --model runs/demo --pairs runs/demo-faces/pairs.bin
recognition evaluate --model model.onnx --pairs lfw.bin agedb_30.bin --json
recognition evaluate --model other.onnx --pairs lfw.bin \\
    --mean 123.675 116.28 103.53 --std 58.395 57.12 57.375
"""
_CHANNELS = "one number, or one for each of the network's channels."


@command("evaluate", examples=EXAMPLES)
@click.option("--model", type=PATH, required=True, help="An ONNX file, or the folder of a run.")
@click.option(
    "--pairs",
    cls=Several,
    type=PATH,
    required=True,
    metavar="PATH...",
    help="InsightFace .bin files, or lists of pairs: LFW's pairs.txt, CALFW's, CPLFW's, lines `path path label`.",
)
@click.option("--images", type=PATH, help="Image folder of the lists.  [default: looked for beside them]")
@click.option(
    "--skip-missing",
    is_flag=True,
    help="Leave out pairs one of whose images is missing or cannot be decoded, instead of refusing the list.",
)
@click.option(
    "--folds",
    type=click.Choice(["file", "even"]),
    default="file",
    help="Ten folds in the order of the file, or with both kinds of pairs spread evenly first.",
)
@click.option(
    "--fit",
    type=click.Choice(["resize", "crop", "exact"]),
    default="resize",
    help="How images of another size than the model's are fitted, as data.fit has it.",
)
@click.option("--batch", type=POSITIVE, default=64, help="Images per forward pass.")
@json_option
@click.option("--size", type=POSITIVE, help="ONNX files of others: image size, where the file leaves it free.")
@click.option("--output", metavar="NAME", help="ONNX files of others: the output that is the embedding, of several.")
@click.option(
    "--mean", cls=Several, type=float, metavar="X...", help=f"ONNX files of others: subtracted from levels: {_CHANNELS}"
)
@click.option(
    "--std", cls=Several, type=float, metavar="X...", help=f"ONNX files of others: divisor after that: {_CHANNELS}"
)
@click.option("--bgr/--no-bgr", default=None, help="ONNX files of others: whether the channels are blue, green, red.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Verify a model on pairs of faces.

    Prints accuracy by the 10-fold protocol of LFW and TAR@FAR for each set of pairs.

    Needs no torch for an ONNX file: the extra `evaluate` is enough.
    """
    from rich.console import Console

    from recognition.evaluation.verification_sets import open_sets
    from recognition.tracking import progress, terminal

    model: Path = options["model"]
    with progress.task("loading the model"):
        embedder = load_embedder(model, _reading(options))
    for note in getattr(embedder, "notes", ()):
        terminal.write(f"{terminal.escape(str(model))}: {note}")
    sets = open_sets(
        options["pairs"],
        embedder.image_size,
        folder=options["images"],
        missing="skip" if options["skip_missing"] else "refuse",
        folds=options["folds"],
        fit=options["fit"],
    )
    for pairs in sets:
        terminal.write(pairs.summary)
        for doubt in pairs.warnings:
            terminal.write(f"WARNING {pairs.name}: {doubt}")
    results = {str(pairs.path): verify_set(embedder, pairs, options["batch"], options["fit"]) for pairs in sets}
    Console().print(_table(model, list(results.values())))
    if as_json:
        first = next(iter(results.values()))
        click.echo(json.dumps(first if len(results) == 1 else {**first, "sets": results}))


def _reading(options: dict[str, Any]) -> "OnnxOptions":
    from recognition.deploy.onnx_embedder import OnnxOptions

    return OnnxOptions(
        options["size"], options["output"], options["mean"] or None, options["std"] or None, options["bgr"]
    )


def load_embedder(model: Path, reading: "OnnxOptions") -> "Embedder":
    """Return the embedder of an ONNX file, or of a run folder: its `model.onnx`, else its newest checkpoint."""
    from recognition.deploy.onnx_embedder import OnnxEmbedder, OnnxOptions
    from recognition.errors import UserError

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


def verify_set(embedder: "Embedder", pairs: "PairSet", batch: int, fit: str = "resize") -> dict[str, Any]:
    """Return the verification numbers of one set, its name, doubts about it, and the seconds that it took."""
    import numpy as np

    from recognition.errors import UserError
    from recognition.evaluation.verification import embed_pairs, verify
    from recognition.tracking import progress

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


def _table(model: Path, results: list[dict[str, Any]]) -> "Table":
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from recognition.evaluation.verification import FARS
    from recognition.tracking import terminal

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
