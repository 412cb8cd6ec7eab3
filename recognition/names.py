"""Names as a file system has them, which are bytes, in messages: on one line, and nothing that a terminal obeys."""

import os

_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def shown(name: str | os.PathLike[str]) -> str:
    """A name or path for a message: as it is, or, where a part of it could not be seen, as bash's $'...'.

    Bytes that are no text, line ends, other control characters, and blanks at an end are escaped; bash takes what is
    shown for the same name.
    """
    text = os.fspath(name)
    if text.isprintable() and text == text.strip():
        return text
    return f"$'{''.join(map(_escaped, text))}'"


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if character.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
