"""The results of a run as tables: classification scores, held-out losses of a pretraining, evaluations."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.cli import run_dir
from fgpt.cli.pages.formatting import score, table_rows
from fgpt.cli.pages.tables import Cell, Column, Table, text_column
from fgpt.cli.report.run_data import RunData
from fgpt.cli.results import SETTINGS
from fgpt.errors import InputError


@dataclass(frozen=True)
class ClassificationScores:
    num_rows: int
    overall: Table
    """Accuracy, macro-F1 and loss of each contender."""
    by_label: Table
    """F1 of each label, by contender."""
    confusion: str
    """The confusion matrix, a PNG in base64; empty if there is none."""


def classification_scores(data: RunData) -> ClassificationScores | None:
    """The scores of a classifier, if it has been scored. Raises InputError for scores that are not of this version."""
    if data.scores is None:
        return None
    try:
        by_side, labels, num_rows = data.scores["scores"], data.scores["labels"], int(data.scores["rows"])
        overall, by_label = [], []
        for side, values in by_side.items():
            overall.append([Cell(side), *(Cell(score(values[name])) for name in ("accuracy", "macro_f1", "loss"))])
        for i, label in enumerate(labels):
            by_label.append([Cell(label), *(Cell(score(values["f1"][i])) for values in by_side.values())])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        path = data.folder / run_dir.SCORES
        raise InputError(f"{path}: not the scores of this version ({err}); delete it") from None
    confusion = base64.b64encode(data.confusion or b"").decode()
    metrics = [text_column("model"), Column("accuracy"), Column("macro-F1"), Column("loss")]
    sides = [text_column("label"), *(Column(side) for side in by_side)]
    return ClassificationScores(
        num_rows, Table("scores", metrics, overall), Table("F1 of each label", sides, by_label), confusion
    )


@dataclass(frozen=True)
class HeldOutLosses:
    num_documents: int
    before_and_after: Table


def heldout_losses(data: RunData) -> HeldOutLosses | None:
    """The held-out losses of a pretraining, if it has finished. Raises InputError if they are not of this version."""
    if data.result is None:
        return None
    try:
        rows = []
        for name, before in (data.result.get("before") or {}).items():
            texts = (name.replace("_", " "), score(before), score(data.result.get(name)))
            rows.append([Cell(text) for text in texts])
        heads = [text_column("held-out"), Column("before"), Column("after")]
        table = Table("held-out text before and after the training", heads, rows, is_sortable=False)
        return HeldOutLosses(int(data.result.get("heldout_documents", 0)), table)
    except (TypeError, ValueError, AttributeError) as err:
        path = data.folder / run_dir.RESULT
        raise InputError(f"{path}: not the results of this version ({err}); delete it") from None


def evaluations(data: RunData) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """What `fgpt eval` has written: the heading of each evaluation, and of its groups the names and tables."""
    return [
        ("" if name == Path(run_dir.EVAL).stem else name, _groups(results))
        for name, results in data.evaluations.items()
    ]


def _groups(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups = {name: group for name, group in results.items() if isinstance(group, Mapping) and name != SETTINGS}
    return [(name, table_rows(group)) for name, group in groups.items()]


@dataclass(frozen=True)
class LargestGradients:
    """The rows that `--per-example` found to have the largest gradients."""

    num_rows: int
    """Of how many."""
    table: Table
    """Place, loss, norm and text of each, the largest first."""


def largest_gradients(data: RunData) -> LargestGradients | None:
    """They, if the run has them. Raises InputError if they are not of this version."""
    if data.per_example is None:
        return None
    try:
        worst = sorted((line for line in data.per_example if "rank" in line), key=lambda line: line["rank"])
        rows = []
        for line in worst:
            texts = (f"{line['source']}, {line['where']}", score(line["loss"]), score(line["norm"]), line["text"])
            rows.append([Cell(text) for text in texts])
    except (KeyError, TypeError, ValueError) as err:
        path = data.folder / run_dir.PER_EXAMPLE
        raise InputError(f"{path}: not the rows of this version ({err}); delete it") from None
    heads = [text_column("row"), Column("loss"), Column("norm"), text_column("text")]
    return LargestGradients(len(data.per_example), Table("rows with the largest gradients", heads, rows))
