"""`recognition train`."""

from pathlib import Path

import click

from recognition.cli import program
from recognition.cli.command import command

EXAMPLES = """
recognition train demo
recognition train my.toml training.epochs=3 'evaluation.pairs=["lfw.bin"]'
torchrun --nproc_per_node=8 --no-python recognition train ms1mv3_r50 \\
    data.path=/data/ms1m-retinaface-t1 run.folder=runs/ms1mv3_r50
"""


@command("train", examples=EXAMPLES, context_settings={"ignore_unknown_options": True})
@click.option("--settings", "wants_settings", is_flag=True, help="Print all settings with their meaning, and end.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG] [SECTION.KEY=VALUE]...")
def train(wants_settings: bool, arguments: tuple[str, ...]) -> int:
    """Train a backbone and its head.

    CONFIG is a file of settings in TOML, or the name of a recipe that comes with the program (recognition recipes);
    without one, it is the recipe demo. SECTION.KEY=VALUE changes a setting; the value is TOML's, or a text without
    quotes. `recognition settings` lists all settings, `recognition settings training.epochs` explains one.

    One process trains unless torchrun, srun or mpirun starts more. The same command continues a run that was
    interrupted, on any number of processes.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 (as of SLURM's --signal=USR1@120) leave a checkpoint and end the run with
    status 130. torchrun hands them on to its processes, SIGUSR1 only with

    \b
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    """
    from recognition import config
    from recognition.config import recipes
    from recognition.tracking import progress

    if wants_settings:
        from recognition.config import reference

        click.echo(reference.markdown().rstrip("\n"))
        return 0
    path, overrides = config.command_line(arguments, Path("demo"))
    settings = config.load(recipes.find(path), overrides)
    # Only now, so that mistakes in the settings show before the seconds that importing torch takes.
    with progress.task("starting: loading torch", after=0):
        from recognition.training import trainer

    return 0 if trainer.train(settings) else program.INTERRUPTED
