"""Where the commands speak: stderr, so that answers alone go to stdout."""

from rich.console import Console

console = Console(stderr=True, highlight=False)
