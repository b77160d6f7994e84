"""`--per-example`: losses, norms and noise scale are those of a loop over the rows, and the report shows the worst."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.reports import report_of, section_of
from torch.func import grad

import fgpt
from fgpt.adapter_dora import with_norms
from fgpt.adapters import dora_norms
from fgpt.cli import run_dir, tasks
from fgpt.cli.main import main
from fgpt.cli.training import row_gradients
from fgpt.cli.training.job import TrainingJob
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.objectives.label_smoothing import smoothed_nll
from fgpt.tree import tree_leaves

EVIL = "<script>alert(1)</script>"
ROWS = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(20)]
ROWS[7] = {"instruction": "Say 7.", "output": f"Zq xv {EVIL} kk wq."}
FORGOTTEN = [ROWS[3], ROWS[14]]


def options(at: Path, *others: str) -> list[str]:
    """Several examples in a row, a dropout that must not count, and rows that are held out."""
    (at / "rows.json").write_text(json.dumps(ROWS))
    (at / "some.json").write_text(json.dumps(FORGOTTEN))
    data = ["--data", str(at / "rows.json"), "--num-heldout", "0", "--compare-prompts", "0", "--out", str(at / "runs")]
    size = ["--micro-batch-size", "1", "--grad-accumulation-steps", "2", "--max-seq-len", "64", "--steps", "4"]
    adapter = ["--adapter.target", r"blocks\.[01].*\.(q|down)", "--adapter.rank", "2", "--adapter.dropout", "0.1"]
    return ["lora-nano", *data, *size, *adapter, "--per-example", *others]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "per_example.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "others", [[], ["--adapter.kind", "dora", "--label-smoothing-factor", "0.1"], ["--quantize", "nf4", "--remat"]]
)
def test_they_are_those_of_a_loop(others: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    forget = ["--forget", str(tmp_path / "some.json")]
    assert main(["train", *options(tmp_path, *others, *forget)]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    run = tmp_path / "runs" / "lora-nano"
    recipe = run_dir.instruction_run(run)
    job = tasks.build_job(recipe)
    trained = run_dir.load_adapters_of(run, job.frozen)
    constants = dora_norms(job.frozen, trained)

    def loss(adapters: Any, batch: fgpt.Batch) -> torch.Tensor:
        params = fgpt.adapt(job.frozen, with_norms(adapters, constants))
        if recipe.label_smoothing_factor:
            return smoothed_nll(params, batch, label_smoothing=recipe.label_smoothing_factor)[0]
        return fgpt.nll(params, batch)[0]

    vectors, losses, weights = [], [], []
    for example in job.examples:
        batch = replace(collate([[example]]), loss_positions=None)
        weights.append(float(batch.weights.sum()))
        vectors.append(torch.cat([x.flatten() for x in tree_leaves(grad(loss)(trained, batch))]).double())
        losses.append(float(loss(trained, batch)))
    numbers = [number for number, weight in enumerate(weights, 1) if weight]
    assert numbers == [number for number in range(1, 21) if number not in (4, 15)]
    lines = lines_of(run)
    assert [line["row"] for line in lines] == numbers
    assert {line["source"] for line in lines} == {".../rows.json"}
    expected = [float(vectors[i - 1].norm()) / math.sqrt(weights[i - 1]) for i in numbers]
    assert [line["norm"] for line in lines] == pytest.approx(expected, rel=1e-3)
    assert [line["loss"] for line in lines] == pytest.approx(
        [losses[i - 1] / weights[i - 1] for i in numbers], rel=1e-4
    )
    n = len(numbers)
    gradients = torch.stack([vectors[i - 1] for i in numbers])
    noise = (gradients - gradients.mean(0)).square().sum() / (n - 1)
    signal_ = gradients.mean(0).square().sum() - noise / n
    assert f"noise scale of 18 rows: {float(noise / signal_):,.3g} examples; a step has read" in printed
    assert "gradients of rows: 2 of 20 have no weight in the loss" in printed
    worst = max(range(n), key=expected.__getitem__)
    assert [line["rank"] for line in lines if "rank" in line] == [1]
    assert lines[worst]["rank"] == 1
    assert lines[worst]["where"] == f"row {numbers[worst]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("per_example")
    assert main(["train", *options(at)]) == 0
    return at / "runs" / "lora-nano"


@pytest.mark.slow
def test_the_report_shows_the_worst(trained: Path, tmp_path: Path):
    """The row of nonsense, as text; and what a damaged file is."""
    trained = shutil.copytree(trained, tmp_path / "lora-nano")
    shown = section_of(report_of(trained), "gradients")
    assert '<th scope="row">.../rows.json, row 8</th>' in shown
    assert "Zq xv &lt;script&gt;alert(1)&lt;/script&gt; kk wq." in shown
    assert EVIL not in shown
    assert shown.count("<tr>") == 2
    assert "The worst percent of 20 rows" in shown
    path = trained / "per_example.jsonl"
    for damage in ("[1]\n", '{"rank": 1}\n', '{"rank": ', "\n1\n"):
        path.write_text(damage)
        with pytest.raises(InputError, match=r"per_example\.jsonl: not .*; delete it"):
            report_of(trained)
    path.unlink()
    assert "which this one has not reached" in section_of(report_of(trained), "gradients")


@pytest.mark.slow
def test_an_interruption_of_either_part(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the training, and while the gradients are computed: the resumed run has the lines of one that went through."""
    run, train_step, compute = tmp_path / "runs" / "lora-nano", TrainingJob.train_step, row_gradients.row_gradients

    def stop_in_step(job: TrainingJob, state: Any, batches: Any, step: int | None = None) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return train_step(job, state, batches, step)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingJob, "train_step", stop_in_step)
    assert main(["train", *options(tmp_path)]) == 130
    assert not (run / "per_example.jsonl").exists()
    monkeypatch.setattr(TrainingJob, "train_step", train_step)
    monkeypatch.setattr(row_gradients, "row_gradients", stop)
    assert main(["train", str(run), "--resume"]) == 130
    assert run_dir.read_state(run) == "interrupted"
    monkeypatch.setattr(row_gradients, "row_gradients", compute)
    assert main(["train", str(run), "--resume"]) == 0
    assert lines_of(run) == lines_of(trained)


