"""A run on one page: its training, its results, its options, and the environment.

report.html    in the run directory; it needs no other file and no network
"""

from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.config_diff import command
from fgpt.cli.console import console
from fgpt.cli.evaluation.compare.html import render
from fgpt.cli.report.run_data import RunData, read
from fgpt.cli.report.sections import ending, report_sections, resume_command, summary
from fgpt.io.files import write

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"


def run(name: str) -> Path:
    """Write the report of a run, given by its name or its directory, and return its path.

    Raises InputError if there is no such run, or if a file of it is damaged; an older report then stays as it was.
    """
    data = read(run_dir.find_any(name))
    path = data.folder / REPORT
    write(path, page(data))
    console.print(f"written: {path}", soft_wrap=True)
    return path


def page(data: RunData) -> str:
    """The report as HTML. Raises InputError for results that are not of this version."""
    directory = data.folder.resolve().name
    return render(
        "report.html",
        TEMPLATES,
        title=directory if directory.startswith(data.name) else f"{data.name} ({directory})",
        data=data,
        summary=summary(data),
        ending=ending(data),
        train=command(data.run),
        resume=resume_command(data),
        sections=report_sections(data),
    )
