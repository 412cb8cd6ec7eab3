"""Verify a model on pairs of faces: 10-fold accuracy and TAR@FAR of each set."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition import program

with program.imports():
    import numpy as np
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from recognition.argument_types import path, positive
    from recognition.deploy.embedder import OnnxEmbedder
    from recognition.evaluation.embedder import Embedder
    from recognition.evaluation.pairs import PairSet, read_pairs
    from recognition.evaluation.verification import FARS, embed_pairs, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=path, required=True, help="an ONNX file, or the folder of a run")
    parser.add_argument("--pairs", type=path, nargs="+", required=True, help="InsightFace .bin or LFW pairs.txt files")
    parser.add_argument("--images", type=path, help="image folder of pairs.txt files (default: looked for beside them)")
    parser.add_argument("--batch", type=positive, default=64, help="images per forward pass (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _main(options: argparse.Namespace) -> int:
    sets = [read_pairs(path, options.images) for path in options.pairs]
    embedder = load_embedder(options.model)
    results = {str(pairs.path): evaluate(embedder, pairs, options.batch) for pairs in sets}
    Console().print(_table(options.model, list(results.values())))
    if options.json:
        first = next(iter(results.values()))
        print(json.dumps(first if len(results) == 1 else {**first, "sets": results}))
    return 0


def load_embedder(model: Path) -> Embedder:
    """The embedder of an ONNX file, or of a run folder: its `model.onnx`, else its newest checkpoint."""
    if not model.is_dir():
        return OnnxEmbedder(model)
    if (model / "model.onnx").is_file():
        return OnnxEmbedder(model / "model.onnx")
    import torch

    from recognition.models.backbone import BackboneEmbedder
    from recognition.run_folder import load_backbone

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, _ = load_backbone(model)
    return BackboneEmbedder(backbone.to(device), device, float32=True)


def evaluate(embedder: Embedder, pairs: PairSet, batch: int) -> dict[str, Any]:
    """The verification numbers of one set, its name, and the seconds that they took."""
    start = time.perf_counter()
    console = Console(stderr=True)
    starts = range(0, 2 * len(pairs), batch)
    parts = [
        embed_pairs(embedder, pairs, batch, range(first, min(first + batch, 2 * len(pairs))))
        for first in track(starts, pairs.name, console=console, transient=True, disable=not console.is_terminal)
    ]
    result = verify(np.concatenate(parts), pairs.same).to_json()
    return {"name": pairs.name, **result, "seconds": round(time.perf_counter() - start, 3)}


def _table(model: Path, results: list[dict[str, Any]]) -> Table:
    table = Table("", title=str(model), title_justify="left", box=SIMPLE)
    for result in results:
        table.add_column(result["name"], justify="right")
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
