"""The command line of `recognition train`: a configuration, and `section.key=value` overrides."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from recognition.config.base import ConfigError

logger = logging.getLogger(__name__)

_OVERRIDE = re.compile(r"\s*[\w.\-]+\s*=")
_OPTION = re.compile(r"--?(?P<key>\w[\w-]*\.[\w.-]+)(?:=(?P<value>.*))?", re.DOTALL)


def command_line(arguments: Sequence[str], default: Path) -> tuple[Path, list[str]]:
    """Read the arguments `[CONFIG] [section.key=value ...]`; returns the configuration's path and the overrides.

    A path may hold a `=` where something else than a key stands before it. Raises ConfigError, which lists every
    argument that is neither.
    """
    path, rest = default, list(arguments)
    if rest and not _OVERRIDE.match(rest[0]) and not rest[0].startswith("-"):
        path = Path(rest.pop(0))
    mistakes = []
    for place, argument in enumerate(rest):
        if not _OVERRIDE.match(argument) or argument.startswith("-"):
            mistakes.append(_mistake(argument, rest[place + 1 : place + 3]))
    if mistakes:
        raise ConfigError(
            "\n  ".join(["the command line is recognition train [CONFIG] [section.key=value ...]", *mistakes])
        )
    _say_repeated(rest)
    return path, rest


def _mistake(argument: str, after: Sequence[str]) -> str:
    option = _OPTION.fullmatch(argument)
    if option is not None:
        value = option["value"]
        if value is None:
            value = after[0] if after and not after[0].startswith("-") else "..."
        return f"{argument}: write {option['key'].replace('-', '_')}={value}, without dashes before it"
    if argument.startswith("-"):
        return f"{argument}: no option of this program; settings are written section.key=value"
    if after and after[0] == "=":
        return f"{argument}: write {argument}={''.join(after[1:])}, without blanks around the ="
    if argument == "=":
        return "=: stands alone; write section.key=value, without blanks around the ="
    return f"{argument}: not section.key=value; the configuration's file comes first, and there is one"


def _say_repeated(overrides: Sequence[str]) -> None:
    keys = Counter(override.partition("=")[0].strip() for override in overrides)
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("given more than once, the last holds: %s", ", ".join(repeated))
