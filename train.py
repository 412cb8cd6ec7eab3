"""Train: `torchrun --nproc_per_node=N train.py [CONFIG] [section.key=value ...]`, or `python train.py` for one process.

CONFIG is a TOML file, configs/demo.toml if none is given. The same command continues a run that was interrupted.
`srun` and `mpirun` start processes as torchrun does.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 (as of SLURM's --signal=USR1@120) leave a checkpoint and end the run with status
130. torchrun hands them on to its processes; SIGUSR1 it does with
--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 alone.
"""

import sys
from pathlib import Path

from recognition.cli import program

DEMO = Path(__file__).parent / "configs" / "demo.toml"


def main(arguments: list[str] | None = None) -> int:
    """Run, and return the exit status: 0 complete, 2 the user's mistake, 130 interrupted with a checkpoint."""
    return program.run(lambda: _train(sys.argv[1:] if arguments is None else list(arguments)))


def _train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__)
        return 0
    with program.imports():
        from recognition import config
        from recognition.tracking import progress
    path, overrides = config.command_line(arguments, DEMO)
    settings = config.load(path, overrides)
    # A mistake in the settings shows before the seconds that torch takes.
    with program.imports(), progress.task("starting: loading torch", after=0):
        from recognition.training.trainer import train

    return 0 if train(settings) else program.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
