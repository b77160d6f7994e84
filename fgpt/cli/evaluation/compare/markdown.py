"""A comparison as Markdown, and in short on the terminal."""

from rich.table import Table

from fgpt.cli.console import console
from fgpt.cli.evaluation.compare.results import Answer, Comparison

SHOWN = 3
"""Prompts whose answers the terminal shows."""
ABREAST = 3
"""Most sides whose answers the terminal shows next to each other; of more, the scores alone."""


def markdown(found: Comparison) -> str:
    """All scores, then each prompt with its answers."""
    lines = [f"# {found.title}", "", *(f"- {sentence}" for sentence in found.about), ""]
    lines += ["| | " + " | ".join(side.replace("|", r"\|") for side in found.sides) + " |"]
    lines += ["|---|" + "---:|" * len(found.sides)]
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in found.cells()]
    for i, row in enumerate(found.rows):
        lines += ["", f"## {i + 1}. {' '.join(row.instruction.split())}"]
        parts = [("input", row.input), ("reference", row.output)]
        for title, text in parts + [(side, _told(some[i])) for side, some in found.answers.items()]:
            if text:
                quoted = "\n".join(f"> {line}" for line in text.splitlines())
                lines += ["", f"**{title}**", "", quoted]
    return "\n".join(lines) + "\n"


def show(found: Comparison) -> None:
    """Print the scores, and a few answers where they have room."""
    view = Table("", *found.sides, title=found.title, title_justify="left")
    for name, values in found.cells():
        view.add_row(name, *values)
    if len(found.sides) <= ABREAST:
        view.add_section()
        for i in range(0, len(found.rows), max(1, len(found.rows) // SHOWN)):
            row = found.rows[i]
            prompt = row.instruction + (f"\n{row.input}" if row.input else "")
            texts = [_told(some[i]) for some in found.answers.values()]
            view.add_row(prompt, *texts, end_section=True)
    console.print(view)


def _told(answer: Answer) -> str:
    """An answer's text, and whether it was cut; never nothing."""
    return (answer.text or "(no text)") + ("" if answer.finished else " [cut]")
