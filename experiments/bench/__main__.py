"""The benchmarks' command line: `python -m experiments.bench train --help`."""

import sys

import tyro

from experiments.bench.adapters import Bench, adapters
from experiments.bench.train import Train, train
from fgpt.errors import InputError

if __name__ == "__main__":
    try:
        chosen = tyro.cli(tyro.extras.subcommand_type_from_defaults({"train": Train(), "adapters": Bench()}))
        train(chosen) if isinstance(chosen, Train) else adapters(chosen)
    except InputError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
