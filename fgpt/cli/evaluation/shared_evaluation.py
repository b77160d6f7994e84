"""An evaluation whose batches several processes share: all of them must evaluate the same model on the same rows."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fgpt.cli import processes
from fgpt.cli.training.hashes import fast_hash, model_hash
from fgpt.cli.training.shared_update import describe_program
from fgpt.model import GPT

PLACES = frozenset({"run", "base", "out", "outputs", "text", "test", "include_path"})
"""Options that name files: their content counts."""


def check_shared_evaluation(options: Any, params: GPT, inputs: Mapping[str, Any]) -> None:
    """Raises InputError unless all processes have the same code, options, model and rows.

    Args:
        options: A dataclass of the command's options.
        params: The evaluated model, its adapter included.
        inputs: What it is evaluated on, by name, as `fast_hash` takes it.
    """

    def describe() -> dict[str, str]:
        names = [field.name for field in fields(options) if field.name not in PLACES]
        values = {name: str(getattr(options, name)) for name in names}
        hashes = {name: fast_hash(value) for name, value in inputs.items()}
        return describe_program() | values | {"model": model_hash(params)} | hashes

    processes.check_alike(describe)
