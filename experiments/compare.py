"""Base against tuned on held-out prompts: the same template, the same decoding, scores on top."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from experiments import folder
from experiments.fit import console
from experiments.nano_score import PARTS, Task, score
from experiments.runs import Run
from fgpt.data import packing
from fgpt.data.templates import Example, Row, encode, encode_prompt, template
from fgpt.data.tokenizers import Tokenizer
from fgpt.generate import generate
from fgpt.io import hub
from fgpt.io.files import write, write_json
from fgpt.loss import nll
from fgpt.model import GPT, Config
from fgpt.tree import device, tree_map

AT_ONCE = 32
"""Prompts answered in one batch."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finished: bool
    """The model ended the answer by itself."""


def answers(params: GPT, tokenizer: Tokenizer, run: Run, rows: Sequence[Row]) -> list[Answer]:
    """Greedy answers to the rows' prompts, in their order."""
    prompts = [encode_prompt(row, template(run.template), tokenizer) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # neighbours of equal length: little padding
    found: dict[int, Answer] = {}
    for i in range(0, len(rows), AT_ONCE):
        some = by_length[i : i + AT_ONCE]
        for at, out in zip(some, generate(params, [prompts[j] for j in some], tokenizer.eos, run.most), strict=True):
            found[at] = Answer(tokenizer.decode(out.tokens).strip(), len(out.tokens), out.finished)
    return [found[i] for i in range(len(rows))]


def fitting(cfg: Config, tokenizer: Tokenizer, run: Run, rows: Sequence[Row]) -> list[Example]:
    """The rows that fit the run's width, in its template."""
    encoded = [encode(row, template(run.template), tokenizer) for row in rows]
    return packing.fit(encoded, min(run.seq, cfg.context), drop=True)[0]


@torch.no_grad()
def response_loss(params: GPT, tokenizer: Tokenizer, run: Run, rows: Sequence[Row]) -> float:
    """Mean nats per response token, end of text included, over the rows that fit the run's width."""
    at = device(params)
    total = weight = 0.0
    for example in fitting(params.cfg, tokenizer, run, rows):
        batch = packing.collate([[example]])
        value, w = nll(params, tree_map(lambda x: x.to(at), batch))
        total, weight = total + float(value), weight + float(w)
    return total / weight


def scores(
    run: Run, params: GPT, tokenizer: Tokenizer, rows: Sequence[Row], found: Sequence[Answer]
) -> dict[str, float]:
    """What is compared, by name; the higher the better except for losses."""
    loss = response_loss(params, tokenizer, run, rows)
    return task_scores(rows, found) | {
        "held-out response loss (nats per token)": loss,
        "held-out response perplexity": math.exp(loss),
        "answers ended by the model (%)": 100 * sum(a.finished for a in found) / len(found),
        "mean answer length (tokens)": sum(a.tokens for a in found) / len(found),
    }


def task_scores(rows: Sequence[Row], found: Sequence[Answer]) -> dict[str, float]:
    """Points by which the answers do what the instructions ask, where the rows say how to tell; else nothing."""
    tasks = [row for row in rows if isinstance(row, Task)]
    if len(tasks) < len(rows):
        return {}
    got = score(tasks, [a.text for a in found], [a.finished for a in found])
    kinds = {f"points: {kind}": points for kind, points in got.by_kind.items()}
    parts = {f"stories with the {part} asked for (%)": x for part, x in got.by_requirement.items() if part in PARTS}
    return {"points (0 to 100)": got.points} | kinds | parts


def report(run: Run, out: Path, heldout: Sequence[Row]) -> None:
    """Answer held-out prompts with base and tuned; write compare.md, compare.html and compare.json into the run's
    folder, and print the scores with a few answers.
    """
    from experiments.train import base_of  # train ends with a comparison, and a comparison needs the base as trained

    rows = list(heldout[: run.compare])
    base = base_of(run)
    tokenizer = hub.tokenizer(run.base)
    console.print(f"comparing base and tuned on {len(rows)} held-out prompts ..")
    sides = {"base": base, "tuned": folder.load_tuned(out, base)}
    found = {side: answers(params, tokenizer, run, rows) for side, params in sides.items()}
    table = {side: scores(run, params, tokenizer, rows, found[side]) for side, params in sides.items()}
    write_json(
        out / "compare.json", {"scores": table, "answers": [_entry(row, i, found) for i, row in enumerate(rows)]}
    )
    write(out / "compare.md", _markdown(run, table, rows, found))
    write(out / "compare.html", _page(run, table, rows, found))
    _show(table, rows, found)
    console.print(f"all {len(rows)} answers: {out / 'compare.md'} and {out / 'compare.html'}")


def _entry(row: Row, i: int, found: dict[str, list[Answer]]) -> dict[str, Any]:
    texts = {side: {"text": some[i].text, "finished": some[i].finished} for side, some in found.items()}
    return {"instruction": row.instruction, "input": row.input, "reference": row.output, **texts}


def _cells(table: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    return [(name, f"{value:.2f}", f"{table['tuned'][name]:.2f}") for name, value in table["base"].items()]


def _markdown(run: Run, table: dict[str, dict[str, float]], rows: Sequence[Row], found: dict[str, list[Answer]]) -> str:
    lines = [f"# {run.name}: base against tuned", "", "| | base | tuned |", "|---|---:|---:|"]
    lines += [f"| {name} | {base} | {tuned} |" for name, base, tuned in _cells(table)]
    for i, row in enumerate(rows):
        lines += ["", f"## {i + 1}. {' '.join(row.instruction.split())}"]
        parts = (("input", row.input), ("base", found["base"][i].text), ("tuned", found["tuned"][i].text))
        for title, text in parts:
            if text:
                quoted = "\n".join(f"> {line}" for line in text.splitlines())
                lines += ["", f"**{title}**", "", quoted]
    return "\n".join(lines) + "\n"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .5rem .7rem; border-bottom: 1px solid #dde3ea }
.scores { width: auto; margin-bottom: 2rem }
.scores td + td, .scores th + th { text-align: right; font-variant-numeric: tabular-nums }
.answers td { width: 38%; white-space: pre-wrap } .answers td:first-child { width: 24%; font-weight: 600 }
.input { font-weight: 400; color: #5a6877 } .cut { color: #b3541e }
"""


def _page(run: Run, table: dict[str, dict[str, float]], rows: Sequence[Row], found: dict[str, list[Answer]]) -> str:
    def answer(a: Answer) -> str:
        return html.escape(a.text) + ("" if a.finished else ' <span class="cut">[cut]</span>')

    score_rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{b}</td><td>{t}</td></tr>" for n, b, t in _cells(table))
    answer_rows = "".join(
        f"<tr><td>{html.escape(row.instruction)}"
        + (f'<div class="input">{html.escape(row.input)}</div>' if row.input else "")
        + f"</td><td>{answer(found['base'][i])}</td><td>{answer(found['tuned'][i])}</td></tr>"
        for i, row in enumerate(rows)
    )
    title = f"{html.escape(run.name)}: base against tuned"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>Base {html.escape(run.base)}; {len(rows)} held-out prompts; same template, greedy "
        f"decoding of at most {run.most} tokens for both.</p>"
        f'<table class="scores"><tr><th></th><th>base</th><th>tuned</th></tr>{score_rows}</table>'
        f'<table class="answers"><tr><th>prompt</th><th>base</th><th>tuned</th></tr>{answer_rows}'
        "</table></html>\n"
    )


SHOWN = 3


def _show(table: dict[str, dict[str, float]], rows: Sequence[Row], found: dict[str, list[Answer]]) -> None:
    view = Table("", "base", "tuned", title="held-out prompts: base against tuned", title_justify="left")
    for name, base, tuned in _cells(table):
        view.add_row(name, base, tuned)
    view.add_section()
    for i in range(0, len(rows), max(1, len(rows) // SHOWN)):
        prompt = rows[i].instruction + (f"\n{rows[i].input}" if rows[i].input else "")
        view.add_row(
            *(escape(text) for text in (prompt, found["base"][i].text, found["tuned"][i].text)), end_section=True
        )
    console.print(view)


def again(name: str, run_out: Path = Path("runs")) -> None:
    """Compare a trained run once more: `just compare NAME`."""
    from experiments.train import split

    out = folder.find(name, run_out)
    run = folder.read_run(out)
    report(run, out, split(run)[1])
