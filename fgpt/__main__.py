"""`python -m fgpt`, which is the command `fgpt`."""

import sys

from fgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
