"""The program `recognition`, and doors to its subcommands."""

import os
import sys
from collections.abc import Sequence
from typing import Protocol

import recognition as package
from recognition.cli import program
from recognition.errors import UserError

with program.imports():
    import click
    from click.shell_completion import shell_complete

    from recognition.cli.benchmark_data import benchmark_data
    from recognition.cli.benchmark_head import benchmark_head
    from recognition.cli.benchmark_training import benchmark_training
    from recognition.cli.command import SETTINGS, Group, described
    from recognition.cli.completion import VARIABLE, completion
    from recognition.cli.convert import convert
    from recognition.cli.demo import demo
    from recognition.cli.doctor import doctor
    from recognition.cli.evaluate import evaluate
    from recognition.cli.export import export
    from recognition.cli.faces import faces
    from recognition.cli.gpu_check import gpu_check
    from recognition.cli.index import index
    from recognition.cli.plan import plan
    from recognition.cli.settings import settings, show_recipes
    from recognition.cli.train import train
    from recognition.cli.tune import tune


class Main(Protocol):
    """Runs a program with arguments, those of the command line by default; returns the exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run."""


_STATUSES = "\n".join(f"{status:>3}  {meaning}" for status, meaning in program.STATUSES.items())


@click.group("recognition", cls=Group, context_settings=SETTINGS, epilog=f"\b\nExit status:\n{_STATUSES}")
@click.version_option(package.__version__, prog_name="recognition", message="%(prog)s %(version)s")
def recognition() -> None:
    """Train face recognition at any number of identities.

    `recognition SUBCOMMAND --help` explains a subcommand and has an example.
    """


@click.group("benchmark", cls=Group, context_settings=SETTINGS)
def benchmark() -> None:
    """Measure the head, training, or the data pipeline."""


for _each in (benchmark_head, benchmark_training, benchmark_data):
    benchmark.add_command(_each)
for _command in (train, index, faces, evaluate, export, plan, doctor, benchmark, tune, gpu_check):
    recognition.add_command(_command)
for _command in (settings, show_recipes, convert, demo, completion):
    recognition.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program as the command line says; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return program.run(lambda: _invoke(given))


def door(name: str) -> Main:
    """Return the `main` of a script that is one subcommand, such as `index` or `benchmark head`."""

    def through(arguments: Sequence[str] | None = None) -> int:
        return main([*name.split(), *(sys.argv[1:] if arguments is None else arguments)])

    return through


def _invoke(arguments: list[str]) -> int:
    if VARIABLE in os.environ:
        return shell_complete(recognition, {}, "recognition", VARIABLE, os.environ[VARIABLE])
    try:
        with recognition.make_context("recognition", arguments) as context:
            return recognition.invoke(context) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return program.MISTAKE
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise UserError(described(error)) from None


if __name__ == "__main__":
    sys.exit(main())
