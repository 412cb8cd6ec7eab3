"""The whole way once: render faces, train on two processes, verify, export, evaluate the ONNX file; print a table."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from recognition import config
    from recognition.data.procedural.dataset import write_faces
    from recognition.deploy.onnx_embedder import OnnxEmbedder
    from recognition.errors import UserError
    from recognition.evaluation.embedder import Embedder
    from recognition.evaluation.pairs import read_pairs
    from recognition.evaluation.verification import Verification, embed_pairs, verify
    from recognition.files.atomic import write_text
    from recognition.models.backbone import BackboneEmbedder
    from recognition.runs.folder import RunFolder, load_backbone
    from recognition.tracking import progress

REPOSITORY = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Demonstrate as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, default=time.time(), help="when the clock started, in epoch seconds")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to configs/demo.toml")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    console = Console()
    try:
        settings = config.load(REPOSITORY / "configs" / "demo.toml", arguments.overrides)
        faces = settings.faces
        if faces is None:
            raise UserError("configs/demo.toml has no [faces] section to render from")
        console.rule("faces")
        write_faces(settings.data.path, **faces.model_dump())
        console.rule("training on 2 processes")
        train_seconds = _train(arguments.overrides)
        console.rule("verification")
        run = RunFolder(settings.run.folder)
        backbone, facts = load_backbone(run.path)
        results = [
            _verify("checkpoint", BackboneEmbedder(backbone, float32=True), settings),
            _verify("ONNX file", OnnxEmbedder(run.model), settings),
        ]
    except subprocess.CalledProcessError as error:
        console.print(f"error: the training stopped with status {error.returncode}", style="red")
        return error.returncode
    summary = {
        "accuracy": results[0].accuracy,
        "onnx_accuracy": results[1].accuracy,
        "pairs": results[0].pairs,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.time() - arguments.started, 1),
    }
    write_text(run.path / "summary.json", json.dumps(summary, indent=2) + "\n")
    console.print(_table(results, facts, summary))
    console.print(f"{run.model}, {run.path / 'summary.json'}; curves: tensorboard --logdir {run.path}")
    return 0


def _train(overrides: list[str]) -> float:
    """Run torchrun on two processes; returns its seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [str(REPOSITORY / "train.py"), str(REPOSITORY / "configs" / "demo.toml"), *overrides]
    started = time.time()
    # torchrun warns at length where the number of threads is not said; the run sets it for itself.
    subprocess.run([*command, *program], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return time.time() - started


def _verify(name: str, embedder: Embedder, settings: config.Config) -> Verification:
    pairs = read_pairs(settings.evaluation.pairs[0])
    images, batch, parts = 2 * len(pairs), settings.evaluation.batch_per_rank, []
    with progress.task(f"verifying the {name}", images) as advance:
        for first in range(0, images, batch):
            part = range(first, min(first + batch, images))
            parts.append(embed_pairs(embedder, pairs, batch, part, fit=settings.data.fit))
            advance(part.stop)
    return verify(np.concatenate(parts), pairs.same)


def _table(results: list[Verification], facts: dict, summary: dict) -> Table:
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


if __name__ == "__main__":
    sys.exit(main())
