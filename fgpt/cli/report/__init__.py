"""One page that tells of a run: how the training went, what came of it, how it was set up, and where.

report.html    in the run's folder; it needs no other file and nothing from the network
"""

from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.console import console
from fgpt.cli.report.page import page
from fgpt.cli.report.run_data import read
from fgpt.cli.report.sections import sections, summary
from fgpt.io.files import write

REPORT = "report.html"


def run(name: str) -> Path:
    """Write the report of a run, by its name or its folder. Returns where.

    Raises InputError where there is no such run, or a file of it is damaged; an older report then stays as it was.
    """
    found = read(run_dir.find_any(name))
    at = found.folder.resolve().name
    title = at if at.startswith(found.name) else f"{found.name} ({at})"
    text = page(title, summary(found), sections(found))
    write(found.folder / REPORT, text)
    console.print(f"written: {found.folder / REPORT}", soft_wrap=True)
    return found.folder / REPORT
