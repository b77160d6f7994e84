"""Reports of classifiers and pretrainings; which run a name is."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from builders.reports import LORA, report_of, section_of, write_run_dir

from fgpt import recipes
from fgpt.cli import report
from fgpt.cli.run_dir import find_any, find_finished
from fgpt.errors import InputError
from fgpt.io.files import write_json

# ------------------------------------------------------------------------------------------------------ what it says


def test_a_run_that_classifies(tmp_path: Path):
    scores = {"accuracy": 0.5, "macro_f1": 0.25, "f1": [0.5, 0.0], "confusion": [[1, 0], [1, 0]]}
    by_side = {"majority-class baseline": {**scores, "loss": None}, "tuned": {**scores, "loss": 0.75}}
    both = {"labels": ["joy", "<b>anger"], "rows": 1234, "scores": by_side}
    at = write_run_dir(tmp_path / "emotion-small", recipes.find("emotion-small"), metrics=both)
    (at / "confusion.png").write_bytes(b"\x89PNG not really")
    shown = section_of(report_of(at), "scores")
    assert "1,234 rows" in shown
    assert '<td class="number">0.750</td>' in shown
    assert "&lt;b&gt;anger" in shown
    assert 'src="data:image/png;base64,iVBORyBub3QgcmVhbGx5"' in shown
    (at / "metrics.json").write_text('{"labels": ["joy"]}')
    with pytest.raises(InputError, match=r"metrics\.json: not the scores of this version"):
        report.run(str(at))
    (at / "metrics.json").unlink()
    assert "fgpt eval run .../emotion-small" in section_of(report_of(at), "scores")


def test_a_pretraining(tmp_path: Path):
    result = {"loss": 1.5, "perplexity": 4.5, "heldout_documents": 500, "before": {"loss": 8.0, "perplexity": None}}
    at = write_run_dir(tmp_path / "pretrain-nano", recipes.find("pretrain-nano"), result=result)
    shown = section_of(report_of(at), "heldout")
    assert "500 documents" in shown
    assert '<th scope="row">loss</th><td class="number">8.000</td><td class="number">1.500</td>' in shown
    for damage in ({"loss": "x"}, {"loss": [1]}, {"before": 1}, {"before": [1]}, {"heldout_documents": None}):
        (at / "result.json").write_text(json.dumps(result | damage))
        with pytest.raises(InputError, match=r"result\.json: not the results of this version"):
            report.run(str(at))
    (at / "result.json").unlink()
    assert "has not reached" in section_of(report_of(at), "heldout")


# ------------------------------------------------------------------------------------------------------ what it finds


def test_which_of_several_runs_was_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for age, name in ((30, "lora-nano"), (20, "lora-nano-2"), (10, "ia3-nano")):
        at = write_run_dir(tmp_path / "runs" / name)
        os.utime(at / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "lora-nano" / "adapter").mkdir()
    for take, expected in ((find_any, "lora-nano-2"), (find_finished, "lora-nano")):
        assert take("lora-nano").name == expected
        (output,) = capsys.readouterr().err.splitlines()
        assert f"lora-nano: taking runs/{expected}, of 2 runs of that name the newest" in output
    find_any("ia3-nano")
    find_any("runs/lora-nano")
    assert capsys.readouterr().err == ""
    write_run_dir(tmp_path / "lora-nano")
    assert find_any("lora-nano") == Path("lora-nano")
    assert "taking the folder ./lora-nano, and not runs/lora-nano-2" in capsys.readouterr().err


def test_a_page_names_no_place(tmp_path: Path):
    """Even of a run that an earlier version recorded, and of a failure that quotes a path."""
    why = f"cannot write {tmp_path}/lora-nano/x: No space left on device"
    run = replace(LORA, data=("/home/alice/rows.json",), base="/home/alice/model", out=tmp_path)
    at = write_run_dir(tmp_path / "lora-nano", run, status={"state": "failed", "steps": 60, "why": why})
    text = report_of(at)
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert "cannot write .../x: No space left on device" in text


def test_every_evaluation_is_shown(finished_run: Path):
    other = {"evaluated": "x", "settings": {"text": "wiki.txt"}, "text": {"perplexity per token": 77.5}}
    write_json(finished_run / "eval-wiki.json", other)
    shown = section_of(report_of(finished_run), "evaluation")
    assert "response loss (nats per token)" in shown
    assert "<h3>eval-wiki</h3>" in shown
    assert "77.5" in shown


def test_find_takes_the_newest_of_a_name(tmp_path: Path):
    for age, name in ((30, "lora-nano"), (20, "lora-nano-2"), (10, "lora-nano-long")):
        at = write_run_dir(tmp_path / name)
        os.utime(at / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "lora-nano" / "report.html").touch()  # the folder's own time is now the latest
    assert find_any("lora-nano", tmp_path) == tmp_path / "lora-nano-2"
    assert find_any(str(tmp_path / "lora-nano")) == tmp_path / "lora-nano"
    with pytest.raises(InputError, match=r"no run 'lora-nan' .*did you mean lora-nano\?"):
        find_any("lora-nan", tmp_path)
    with pytest.raises(InputError, match="no run ''"):
        find_any("", tmp_path)
    with pytest.raises(InputError, match=r"holds no run\.json"):
        find_any(str(tmp_path))
