"""A comparison as Markdown, and in short on the terminal."""

from rich.table import Table
from rich.text import Text

from fgpt.cli.console import result_console
from fgpt.cli.evaluation.compare.results import Answer, Comparison

NUM_SHOWN = 3
"""Prompts whose answers the terminal shows."""
MAX_COLUMNS = 3
"""Most sides whose answers the terminal shows next to each other; of more, the scores alone."""


def to_markdown(comparison: Comparison) -> str:
    """All scores, then each prompt with its answers."""
    lines = [f"# {comparison.title}", "", *(f"- {sentence}" for sentence in comparison.notes), ""]
    lines += ["| | " + " | ".join(head.replace("|", r"\|") for head in _heads(comparison)) + " |"]
    lines += ["|---|" + "---:|" * len(comparison.sides)]
    for name, scores in comparison.cells():
        texts = [f"{f'**{x.value}**' if x.is_best else x.value} {x.margin}".strip() for x in scores]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    for i, row in enumerate(comparison.rows):
        lines += ["", f"## {i + 1}. {' '.join(row.instruction.split())}"]
        parts = [("input", row.input), ("reference", row.output)]
        parts += [(side, _text(answers[i])) for side, answers in comparison.answers.items()]
        for title, text in parts:
            if text:
                quoted = "\n".join(f"> {line}" for line in text.splitlines())
                lines += ["", f"**{title}**", "", quoted]
    return "\n".join(lines) + "\n"


def show(comparison: Comparison) -> None:
    """Print a few answers if there are columns for them, and the scores, last: they are what stays on the screen."""
    table = Table("", *_heads(comparison), title=comparison.title, title_justify="left")
    if len(comparison.sides) <= MAX_COLUMNS:
        for i in range(0, len(comparison.rows), max(1, len(comparison.rows) // NUM_SHOWN)):
            row = comparison.rows[i]
            prompt = row.instruction + (f"\n{row.input}" if row.input else "")
            texts = [_text(answers[i]) for answers in comparison.answers.values()]
            table.add_row(prompt, *texts, end_section=True)
    for name, scores in comparison.cells():
        table.add_row(name, *(Text(f"{x.value} {x.margin}".strip(), "bold" if x.is_best else "") for x in scores))
    result_console.print(table)


def _heads(comparison: Comparison) -> list[str]:
    """The names of the sides, with their steps where these are known."""
    return [", ".join(filter(None, (side, comparison.steps_of(side)))) for side in comparison.sides]


def _text(answer: Answer) -> str:
    """An answer's text, and whether it is truncated; never empty."""
    return (answer.text or "(no text)") + ("" if answer.finished else " [truncated]")
