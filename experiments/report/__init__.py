"""One page that tells of a run: how the training went, what came of it, how it was set up, and where.

report.html    in the run's folder; it needs no other file and nothing from the network
"""

from pathlib import Path

from experiments import folder
from experiments.console import console
from experiments.report.found import read
from experiments.report.page import page
from experiments.report.sections import sections, summary
from fgpt.io.files import write

REPORT = "report.html"


def go(name: str) -> Path:
    """Write the report of a run, by its name or its folder. Returns where.

    Raises InputError where there is no such run, or a file of it is damaged; an older report then stays as it was.
    """
    found = read(folder.any_of(name))
    at = found.folder.resolve().name
    title = at if at.startswith(found.name) else f"{found.name} ({at})"
    text = page(title, summary(found), sections(found))
    write(found.folder / REPORT, text)
    console.print(f"written: {found.folder / REPORT}", soft_wrap=True)
    return found.folder / REPORT
