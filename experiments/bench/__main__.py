"""The benchmarks' command line: `python -m experiments.bench train --help`."""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from experiments.bench.adapters import Bench, adapters
from experiments.bench.decode import Decode, decode
from experiments.bench.formats import Formats, formats
from experiments.bench.likelihood import Likelihood, likelihood
from experiments.bench.load import Load, loading
from experiments.bench.processes import Processes, processes
from experiments.bench.retrieval import Retrieval, retrieval
from experiments.bench.sweep import Sweep, sweep
from experiments.bench.train import Train, train
from fgpt.errors import InputError

RUN: dict[type, Callable[[Any], None]] = {
    Train: train,
    Bench: adapters,
    Load: loading,
    Decode: decode,
    Likelihood: likelihood,
    Sweep: sweep,
    Formats: formats,
    Processes: processes,
    Retrieval: retrieval,
}

if __name__ == "__main__":
    try:
        defaults: dict[str, Any] = {
            "train": Train(),
            "adapters": Bench(),
            "load": Load(),
            "decode": Decode(),
            "likelihood": Likelihood(),
            "sweep": Sweep(),
            "formats": Formats(calibration=tyro.MISSING, evaluation=tyro.MISSING),
            "processes": Processes(),
            "retrieval": Retrieval(documents=tyro.MISSING, filler=tyro.MISSING),
        }
        chosen = tyro.cli(tyro.extras.subcommand_type_from_defaults(defaults))
        RUN[type(chosen)](chosen)
    except InputError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
