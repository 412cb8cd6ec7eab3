"""`recognition gpu-check`."""

import os
import sys
from pathlib import Path

import click

from recognition.cli.argument_types import PATH
from recognition.cli.command import command

EXAMPLES = """
recognition gpu-check
GPU_CHECK_SECONDS=300 recognition gpu-check results
"""


@command("gpu-check", examples=EXAMPLES)
@click.argument("folder", type=PATH, default="runs/gpu_check", metavar="[FOLDER]")
def gpu_check(folder: Path) -> int:
    """Run the tests and benchmarks of one GPU, in 10 minutes.

    FOLDER/results.jsonl gets a JSON object for each part, with the machine it was measured on, and FOLDER/NAME.txt what
    the part printed. A part is skipped, with a reason, where the machine lacks something, and once the time is used up:
    GPU_CHECK_SECONDS, 570 if it is not set. PYTHON names another interpreter for the parts. The last lines are a
    table; the exit status is 1 where a part failed.
    """
    from recognition.benchmarks.gpu_check import check
    from recognition.errors import UserError
    from recognition.files.outputs import check_output

    check_output(folder, kind="folder")
    seconds = os.environ.get("GPU_CHECK_SECONDS", "570")
    if not seconds.isdecimal():
        raise UserError(f"GPU_CHECK_SECONDS is {seconds}: give a whole number of seconds")
    python = os.environ.get("PYTHON") or sys.executable
    return check(folder, python=python, seconds=int(seconds), echo=click.echo)
