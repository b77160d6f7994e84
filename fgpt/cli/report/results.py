"""The sections on what came of a run: answers beside the base's, scores, held-out figures."""

import base64
import html
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare.html import answers, scores_table
from fgpt.cli.evaluation.compare.results import Comparison
from fgpt.cli.paths import shareable
from fgpt.cli.report.chart import number
from fgpt.cli.report.page import Section, grid, missing, table
from fgpt.cli.report.run_data import RunData
from fgpt.cli.results import SETTINGS
from fgpt.errors import InputError

SHOWN = 8
"""Prompts whose answers stand open; the others are folded away."""


def comparison(found: RunData) -> Section:
    """Base against tuned, the run's own prompts first, then those of prompt files."""
    parts = [_comparison(name, it, i == 0) for i, (name, it) in enumerate(found.comparisons.items())]
    if not parts:
        parts = [missing("Base and tuned have not been compared", f"just compare {shareable(found.folder)}")]
    return "comparison", "Samples and comparison", "".join(parts)


def _comparison(name: str, it: Comparison, first: bool) -> str:
    about = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in it.about)
    heading = f"<h3>{html.escape(name)}</h3>" if not first or name != "compare" else ""
    each = [f'<div class="answers">{answers(i, row, it, "h3", False)}</div>' for i, row in enumerate(it.rows)]
    shown = SHOWN if first else 0
    rest = f"<details><summary>{len(each) - shown} more prompts</summary>{''.join(each[shown:])}</details>"
    return (
        f'{heading}<ul class="about">{about}</ul>{scores_table(it)}'
        f"{''.join(each[:shown])}{rest if len(each) > shown else ''}"
    )


def classes(found: RunData) -> Section:
    """Scores of a run that classifies, and what it took for what. Raises InputError for scores that are none."""
    if found.scores is None:
        return "scores", "Scores", missing("The rows have not been scored", f"just eval {shareable(found.folder)}")
    try:
        names, by_side, rows = (found.scores[key] for key in ("labels", "scores", "rows"))
        whole = [[side, *(_score(x[key]) for key in ("accuracy", "macro_f1", "loss"))] for side, x in by_side.items()]
        each = [[name, *(_score(x["f1"][i]) for x in by_side.values())] for i, name in enumerate(names)]
        told = f'<p class="missing">{rows:,} rows that were not trained on.</p>'
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as err:
        raise InputError(
            f"{found.folder / run_dir.SCORES}: not the scores of this version ({err}); take it away"
        ) from None
    picture = missing("There is no picture of what was taken for what.")
    if found.confusion is not None:
        data = base64.b64encode(found.confusion).decode()
        picture = f'<img class="picture" alt="what was taken for what" src="data:image/png;base64,{data}">'
    scores = grid(["", "accuracy", "macro-F1", "loss"], whole) + picture + grid(["F1 of each label", *by_side], each)
    return "scores", "Scores", told + scores


def heldout(found: RunData) -> Section:
    """The held-out figures of a pretraining, before and after. Raises InputError for figures that are none."""
    if found.result is None:
        text = missing(
            "A pretraining measures held-out documents at its end; this one has not come to it", resume(found)
        )
        return "heldout", "Held-out text", text
    before = found.result.get("before") or {}
    try:
        rows = [[name.replace("_", " "), _score(before[name]), _score(found.result.get(name))] for name in before]
        number = found.result.get("heldout_documents", 0)
        told = f'<p class="missing">{number:,} documents that were not trained on.</p>'
    except (TypeError, ValueError, AttributeError) as err:
        at = found.folder / run_dir.RESULT
        raise InputError(f"{at}: not the figures of this version ({err}); take it away") from None
    return "heldout", "Held-out text", told + grid(["", "before", "after"], rows)


def evaluation(found: RunData) -> Section:
    """What `just eval` left: of each evaluation groups of figures."""
    if not found.evaluations:
        at = shareable(found.folder)
        how = f"just eval --base {at}/model --text FILE" if found.kind == "pretraining" else f"just eval {at}"
        return "evaluation", "Evaluation", missing("It has not been evaluated", how)
    parts = [_evaluation(name, x) for name, x in found.evaluations.items()]
    return "evaluation", "Evaluation", "".join(parts)


def _evaluation(name: str, figures: Mapping[str, Any]) -> str:
    groups = [(group, x) for group, x in figures.items() if isinstance(x, Mapping) and group != SETTINGS]
    heading = f"<h3>{html.escape(name)}</h3>" if name != Path(run_dir.EVAL).stem else ""
    told = "".join(f"<h3>{html.escape(group)}</h3>{table(rows_of(x))}" for group, x in groups)
    return heading + (told or missing(f"{name}.json holds no figures"))


def resume(found: RunData) -> str:
    """What to type to go on with a run."""
    return f"just train {shlex.quote(shareable(found.folder))} --resume"


def rows_of(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The names and values of nested figures, for a table."""
    rows: list[tuple[str, str]] = []
    for name, x in values.items():
        words = prefix + name.replace("_", " ")
        rows += rows_of(x, f"{words}: ") if isinstance(x, Mapping) else [(words, _figure(x))]
    return rows


def _score(x: float | None) -> str:
    """To three places, so that a column of them can be compared."""
    return "–" if x is None else f"{x:,.3f}"


def _figure(x: Any) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, int):
        return f"{x:,}"
    return "–" if x is None else number(x) if isinstance(x, float) else str(x)
