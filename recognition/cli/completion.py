"""`recognition completion`."""

import click
from click.shell_completion import get_completion_class

from recognition.cli.command import command

VARIABLE = "_RECOGNITION_COMPLETE"
"""Variable of the environment by which a shell asks for completions."""


@command("completion", examples='eval "$(recognition completion bash)"')
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script for completion in a shell.

    It lets the shell complete subcommands, options and files.
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(click.get_current_context().find_root().command, {}, "recognition", VARIABLE).source())