@pytest.mark.slow
def test_a_resumed_run_may_ask_for_them(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch):
    """They change nothing of what is trained."""
    plot = tasks.plot_loss
    monkeypatch.setattr(tasks, "plot_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["train", *options(tmp_path, "--no-per-example")]) == 130
    monkeypatch.setattr(tasks, "plot_loss", plot)
    run = tmp_path / "runs" / "lora-nano"
    assert main(["train", str(run), "--resume", "--per-example"]) == 0
    assert lines_of(run) == lines_of(trained)
    assert "Zq xv" in section_of(report_of(run), "gradients")


def test_a_sample_and_gradients_that_are_not_finite(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    job = tasks.build_job(run_dir.instruction_run(trained))
    adapters = run_dir.load_adapters_of(trained, job.frozen)
    monkeypatch.setattr(row_gradients, "MAX_ROWS", 6)
    sample = row_gradients.sample_rows(20, job.recipe.seed)
    assert len({*sample}) == 6
    assert sample == sorted(sample) == row_gradients.sample_rows(20, job.recipe.seed)
    assert sample != row_gradients.sample_rows(20, 1 + job.recipe.seed)
    tokens = job.examples[sample[2]].tokens

    def loss(trained: Any, constants: Any, row: fgpt.Batch, seed: None) -> Any:
        assert job.loss is not None
        value, weight = job.loss(trained, constants, row, seed)
        is_broken = row.tokens.sum() == sum(tokens)  # padding is 0
        return value * torch.where(is_broken, torch.inf, 1.0), weight

    capsys.readouterr()
    row_gradients.report_row_gradients(replace(job, loss=loss), adapters, tmp_path)
    lines, printed = lines_of(tmp_path), " ".join(capsys.readouterr().err.split())
    assert "14 of 20 are beyond a sample of 6 by the seed" in printed
    assert "1 of 20 are not finite, and not in the noise scale" in printed
    finite = row_gradients.row_gradients(job, adapters, [i for i in sample if i != sample[2]])
    noise = row_gradients.describe_noise(finite, row_gradients.examples_per_step(job))
    assert "of 5 rows" in noise
    assert noise in printed
    complete = {line["row"]: line for line in lines_of(trained)}
    assert [line["row"] for line in lines] == [i + 1 for i in sample]
    assert [line.get("rank") for line in lines] == [None, None, 1, None, None, None]
    assert (lines[2]["loss"], lines[2]["norm"]) == (None, None)
    assert [line["norm"] for line in lines if line["norm"]] == pytest.approx(
        [complete[i + 1]["norm"] for i in sample if i != sample[2]], rel=1e-3
    )


@pytest.mark.parametrize("count", [1, 20])
def test_too_few_rows(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One with a weight has no noise, and none has no gradient."""
    (tmp_path / "rest.json").write_text(json.dumps(ROWS[20 - count :] if count == 20 else ROWS[1:]))
    assert main(["train", *options(tmp_path, "--forget", str(tmp_path / "rest.json"), "--steps", "1")]) == 0
    assert "it needs two or more" in " ".join(capsys.readouterr().err.split())
    run = tmp_path / "runs" / "lora-nano"
    assert len(lines_of(run)) == (0 if count == 20 else 1)
    assert "The worst percent of" in section_of(report_of(run), "gradients")


@pytest.mark.slow
def test_a_classifier(tmp_path: Path):
    """Rows held out have no line, and the worst one says its class."""
    texts = [f"One day, {who} was {how}." for who in ("Tim", "Sue", "a fox") for how in ("glad", "happy", "sad")]
    labels = ["fear" if "sad" in text else "joy" for text in texts]
    labels[4] = "fear"
    (tmp_path / "train.txt").write_text("\n\n".join(f"{x};{label}" for x, label in zip(texts, labels, strict=True)))
    data = ["--base", "nano", "--train", str(tmp_path / "train.txt"), "--test", str(tmp_path / "train.txt")]
    size = ["--steps", "12", "--micro-batch-size", "1", "--max-seq-len", "64", "--num-heldout", "2"]
    others = ["--eval-every", "6", "--lr", "6e-3", "--per-example", "--out", str(tmp_path)]
    assert main(["train", "emotion-small", *data, *size, *others]) == 0
    lines = lines_of(tmp_path / "emotion-small")
    assert len(lines) == 7
    assert len({line["row"] for line in lines}) == 7
    (worst,) = (line for line in lines if "rank" in line)
    index = worst["row"] - 1
    assert worst["where"] == f"line {2 * index + 1}"  # with a blank line between two
    assert worst["text"].startswith(texts[index])
    assert worst["text"].endswith(f"«{labels[index]}»")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["grpo-nano"], "leave it out of grpo training"),
        (["dpo-nano"], "leave it out of preference training"),
        (["reward-nano"], "leave it out of reward training"),
        (["lora-nano", "--privacy.epsilon", "3", "--privacy.delta", "1e-3"], "which --privacy.epsilon hides"),
        (["lora-nano", "--streaming", "--steps", "2"], "--streaming keeps none of them"),
        (["pretrain-nano"], "no option --per-example"),
    ],
)
def test_where_it_has_no_meaning(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", *args, "--per-example", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["sweep", "lora-nano", "--lr", "1e-3", "1e-4", "--per-example", "--out", str(tmp_path)]) == 2
    assert "--per-example is of a training by itself" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
