"""`fgpt eval` of a run on its own rows: answers are scored as `fgpt compare` scores them, classes as after training."""

import json
from pathlib import Path

import pytest

from fgpt.cli import eval_command
from fgpt.cli.main import main
from fgpt.io import models

SHORT = ["--steps", "2", "--micro-batch-size", "1", "--warmup-steps", "1"]
GLAD, SAD = ("happy", "glad", "proud", "kind"), ("sad", "scared", "lost", "mean")


@pytest.fixture(scope="module")
def instruction_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was compared after training on four prompts."""
    out = tmp_path_factory.mktemp("runs")
    assert (
        main(["train", "lora-nano", *SHORT, "--compare-prompts", "4", "--max-new-tokens", "12", "--out", str(out)]) == 0
    )
    return out / "lora-nano"


@pytest.fixture(scope="module")
def rows_of_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feelings") / "train.txt"
    output = [f"{who} was {how};{'joy' if how in GLAD else 'fear'}" for who in ("Tim", "Sue") for how in GLAD + SAD]
    path.write_text("\n".join(output))
    return path


@pytest.mark.slow
def test_answers_are_scored_as_compared(instruction_run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "run", str(instruction_run), "--num-generations", "4", "--limit", "3"]) == 0
    output, found = (
        capsys.readouterr().err,
        json.loads((instruction_run / "eval-4-generations-limit-3.json").read_text()),
    )
    compared = json.loads((instruction_run / "compare.json").read_text())["scores"]["tuned"]
    assert (found["answers"].pop("rows"), found["answers"].pop("max new tokens")) == (4, 12)
    assert found["answers"] == {name: compared[name] for name in found["answers"]}
    assert compared.keys() - found["answers"].keys() == {
        "held-out response loss (nats per token)",  # that of the four rows: here it is of all, or of the limit's
        "held-out response perplexity",
        "perplexity of the answers under the base",
    }
    assert found["held out"]["rows"] == 3
    assert f"{compared['mean answer length (tokens)']:.4f}" in output


def test_a_text_by_a_run(instruction_run: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("Once upon a time, there was a fox.")
    options = ["--run", str(instruction_run), "--out", str(tmp_path)]
    assert main(["eval", "text", str(tmp_path / "a.txt"), *options]) == 0
    assert json.loads((tmp_path / "eval.json").read_text()).keys() == {
        "evaluated",
        "base",
        "settings",
        "text",
    }


@pytest.mark.parametrize("form", ["classifier", "lm"])
def test_classes_are_told_as_after_training(form: str, rows_of_classes: Path, tmp_path: Path):
    labels = ["--labels", "joy=love", "fear", "--prompt.suffix", " It was", "--head", form, "--lr", "3e-3"]
    data = [
        "--base",
        "nano",
        "--train",
        str(rows_of_classes),
        "--test",
        "None",
        "--num-heldout",
        "6",
        "--max-seq-len",
        "64",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "emotion-small", *data, *labels, *SHORT]) == 0
    run = tmp_path / "emotion-small"
    assert main(["eval", "run", str(run)]) == 0
    found = json.loads((run / "eval.json").read_text())["test rows"]
    after = json.loads((run / "metrics.json").read_text())["scores"]["tuned"]
    assert (found["rows"], found["classes"], found["truncated rows"]) == (6, 2, 0)
    assert found["accuracy"] == after["accuracy"]
    assert found["macro-F1"] == after["macro_f1"]
    assert found["loss (nats per row)"] == pytest.approx(after["loss"], rel=1e-5)
    assert main(["eval", "run", str(run), "--limit", "2", "--out", str(tmp_path / "two")]) == 0
    assert json.loads((tmp_path / "two" / "eval.json").read_text())["test rows"]["rows"] == 2


def test_bad_input_is_one_line(
    instruction_run: Path, rows_of_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """And comes before any model is loaded."""
    labels = [
        "--base",
        "nano",
        "--train",
        str(rows_of_classes),
        "--test",
        "None",
        "--num-heldout",
        "6",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "emotion-small", *labels, *SHORT, "--max-seq-len", "64"]) == 0
    run, moved = str(tmp_path / "emotion-small"), tmp_path / "moved"
    (moved / "adapter").mkdir(parents=True)
    values = json.loads((tmp_path / "emotion-small" / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(values | {"train": "gone.txt"}))
    (tmp_path / "odd" / "adapter").mkdir(parents=True)
    (tmp_path / "odd" / "run.json").write_text(json.dumps({"prompt": 1}))
    monkeypatch.setattr(models, "load", None)
    monkeypatch.setattr(eval_command, "load", None)
    capsys.readouterr()
    for args, says in (
        (
            [run, "--num-generations", "2"],
            "is a classifier, which generates no answers: leave out --num-generations",
        ),
        ([str(instruction_run), "--labels", "a", "b"], "is not a classifier: leave out --test, --columns and --labels"),
        ([str(instruction_run), "--num-generations", "0"], "--num-generations is 0: expected 1 or more"),
        ([str(moved)], "gone.txt: no such file"),
        ([str(tmp_path / "odd")], "expected a kind, one of"),
    ):
        assert main(["eval", "run", *args]) == 2, args
        output = capsys.readouterr().err.strip()
        assert output.startswith("error: "), output
        assert says in output
        assert "\n" not in output
