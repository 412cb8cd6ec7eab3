"""`recognition export`."""

from pathlib import Path

import click

from recognition.cli.argument_types import PATH
from recognition.cli.command import command


@command("export", examples="recognition export runs/demo --output model.onnx")
@click.argument("run", type=PATH, metavar="RUN")
@click.option("--output", type=PATH, required=True, metavar="FILE", help="ONNX file to write.")
@click.option(
    "--which", type=click.Choice(["last", "best"]), default="last", help="Newest checkpoint, or the best verified one."
)
@click.option("--opset", type=int, metavar="N", help="ONNX operator set, in place of the run's export.opset.")
def export(run: Path, output: Path, which: str, opset: int | None) -> None:
    """Export the backbone of a run to one ONNX file.

    RUN is the folder of a run. ONNX Runtime has to embed images as the backbone does, or the export fails. A card of
    facts, FILE with the suffix .json, is written beside the file.
    """
    from pydantic import ValidationError

    from recognition.errors import UserError
    from recognition.files.outputs import check_output
    from recognition.tracking import progress

    with progress.task("loading torch", after=0):
        from recognition import config
        from recognition.deploy.export import card_path, export_onnx
        from recognition.runs.folder import RunFolder, load_backbone

    output = check_output(output, kind="file", inputs=[run])
    check_output(card_path(output), kind="file")
    with progress.task(f"reading {run}"):
        backbone, facts = load_backbone(run, "best" if which == "best" else "last")
    settings = RunFolder(run).read_config().export
    if opset is not None:
        try:
            settings = config.Export(**settings.model_dump() | {"opset": opset})
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise UserError(f"--opset: {message[0].lower()}{message[1:]}, not {opset}") from None
    parity = export_onnx(backbone, output, facts, settings)
    megabytes = output.stat().st_size / 1e6
    click.echo(f"{output}: {megabytes:.1f} MB, {backbone.image_size} px, {backbone.embedding_size} values")
    click.echo(
        "ONNX Runtime against the backbone, batches of 1 and 5: "
        f"max relative difference {parity.max_difference:.2e}, min cosine {parity.min_cosine:.7f}"
    )
