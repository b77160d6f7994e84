"""The sections of a report, in their order: the training, what came of it, and how it was set up. What is not there is
said in a line.
"""

import html
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fgpt.cli.paths import without_paths
from fgpt.cli.report.config_diff import Option, command, options, said
from fgpt.cli.report.curves import curves, figures
from fgpt.cli.report.page import Section, missing, table
from fgpt.cli.report.results import classes, comparison, evaluation, heldout, resume, rows_of
from fgpt.cli.report.run_data import RunData


def sections(found: RunData) -> list[Section]:
    """All of them, in their order."""
    by_kind = {"tuning": comparison, "classes": classes, "pretraining": heldout}
    return [
        training(found),
        by_kind[found.kind](found),
        evaluation(found),
        config(found),
        environment(found),
        reproduce(found),
    ]


def summary(found: RunData) -> str:
    """One line of HTML: what was trained, and how it ended."""
    run, (state, color, _) = found.run, ending(found)
    adapter = run.get("adapter")
    over = f" on {run['quantize']} {run['base']}" if run.get("quantize") else f" on {run.get('base')}"
    what = f"{adapter.get('kind')}{over}" if isinstance(adapter, Mapping) else "pretraining from random parameters"
    data = run.get("data") or run.get("train") or run.get("source")
    parts = [what, f"data {said(data)}" if data else "", f"{_steps(found)}"]
    told = html.escape(", ".join(part for part in parts if part))
    return f'{told} · <span class="state" style="--c: var(--{color})">{html.escape(state)}</span>'


def ending(found: RunData) -> tuple[str, str, str]:
    """How the run ended: in a word, its color, and in a sentence."""
    last = "no step has been written"
    if found.lines and found.written is not None:
        at = datetime.fromtimestamp(found.written, UTC)
        last = f"the last figure, of step {found.lines[-1]['step']:g}, was written at {at:%Y-%m-%d %H:%M} UTC"
    status = found.status or {}
    state = status.get("state")
    if state == "finished":
        return "finished", "c3", f"The training came to its end; {last}."
    if state == "interrupted":
        return "interrupted", "warn", f"The training was interrupted; {last}."
    if state == "failed":
        return "failed", "warn", f"The training failed: {_why(status)}; {last}."
    if state == "running" and found.at_work:
        return "running", "c1", f"The training is at work; {last}."
    if state == "running":
        return "killed", "warn", f"The training ended without a word, as a killed process does; {last}."
    return "end not recorded", "c0", f"The folder does not say how the training ended; {last}."


def _why(status: Mapping[str, Any]) -> str:
    why = status.get("why")
    return without_paths(why) if isinstance(why, str) else "it is not recorded why"


def _steps(found: RunData) -> str:
    done = found.lines[-1]["step"] if found.lines else 0
    every = (found.status or {}).get("steps")
    return f"{done:,} of {every:,} steps" if isinstance(every, int) and every else f"{done:,} steps"


def training(found: RunData) -> Section:
    notes = [ending(found)[2]]
    if found.torn:
        notes += ["The last line of metrics.jsonl was cut off in the middle, and is left out."]
    if found.again:
        notes += [
            f"{found.again:,} lines are of steps that were done again after a resumption: the later ones are drawn."
        ]
    told = f'<p class="missing">{html.escape(" ".join(notes))}</p>'
    if not found.lines:
        return "training", "Training", told + missing("No step was written", command(found.run))
    tiles = "".join(
        f'<div title="{html.escape(about)}"><dt>{html.escape(name)}</dt><b>{html.escape(value)}</b>'
        f'<span class="note">{html.escape(about)}</span></div>'
        for name, value, about in figures(found.lines)
    )
    unit = "example" if found.kind == "classes" else "token"
    drawn = f'<dl class="tiles">{tiles}</dl><div class="curves">{curves(found.lines, unit)}</div>'
    return "training", "Training", told + drawn


def config(found: RunData) -> Section:
    every = options(found.run)
    named = any(option.known for option in every)
    changed = sum(option.differs for option in every)
    about = f"{changed or 'No'} option{'s differ' if changed != 1 else ' differs'} from {found.name}'s own."
    told = about if named else f"There is no run named {found.name} in this version to compare with."
    rows = "".join(map(_option, every))
    view = (
        f'<table><thead><tr><th scope="col">option</th><th>this run</th><th>{html.escape(found.name)}</th></tr></thead>'
    )
    return (
        "config",
        "Options",
        f'<p class="missing">{html.escape(told)}</p><div class="wide own">{view}<tbody>{rows}</tbody></table></div>',
    )


def _option(option: Option) -> str:
    usual = said(option.default) if option.differs else ""
    kind = ' class="changed"' if option.differs else ""
    return (
        f"<tr{kind}>"
        f'<th scope="row">{html.escape(option.name)}</th><td class="said">{html.escape(said(option.value))}</td>'
        f'<td class="said">{html.escape(usual)}</td></tr>'
    )


def environment(found: RunData) -> Section:
    if found.environment is None:
        text = missing(
            "The machine and the versions were not recorded; a run of this version records them", command(found.run)
        )
        return "environment", "Environment", text
    return "environment", "Environment", table(rows_of(found.environment))


def reproduce(found: RunData) -> Section:
    told = f"<p>To have it again:</p><pre>{html.escape(command(found.run))}</pre>"
    if (found.status or {}).get("state") in ("running", "interrupted", "failed"):
        told += f"<p>To go on from its last checkpoint:</p><pre>{html.escape(resume(found))}</pre>"
    return "again", "Again", told
