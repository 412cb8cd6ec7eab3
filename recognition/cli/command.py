"""The one style of all subcommands: examples in `--help`, options that take several values, and messages."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from recognition import config

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "show_default": True}


class Command(click.Command):
    """A subcommand with examples, each a line of a shell; a line that ends in a backslash goes on in the next."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples.strip()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they stand."""
        if self.examples:
            with formatter.section("Examples" if "\n" in self.examples.replace("\\\n", "") else "Example"):
                for line in self.examples.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.rstrip()}\n")
        super().format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments, those of options with several values among them."""
        flags = {flag for param in self.params if isinstance(param, Several) for flag in param.opts}
        return super().parse_args(ctx, list(_repeated(args, flags)))


class Group(click.Group):
    """A program with subcommands, listed in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the subcommands."""
        return list(self.commands)


class Several(click.Option):
    """An option that takes one value or more: `--pairs a b`, or `--pairs a --pairs b`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"multiple": True}))


def command(name: str, *, examples: str, **attributes: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a subcommand; its docstring is the help, and what it returns the exit status (None: 0)."""
    settings = SETTINGS | attributes.pop("context_settings", {})
    return click.command(name, cls=Command, examples=examples, context_settings=settings, **attributes)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--json` to a subcommand."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")(function)


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device` to a subcommand."""
    choices = click.Choice(["cpu", "cuda"])
    return click.option("--device", type=choices, default="cpu", help="Where to measure.")(function)


def row_format_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--row-format` to a subcommand."""
    choices = click.Choice(["float32", "split", "bfloat16"])
    names = "--row-format", "--state", "row_format"
    return click.option(*names, type=choices, default="float32", help="How class weights are stored.")(function)


def check_cuda(device: str) -> None:
    """Raise UserError if `device` is cuda and this machine has none."""
    import torch

    from recognition.errors import UserError

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no CUDA device")


def head_settings(options: dict[str, Any]) -> "config.Head":
    """Return settings of the head made of a subcommand's options. Raises UserError that names the wrong ones."""
    from pydantic import ValidationError

    from recognition import config
    from recognition.errors import UserError

    try:
        return config.Head.model_validate(options)
    except ValidationError as error:
        mistakes = [f"--{str(item['loc'][0]).replace('_', '-')}: {item['msg']}" for item in error.errors()]
        raise UserError("; ".join(mistakes)) from None


def described(error: click.ClickException) -> str:
    """Say what is wrong with a command line, and where to look."""
    ctx = getattr(error, "ctx", None)
    if isinstance(error, click.MissingParameter) and error.param is not None:
        said = f"{_name(error.param, ctx)} is missing"
    elif isinstance(error, click.BadParameter) and error.param is not None:
        said = f"{_name(error.param, ctx)}: {error.message.rstrip('.')}"
    elif isinstance(error, click.NoSuchOption | click.NoSuchCommand):
        kind = "option" if isinstance(error, click.NoSuchOption) else "subcommand"
        name = error.option_name if isinstance(error, click.NoSuchOption) else error.command_name
        said = f"there is no {kind} {name}"
        if error.possibilities:
            said += f"; did you mean {' or '.join(error.possibilities)}?"
    else:
        said = error.format_message().rstrip(".")
        said = said[:1].lower() + said[1:]
    return said if ctx is None else f"{said}\nSee {ctx.command_path} --help"


def _name(param: click.Parameter, ctx: click.Context | None) -> str:
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return param.make_metavar(ctx) if ctx is not None else str(param.name)


def _repeated(args: Sequence[str], flags: set[str]) -> Iterator[str]:
    """Write `--pairs a b` as `--pairs a --pairs b` for each of the flags; numbers below zero are values too."""
    rest = iter(args)
    flag = None
    for argument in rest:
        if argument == "--":
            yield from (argument, *rest)
        elif argument.partition("=")[0] in flags:
            flag = argument.partition("=")[0]
            yield argument
            if argument == flag:
                # Its first value, whatever it is.
                yield from (value for value in [next(rest, None)] if value is not None)
        elif flag is not None and (not argument.startswith("-") or _is_number(argument)):
            yield from (flag, argument)
        else:
            flag = None
            yield argument


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
