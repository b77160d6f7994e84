"""Evaluation sets with names and losses of their own, beside a weighted mixture of sources."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.resume import exit_status, resume, run_in, run_in_fork

from fgpt.cli import report
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.run_dir import read_run
from fgpt.cli.training.eval_sets import parse_eval_data
from fgpt.cli.training.examples import source_weights
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe


def write_rows(path: Path, count: int, answer: str = "It is {}.") -> Path:
    rows = [{"instruction": f"Say {i}.", "output": answer.format(i)} for i in range(count)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("sets")
    write_rows(at / "a.json", 20)
    write_rows(at / "b.json", 10, "No, never {}.")
    write_rows(at / "news.json", 6, "News of {}.")
    write_rows(at / "chat.json", 4)
    (at / "long.json").write_text(json.dumps([{"instruction": "Say.", "output": f"{n} " * n} for n in (2, 200, 3)]))
    return at


@pytest.fixture(scope="module")
def mixed_args(files: Path, training_args: dict[str, list[str]]) -> list[str]:
    args = [*training_args["instruct"], "--data", f"{files / 'a.json'}:0.25", f"{files / 'b.json'}:0.75"]
    sets = [f"news={files / 'news.json'}", str(files / "chat.json"), f"long={files / 'long.json'}"]
    return [*args, "--eval-data", *sets, "--num-heldout", "0.2", "--steps", "5", "--eval-every", "2"]


def test_each_set_has_its_loss(mixed_args: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *mixed_args, "--compare-prompts", "0", "--out", str(tmp_path)]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "an epoch draws 6 (25.0 %)" in output
    assert "an epoch draws 18 (75.0 %)" in output
    assert "long: of 3 rows 1 are longer than 64 tokens and 0 have no response: its loss leaves them out" in output
    assert "the best state and early stopping follow the held-out loss" in output
    assert "step 2 held-out loss" in output

    (run,) = run_in(tmp_path)
    names = ["heldout_loss", "eval_news_loss", "eval_chat_loss", "eval_long_loss"]
    for line in read_metrics(run / "metrics.jsonl"):
        assert [name for name in line if name in names] == (names if line["step"] in (2, 4) else [])
    page = report.run(str(run)).read_text()
    assert ">held-out, best" in page
    assert all(f">{label} loss<" in page for label in ("news", "chat", "long"))
    assert (run / "loss.png").stat().st_size

    recipe = read_run(run)
    assert isinstance(recipe, InstructionRecipe)
    assert recipe.num_heldout == 0.2
    assert str(files) not in (run / "run.json").read_text()
    assert recipe.eval_data[0] == f"news={files / 'news.json'}"

    assert main(["eval", "run", str(run)]) == 0
    evaluated = json.loads((run / "eval.json").read_text())
    assert evaluated["held out"]["rows"] == 6
    assert evaluated["evaluation set news"]["rows"] == 6
    assert evaluated["evaluation set long"]["rows left out"] == 1


@pytest.mark.slow
def test_other_rows_of_a_set_are_other_inputs(
    mixed_args: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    news = shutil.copy(files / "news.json", tmp_path / "news.json")
    options = ["--eval-data", f"news={news}", "--compare-prompts", "0"]
    assert exit_status(run_in_fork(["train", *mixed_args, *options, "--out", str(tmp_path / "runs")])) == 0
    (run,) = run_in(tmp_path / "runs")
    (run / "status.json").write_text('{"state": "running", "steps": 5}\n')
    write_rows(Path(news), 6, "Old news of {}.")
    assert main(resume(run)) == 2
    assert "changed: evaluation set news. Restore them" in " ".join(capsys.readouterr().err.split())


def test_without_held_out_rows_the_first_set_decides(
    mixed_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *mixed_args, "--num-heldout", "0", "--out", str(tmp_path)]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "follow the news loss" in output
    (run,) = run_in(tmp_path)
    assert "heldout_loss" not in (run / "metrics.jsonl").read_text()
    losses = {line["step"]: line.get("eval_news_loss", 9.0) for line in read_metrics(run / "metrics.jsonl")}
    best = min(losses, key=lambda step: losses[step])
    assert f"keeping the state after step {best}," in output


def test_weights_are_read_from_the_sources(tmp_path: Path):
    assert source_weights(["alpaca:0.7", "mine.jsonl:3e-1"]) == [("alpaca", 0.7), ("mine.jsonl", 0.3)]
    assert source_weights(["alpaca", "C:mine.jsonl"]) == [("alpaca", None), ("C:mine.jsonl", None)]
    (tmp_path / "a:1").mkdir()
    assert source_weights([str(tmp_path / "a:1")]) == [(str(tmp_path / "a:1"), None)]
    with pytest.raises(InputError, match=r"b\.json has no weight, and other sources have one"):
        source_weights(["a.json:1", "b.json"])


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["a.json", "x/a.jsonl"], "two sets named a, a.json and x/a.jsonl: give each another name, NAME=FILE"),
        (["a b.json"], "'a b.json': expected FILE or NAME=FILE, with a name of letters"),
        (["=a.json"], "'=a.json': expected FILE or NAME=FILE"),
        (["news="], "'news=': expected FILE or NAME=FILE"),
    ],
)
def test_unusable_sets_are_errors(sets: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse_eval_data(sets)


def test_a_name_before_the_file(tmp_path: Path):
    odd = write_rows(tmp_path / "x=1.json", 2)
    assert parse_eval_data([f"news={odd}", "a.jsonl.gz[:9]"]) == {"news": str(odd), "a": "a.jsonl.gz[:9]"}


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan"])
def test_a_fraction_is_below_one(value: str, capsys: Any):
    assert main(["train", "lora-nano", "--num-heldout", value]) == 2
    assert "--num-heldout is" in capsys.readouterr().err


def test_a_set_has_no_weight_and_is_not_forgotten(
    files: Path, training_args: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(InputError, match=r"a set is evaluated whole: leave out the weight"):
        parse_eval_data([f"news={files / 'news.json'}:0.5"])
    options = ["--eval-data", str(files / "news.json"), "--eval-every", "None", "--no-keep-best", "--steps", "1"]
    args = ["train", *training_args["instruct"], *options, "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(args) == 0
    assert "evaluation sets without --eval-every" in " ".join(capsys.readouterr().err.split())
