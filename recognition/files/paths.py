"""Paths as users write them, and as messages show them: on one line, without control characters."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from recognition.errors import UserError

_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def shown(name: str | os.PathLike[str]) -> str:
    """Format a name or path for a message: as it is, or, where a part of it would not be visible, as bash's $'...'.

    Bytes that are no text, line ends, other control characters, and blanks at an end are escaped; bash takes what is
    shown for the same name.
    """
    text = os.fspath(name)
    if text.isprintable() and text == text.strip():
        return text
    return f"$'{''.join(map(_escaped, text))}'"


def runnable(program: str) -> str:
    """Return how a shell starts a program: by its name, or by its path beside this Python if it is not on the PATH."""
    beside = Path(sys.executable).with_name(program)
    return program if shutil.which(program) or not beside.exists() else shlex.quote(str(beside))


def expanded(path: Path) -> Path:
    """Put the home folder in the place of `~`, which shells leave alone behind a `=`. Raises UserError."""
    text = str(path)
    odd = next((character for character in text if character < " " and character != "\t"), None)
    if odd is not None:
        raise UserError(
            f"a path cannot hold the character {odd!r} here: {text!r}; rename it, or link it under another name. Where "
            "a \\ was meant, put the text in single quotes"
        )
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"no home folder is known for {path.parts[0]}: write {text} out") from None


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
