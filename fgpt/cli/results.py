"""The names of results, so that none is written over by one of other settings.

compare.json               of the run's own settings, as after training
compare-3-prompts.json     of others: what differs is in the name
compare-3-prompts-2.json   where that name is taken by yet other settings
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.run_dir import METRICS
from fgpt.cli.training.job import content_hash
from fgpt.errors import InputError
from fgpt.io.files import read_json

SETTINGS = "settings"
"""The entry of a result's JSON file that says how it was made."""

LONGEST = 40
"""Characters of a part of a name."""


def part(text: str | Path) -> str:
    """A text as part of a file's name: the end of a path, letters and digits, the rest as dashes."""
    return re.sub(r"[^\w.]+", "-", str(text))[:LONGEST].strip("-.") or "unnamed"


def free(out: Path, names: Sequence[str], settings: Mapping[str, Any], endings: Sequence[str]) -> str:
    """The first of `names`, then of the last one numbered, under which `out` holds nothing, or what these very settings
    have made.
    """
    settings = json.loads(json.dumps(settings))  # as it is read back
    numbered = (f"{names[-1]}-{i}" for i in itertools.count(2))
    return next(x for x in itertools.chain(names, numbered) if _may_write(out, x, settings, endings))


def _may_write(out: Path, stem: str, settings: Mapping[str, Any], endings: Sequence[str]) -> bool:
    if not any((out / f"{stem}{ending}").exists() for ending in endings):
        return True
    try:
        found = read_json(out / f"{stem}.json")
    except InputError:
        return False
    return isinstance(found, dict) and found.get(SETTINGS) == settings


def trained_as(folder: Path) -> str:
    """By which a result knows what was trained in `folder`: a hash of the losses, so that a run which was gone on with
    since is another; empty where there are none.
    """
    try:
        lines = read_metrics(folder / METRICS)
    except InputError:
        return ""
    losses = [(line["step"], line["loss"], line.get("grad_norm")) for line in lines]
    return content_hash(str(losses))[:12] if lines else ""
