"""`recognition train`, from a clone that is not installed: `torchrun --nproc_per_node=N train.py [CONFIG] [...]`."""

import sys

from recognition.cli.main import door

main = door("train")

if __name__ == "__main__":
    sys.exit(main())
