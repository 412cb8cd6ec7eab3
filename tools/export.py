"""Export a run's backbone to one ONNX file, checked against the backbone by ONNX Runtime."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recognition.cli import program

with program.imports():
    from recognition import config
    from recognition.cli.argument_types import path
    from recognition.deploy.export import card_path, export_onnx
    from recognition.files.outputs import check_output
    from recognition.runs.folder import load_backbone


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit status."""
    return program.run(lambda: _main(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the ONNX file to write")
    parser.add_argument("--which", choices=("last", "best"), default="last", help="newest checkpoint, or best verified")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX operator set, in place of the run's export.opset")
    return parser


def _main(options: argparse.Namespace) -> int:
    output = check_output(options.output, kind="file", inputs=[options.run])
    check_output(card_path(output), kind="file")
    backbone, facts = load_backbone(options.run, options.which)
    changes = [] if options.opset is None else [f"export.opset={options.opset}"]
    settings = config.load(options.run / "config.toml", changes, check_paths=False).export
    parity = export_onnx(backbone, output, facts, settings)
    megabytes = output.stat().st_size / 1e6
    print(f"{output}: {megabytes:.1f} MB, {backbone.image_size} px, {backbone.embedding_size} values")
    print(
        "ONNX Runtime against the backbone, batches of 1 and 5: "
        f"max relative difference {parity.max_difference:.2e}, min cosine {parity.min_cosine:.7f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
