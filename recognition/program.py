"""How train.py and the tools end: what is said of an error, and the exit status."""

import sys
from collections.abc import Callable

from recognition.config import UserError

MISTAKE, INTERRUPTED = 2, 130


def run(main: Callable[[], int]) -> int:
    """Call `main` and return its exit status: 2 for a mistake of the user's, which is told, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be bytes that are no text
    try:
        return main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
