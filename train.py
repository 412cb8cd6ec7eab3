"""Train: `torchrun --nproc_per_node=N train.py [CONFIG] [section.key=value ...]`, or `python train.py` for one process.

CONFIG is a TOML file, configs/demo.toml if none is given. The same command continues a run that was interrupted.
"""

import os
import sys
from pathlib import Path

from recognition import config, progress

DEMO = Path(__file__).parent / "configs" / "demo.toml"
INTERRUPTED = 130


def main(arguments: list[str]) -> int:
    """Run, and return the exit status: 0 complete, 2 the user's mistake, 130 interrupted with a checkpoint."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__)
        return 0
    path = DEMO if not arguments or "=" in arguments[0] else Path(arguments.pop(0))
    try:
        settings = config.load(path, arguments)
        # A mistake in the settings shows before the seconds that torch takes.
        with progress.working("starting", after=0):
            from recognition.trainer import train

        return 0 if train(settings) else INTERRUPTED
    except config.UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
