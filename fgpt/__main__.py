"""The command `fgpt`, and `python -m fgpt`."""

import sys

from fgpt.errors import InputError
from fgpt.extras import require_extra

PACKAGES = (
    "docstring_parser",
    "filelock",
    "matplotlib",
    "rich",
    "rouge_score",
    "shtab",
    "sklearn",
    "tensorboard",
    "tyro",
    "xxhash",
    "yaml",
)
"""What `fgpt.cli` imports and `import fgpt` does not."""


def main() -> int:
    """Run the command line. Returns its exit code: 2 if its packages are not installed."""
    try:
        require_extra("cli", "the commands of fgpt", *PACKAGES)
    except InputError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    from fgpt.cli.main import main as run  # here, because it imports them

    return run()


if __name__ == "__main__":
    sys.exit(main())
