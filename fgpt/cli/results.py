"""Names of result files, so that results of other settings do not overwrite each other.

compare.json               with the run's own settings, as after training
compare-3-prompts.json     with other settings, which the name tells
compare-3-prompts-2.json   if that name is taken by yet other settings
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.run_dir import METRICS
from fgpt.cli.training.hashes import content_hash
from fgpt.errors import InputError
from fgpt.io.files import read_json

SETTINGS = "settings"
"""The entry of a result's JSON file with the settings it was made with."""

LONGEST = 40
"""Characters of a name_part."""


def name_part(text: str | Path) -> str:
    """A text as part of a file name: letters, digits and dots, anything else as dashes."""
    return re.sub(r"[^\w.]+", "-", str(text))[:LONGEST].strip("-.") or "unnamed"


def free_name(out: Path, names: Sequence[str], settings: Mapping[str, Any], endings: Sequence[str]) -> str:
    """The first of `names`, then the last one numbered, that `out` has no files of, or files of the same settings.

    Args:
        out: The folder of results.
        names: Names without suffixes, the best first.
        settings: What the results are made with, to compare with those in NAME.json.
        endings: The suffixes of the files to write, such as ".json".
    """
    settings = json.loads(json.dumps(settings))  # as JSON gives them back
    numbered = (f"{names[-1]}-{i}" for i in itertools.count(2))
    return next(x for x in itertools.chain(names, numbered) if _may_write(out, x, settings, endings))


def _may_write(out: Path, stem: str, settings: Mapping[str, Any], endings: Sequence[str]) -> bool:
    if not any((out / f"{stem}{ending}").exists() for ending in endings):
        return True
    try:
        result = read_json(out / f"{stem}.json")
    except InputError:
        return False
    return isinstance(result, dict) and result.get(SETTINGS) == settings


def training_id(folder: Path) -> str:
    """A hash of the losses of a run, so that results of a run that was resumed since differ; empty if it has none."""
    try:
        lines = read_metrics(folder / METRICS)
    except InputError:
        return ""
    losses = [(line["step"], line["loss"], line.get("grad_norm")) for line in lines]
    return content_hash(str(losses))[:12] if lines else ""
