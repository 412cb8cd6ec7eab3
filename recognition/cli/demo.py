"""`recognition demo`."""

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from recognition.cli.command import command

if TYPE_CHECKING:
    from rich.table import Table

    from recognition import config
    from recognition.evaluation.embedder import Embedder
    from recognition.evaluation.verification import Verification


@command("demo", examples="recognition demo\nrecognition demo training.epochs=1 run.folder=/tmp/demo")
@click.option("--started", type=float, metavar="X", hidden=True, help="When the clock started, in epoch seconds.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def demo(started: float | None, overrides: tuple[str, ...]) -> int:
    """Train on procedural faces, from rendering to evaluation.

    Renders faces, trains on 2 processes, verifies, exports, and evaluates the ONNX file. SECTION.KEY=VALUE changes a
    setting of the recipe demo.
    """
    began = time.time() if started is None else started
    from rich.console import Console

    from recognition import config
    from recognition.config import recipes
    from recognition.errors import UserError
    from recognition.files.atomic import write_text
    from recognition.files.paths import runnable
    from recognition.tracking import progress

    console = Console()
    recipe = recipes.folder() / "demo.toml"
    settings = config.load(recipe, overrides)
    faces = settings.faces
    if faces is None:
        raise UserError(f"{recipe} has no [faces] section to render from")
    with progress.task("loading torch"):
        from recognition.data.procedural.dataset import write_faces
        from recognition.deploy.onnx_embedder import OnnxEmbedder
        from recognition.models.backbone import BackboneEmbedder
        from recognition.runs.folder import RunFolder, load_backbone

    console.rule("faces")
    write_faces(settings.data.path, **faces.model_dump())
    console.rule("training on 2 processes")
    start = time.time()
    status = _train([str(recipe), *overrides])
    if status:
        console.print(f"error: the training stopped with status {status}", style="red")
        return status
    train_seconds = time.time() - start
    console.rule("verification")
    run = RunFolder(settings.run.folder)
    backbone, facts = load_backbone(run.path)
    results = [
        _verify("checkpoint", BackboneEmbedder(backbone, float32=True), settings),
        _verify("ONNX file", OnnxEmbedder(run.model), settings),
    ]
    summary = {
        "accuracy": results[0].accuracy,
        "onnx_accuracy": results[1].accuracy,
        "pairs": results[0].pairs,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.time() - began, 1),
    }
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(_table(results, facts, summary))
    console.print(f"{run.model}, {run.path / 'summary.json'}", soft_wrap=True)
    console.print(f"curves: {runnable('tensorboard')} --logdir {run.path}", soft_wrap=True)
    return 0


def _train(arguments: list[str]) -> int:
    """Run torchrun on two processes; returns its exit status."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "recognition.cli.main", "train", *arguments]
    # torchrun warns at length where the number of threads is not said; the run sets it for itself.
    return subprocess.run([*launcher, *program], check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


def _verify(name: str, embedder: "Embedder", settings: "config.Config") -> "Verification":
    import numpy as np

    from recognition.evaluation.pairs import read_pairs
    from recognition.evaluation.verification import embed_pairs, verify
    from recognition.tracking import progress

    pairs = read_pairs(settings.evaluation.pairs[0])
    images, batch, parts = 2 * len(pairs), settings.evaluation.batch_per_rank, []
    with progress.task(f"verifying the {name}", images) as advance:
        for first in range(0, images, batch):
            part = range(first, min(first + batch, images))
            parts.append(embed_pairs(embedder, pairs, batch, part, fit=settings.data.fit))
            advance(part.stop)
    return verify(np.concatenate(parts), pairs.same)


def _table(results: "list[Verification]", facts: dict[str, Any], summary: dict[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title="Faces of identities that were never trained on")
    for column in ("", "accuracy", "threshold", "TAR@FAR=1e-2", "pairs"):
        table.add_column(column)
    for name, result in zip(("checkpoint", "model.onnx"), results, strict=True):
        tar = result.tar_at_far["1e-2"]
        table.add_row(
            name,
            f"{result.accuracy:.2%} ± {result.accuracy_std:.2%}",
            f"{result.threshold:.2f}",
            "n/a" if tar is None else f"{tar:.2%}",
            str(result.pairs),
        )
    table.caption = (
        f"{facts['identities']} identities, {facts['images']} images, {facts['step']} steps; "
        f"training {summary['train_seconds']:.0f} s, all {summary['total_seconds']:.0f} s"
    )
    return table
