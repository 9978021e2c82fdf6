"""``python -m delfast``: the command ``delfast``, of this Python environment."""

import sys

from delfast.cli import main

if __name__ == "__main__":  # the workers of a grid import this file too
    sys.exit(main(sys.argv[1:]))
