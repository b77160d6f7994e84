"""Several runs on one page: `fgpt report RUN RUN ..` and `fgpt report --all`."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from builders.reports import LORA, section_of, write_run_dir

from fgpt import recipes
from fgpt.cli.main import main


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The oldest first: a LoRA, a pretraining of 20 steps, a run of another name that is still at step 0."""
    out = tmp_path / "my runs"
    out.mkdir()
    write_run_dir(out / "lora-nano", status={"state": "finished", "steps": 60})
    write_run_dir(out / "pretrain-nano", recipes.find("pretrain-nano"), steps=20)
    write_run_dir(out / "first try", replace(LORA, name="first try", quantize="nf4"), steps=0)
    for age, name in enumerate(["first try", "pretrain-nano", "lora-nano"]):
        os.utime(out / name / "run.json", (1e9 - age, 1e9 - age))
    return out


def table_of(page: Path) -> list[list[str]]:
    rows = section_of(page.read_text(), "runs").partition("<tbody>")[2].split("<tr>")[1:]
    return [[re.sub("<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_all_runs_are_listed_the_newest_first(runs: Path):
    assert main(["report", "--all", "--out", str(runs)]) == 0
    rows = table_of(runs / "runs.html")
    assert [row[0] for row in rows] == ["first try", "pretrain-nano", "lora-nano"]
    assert rows[0][1:8] == ["qlora-nano", "nf4 nano", "lora r 16", "0", "", "", ""]
    assert rows[1][1:5] == ["pretrain-nano", "", "all parameters", "20"]
    assert rows[2][1:5] == ["lora-nano", "nano", "lora r 16", "60 of 60"]
    assert rows[2][6:8] == ["0.0333", "0.0333 at step 60"]  # held-out loss, and the best one
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", rows[2][8])
    assert rows[2][9] == "finished"
    text = (runs / "runs.html").read_text()
    assert '<p class="summary">3 runs in .../my runs/</p>' in text
    assert "could not be read" not in text
    assert re.findall(r'<th scope="row"><a href="([^"]*)"', text)[0] == "first%20try/report.html"
    for name in ("first try", "pretrain-nano", "lora-nano"):
        assert (runs / name / "report.html").is_file()
    curves = section_of(text, "curves")
    assert curves.count('<svg role="img"') == 2
    assert curves.count("<path") == 4  # two runs have steps
    assert ">lora-nano</span>" in curves


def test_runs_that_cannot_be_read_are_named(runs: Path, capsys: pytest.CaptureFixture[str]):
    (runs / "pretrain-nano" / "metrics.jsonl").write_text("damaged\n")
    (runs / "first try" / "run.json").write_text("{}")
    (runs / "sweep").mkdir()
    (runs / "sweep" / "sweep.json").write_text("{}")
    assert main(["report", "--all", "--out", str(runs)]) == 0
    text = (runs / "runs.html").read_text()
    assert [row[0] for row in table_of(runs / "runs.html")] == ["lora-nano"]
    assert "2 runs could not be read:" in text
    assert re.search(r"<li>pretrain-nano: .*line 1 is damaged", text)
    assert "<li>first try: " in text
    assert str(runs) not in text
    assert '<a href="sweep/report.html">sweep</a>' in text
    output = " ".join(capsys.readouterr().err.split())
    assert "pretrain-nano could not be read" in output


def test_a_run_of_another_version_has_its_own_name(runs: Path):
    run_json = runs / "first try" / "run.json"
    run_json.write_text(json.dumps(json.loads(run_json.read_text()) | {"no_such_option": 1}))
    assert main(["report", "--all", "--out", str(runs)]) == 0
    assert table_of(runs / "runs.html")[0][:2] == ["first try", "first try"]


def test_the_runs_that_are_named_are_drawn_over_each_other(runs: Path):
    assert main(["report", str(runs / "pretrain-nano"), "lora-nano", "--out", str(runs)]) == 0
    page = runs / "runs-pretrain-nano-lora-nano.html"
    assert [row[0] for row in table_of(page)] == ["pretrain-nano", "lora-nano"]
    assert "<h1>pretrain-nano and lora-nano</h1>" in page.read_text()


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    other = write_run_dir(tmp_path / "other" / "lora-nano")
    assert main(["report", str(runs / "lora-nano"), str(other)]) == 0
    rows = table_of(runs / "runs-lora-nano-lora-nano.html")
    assert [row[0] for row in rows] == ["my runs/lora-nano", "other/lora-nano"]
    text = (runs / "runs-lora-nano-lora-nano.html").read_text()
    assert 'href="../other/lora-nano/report.html"' in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either runs or --all"),
        (["lora-nano", "--all"], "expected either runs or --all"),
        (["lora-nano", "lora-nano"], "a run is given twice"),
        (["lora-nano", "lora-nan"], "no run 'lora-nan'"),
        (["--all", "--out", "nowhere"], "no runs in nowhere/"),
    ],
)
def test_what_no_page_can_be_made_of(args: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]):
    options = args if "--out" in args else [*args, "--out", str(runs)]
    assert main(["report", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
