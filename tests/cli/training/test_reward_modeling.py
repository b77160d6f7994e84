"""A reward model from the command line: it learns what is preferred, resumes exactly, and transformers reads it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import close
from builders.runs import copy_interrupted, one_line

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.tasks.reward_modeling import RewardTask, encode_pairs
from fgpt.cli.training.preference_rows import load_split
from fgpt.objectives.pairs import PairBatch
from fgpt.objectives.reward import rewards
from fgpt.recipes import RewardRecipe

SHORT = ["--base", "nano", "--steps", "12", "--micro-batch-size", "4", "--num-heldout", "8", "--lr", "3e-3"]
OFTEN = ["--checkpoint-every-minutes", "0", "--keep-checkpoints", "20", "--eval-every", "4"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A happy end is preferred to a sad one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    names = ["Tom", "Sue", "Ben", "Lily", "Max", "Mia", "Sam", "Anna"]
    rows = [
        {
            "prompt": f"Tell a story about {name}, number {i}.",
            "chosen": f"{name} was happy." + " Very happy." * (i % 3),
            "rejected": f"{name} was sad." + " Very sad." * (i % 2),
        }
        for i in range(7)
        for name in names
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reward")
    assert main(["train", "reward-nano", "--data", str(pairs_file), *SHORT, *OFTEN, "--out", str(out)]) == 0
    return out / "reward-nano"


@pytest.mark.slow
def test_it_learns_what_is_preferred(run: Path):
    lines = read_metrics(run / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=0.1)  # a new head knows nothing
    figures = json.loads((run / "result.json").read_text())
    assert figures["accuracy"] == 1
    assert figures["margin"] > 0.5
    assert figures["heldout_pairs"] == 8
    assert figures["loss"] < lines[3]["heldout_loss"]
    for command in (["eval", "run"], ["report"], ["runs"]):
        assert main([*command, *([str(run)] if command != ["runs"] else ["--out", str(run.parent)])]) == 0
    evaluated = json.loads((run / "eval.json").read_text())["held-out pairs"]
    assert evaluated == pytest.approx({name: x for name, x in figures.items() if name != "heldout_pairs"}, abs=1e-5)
    assert "Held-out pairs" in (run / "report.html").read_text()


@pytest.mark.slow
def test_it_resumes_exactly(run: Path, tmp_path: Path):
    resumed = tmp_path / "reward-nano"
    copy_interrupted(run, resumed, after=5)
    assert main(["train", str(resumed), "--resume", "--out", str(tmp_path)]) == 0
    last = [path / "checkpoints" / "step-000012" / "state.safetensors" for path in (resumed, run)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
def test_transformers_gives_the_same_rewards(run: Path):
    assert main(["merge", str(run)]) == 0
    recipe = run_dir.read_run(run)
    assert isinstance(recipe, RewardRecipe)
    tokenizer = fgpt.tokenizer("nano")
    params = run_dir.load_tuned(run, RewardTask.load_base(recipe))
    _, heldout = load_split(recipe)
    pairs = encode_pairs(recipe, heldout, tokenizer, params.cfg)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run / "merged").eval()
    assert model.config.num_labels == 1
    for example in [*pairs.chosen, *pairs.rejected]:
        text = torch.tensor([example.tokens])
        ours = rewards(params, fgpt.Batch(text, text, (torch.arange(text.shape[1]) == text.shape[1] - 1)[None].float()))
        with torch.no_grad():
            close(ours, model(input_ids=text).logits[:, 0], 1e-4, 1e-4)


def test_the_reward_is_read_at_the_end_of_each_answer(run: Path):
    """Not where a shorter answer of the batch ends, nor on padding."""
    recipe = run_dir.read_run(run)
    assert isinstance(recipe, RewardRecipe)
    job = RewardTask.build(recipe).job
    (batch,) = next(job.batches(0))
    assert isinstance(batch, PairBatch)
    weights = batch.batch.weights
    assert weights.sum(-1).tolist() == [1.0] * len(weights)
    eos = fgpt.tokenizer("nano").eos_token_id
    assert set(batch.batch.tokens[weights > 0].tolist()) == {eos}


@pytest.mark.slow
def test_without_held_out_pairs(pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [
        "--data",
        str(pairs_file),
        "--base",
        "nano",
        "--steps",
        "2",
        "--num-heldout",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "reward-nano", *options]) == 0
    run = tmp_path / "reward-nano"
    assert json.loads((run / "result.json").read_text()) == {"heldout_pairs": 0}
    assert main(["merge", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", "run", str(run)]) == 2
    assert "held out no pairs" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "RUN", "Say 3."], "is not an instruction-tuned run: it is a reward model"),
        (["chat", "RUN"], "it is a reward model"),
        (["compare", "RUN"], "it is a reward model"),
        (["classify", "RUN", "a text"], "it is a reward model"),
        (["eval", "run", "RUN", "--num-generations", "3"], "is a reward model: leave out"),
    ],
)
def test_other_uses_are_refused_in_one_line(
    command: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(run) if word == "RUN" else word for word in command]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-seq-len", "8"], "leaves"),
        (["--max-seq-len", "8", "--overlong", "error"], "raise --max-seq-len, or give --overlong drop"),
        (["--label-smoothing", "0.1"], "no option --label-smoothing"),
        (["--data", "nowhere.jsonl"], "no such file"),
    ],
)
def test_bad_options(
    options: list[str], message: str, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = [] if "--data" in options else ["--data", str(pairs_file)]
    assert main(["train", "reward-nano", "--base", "nano", *data, *options, "--out", str(tmp_path)]) == 2
    assert message.replace("leaves", "no row fits 8 tokens") in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "reward-nano").exists()
