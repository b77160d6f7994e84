"""Runs as pages of HTML, each of which needs no other file and no network.

report.html             in the run directory: training, results, options and environment of the run
runs.html               in the folder of run directories: a table of all runs, and their losses in one chart
runs-NAME-NAME.html     beside the first of several runs: the same of these
"""

from collections.abc import Sequence
from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.config_diff import command
from fgpt.cli.console import console
from fgpt.cli.evaluation.compare.html import TEMPLATES as COMPARISON
from fgpt.cli.pages import render
from fgpt.cli.pages.formatting import count
from fgpt.cli.paths import shareable, without_paths
from fgpt.cli.report.run_data import RunData, read
from fgpt.cli.report.sections import ending, report_sections, resume_command, summary
from fgpt.cli.report.several_runs import runs_page
from fgpt.cli.results import name_part
from fgpt.errors import InputError
from fgpt.io.files import write

TEMPLATES = Path(__file__).parent / "templates"
INDEX = "runs.html"


def run(name: str, out: Path = Path("runs")) -> Path:
    """Write the report of a run, given by its name or its directory, and return its path.

    Raises InputError if there is no such run, or if a file of it is damaged; an older report then stays as it was.
    """
    folder = run_dir.find_any(name, out)
    _write_report(folder)
    return _announce(folder / run_dir.REPORT)


def run_several(names: Sequence[str], out: Path = Path("runs")) -> Path:
    """Write the report of each run, and a page with all of them in one chart; its path is returned.

    Raises InputError as `run` does, and for a run that is given twice.
    """
    folders = [run_dir.find_any(name, out) for name in names]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"a run is given twice: {', '.join(map(str, folders))}; give each once")
    runs = [_write_report(folder) for folder in folders]
    directories = [folder.resolve().name for folder in folders]
    path = folders[0].parent / f"{name_part('-'.join(['runs', *directories]))}.html"
    write(path, runs_page(" and ".join(directories), runs, path.parent))
    return _announce(path)


def run_all(out: Path = Path("runs")) -> Path:
    """Write the report of every run in a folder, and the page that lists them, the newest first; its path is returned.
    Runs that cannot be read are named on it.

    Raises InputError if there are no runs.
    """
    folders, sweeps = run_dir.run_dirs(out), run_dir.sweep_dirs(out)
    if not folders and not sweeps:
        raise InputError(f"no runs in {out}/; `fgpt train lora-nano` makes one")
    runs: list[RunData] = []
    unreadable: list[tuple[str, str]] = []
    for folder in reversed(folders):
        try:
            runs.append(_write_report(folder))
        except (InputError, OSError) as err:
            unreadable.append((folder.name, without_paths(str(err))))
            console.print(f"{folder} could not be read: {err}", markup=False, soft_wrap=True)
    path = out / INDEX
    summary = f"{count(len(runs), 'run')} in {shareable(out)}/"
    write(path, runs_page("Runs", runs, out, summary=summary, unreadable=unreadable, sweeps=sweeps))
    return _announce(path)


def page(data: RunData) -> str:
    """The report of a run as HTML. Raises InputError for results that are not of this version."""
    directory = data.folder.resolve().name
    return render(
        "report.html",
        [TEMPLATES, COMPARISON],
        title=directory if directory.startswith(data.name) else f"{data.name} ({directory})",
        summary=summary(data),
        data=data,
        ending=ending(data),
        train=command(data.run),
        resume=resume_command(data),
        sections=report_sections(data),
    )


def _write_report(folder: Path) -> RunData:
    data = read(folder)
    write(folder / run_dir.REPORT, page(data))
    return data


def _announce(path: Path) -> Path:
    console.print(f"written: {path}", soft_wrap=True, markup=False)
    return path
