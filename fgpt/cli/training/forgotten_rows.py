"""Rows that a training is to forget: their examples keep their places and lose their weight; and the manifest of what
was forgotten.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fgpt.cli import run_dir
from fgpt.cli.console import console
from fgpt.data.example_store import StoredExamples
from fgpt.data.examples import Example
from fgpt.errors import InputError
from fgpt.io.files import read_json, write_json
from fgpt.io.models import CARD

MANIFEST = "forget.json"


def forget_rows(examples: StoredExamples, source: str, forgotten: Sequence[Example]) -> StoredExamples:
    """The examples, with weight 0 where one has the tokens of a forgotten one. How many is printed.

    Args:
        examples: What is trained on.
        source: The name of the source of the rows to forget.
        forgotten: The examples of these rows.

    Raises InputError if one of them is not trained on: the model is then none that forgot it.
    """
    wanted_rows = {_content(example): number for number, example in reversed([*enumerate(forgotten, 1)])}
    lengths = {len(example.tokens) for example in forgotten}
    indices: list[int] = []
    seen_rows = set[int]()
    for index in np.flatnonzero(np.isin(examples.lengths, [*lengths])).tolist():
        number = wanted_rows.get(_content(examples[index]))
        if number is not None:
            indices.append(index)
            seen_rows.add(number)
    if missing := sorted({*wanted_rows.values()} - seen_rows):
        raise InputError(
            f"--forget {source}: {len(missing)} of its {len(wanted_rows)} examples are not trained on, the first is "
            f"example {missing[0]}: expected rows of the data, and none that are held out"
        )
    result = examples.without_weight(np.array(indices))
    console.print(
        f"forgetting {len(indices):,} of {len(examples):,} examples: their weight is 0", markup=False, soft_wrap=True
    )
    return result


def _content(example: Example) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    return tuple(example.tokens), tuple((start, end) for start, end, _ in example.spans)


def hashes_of_trained(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of what a run has trained."""
    trained = [folder / name for name in (run_dir.ADAPTER, run_dir.MODEL) if (folder / name).is_dir()]
    files = sorted(path for at in trained for path in at.rglob("*") if path.is_file() and path.name != CARD)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finish_manifest(folder: Path) -> None:
    """Write the hashes of what a run has trained into its manifest, if it was made to forget rows."""
    path = folder / MANIFEST
    if path.is_file():
        write_json(path, read_json(path) | {"after": hashes_of_trained(folder)})
        console.print(f"{path} has the hashes of what was trained before and after", markup=False, soft_wrap=True)
