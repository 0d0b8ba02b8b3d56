"""``python -m adacomcat``: the command line, also under torchrun."""

import sys

from adacomcat.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
