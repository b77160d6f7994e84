"""The notebooks of docs/notebooks run from top to bottom in a kernel, in an empty folder."""

import os
from pathlib import Path

import pytest
from builders import ROOT

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed: the group docs of pyproject.toml has it")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


def test_each_begins_with_a_title_and_an_install_line():
    assert len(NOTEBOOKS) >= 3
    for path in NOTEBOOKS:
        title, *cells = jupytext.read(path).cells
        (imports, *_) = [cell for cell in cells if cell.cell_type == "code"]
        assert title.source.startswith("# ")
        assert "%pip install fgpt" in imports.source.splitlines()[0]
