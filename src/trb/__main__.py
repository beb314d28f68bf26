"""`python -m trb` is the command `trb`."""

import sys

from trb.cli import main

if __name__ == "__main__":
    sys.exit(main())
