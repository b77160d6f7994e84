"""Preference tuning from the command line: what a run leaves, that it resumes exactly, and what it refuses."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close
from builders.processes import run_processes
from builders.runs import copy_interrupted

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import preference_batches, reference_cache
from fgpt.cli.training.preference_batches import batch_of, batches, preference_order, reference_logprobs
from fgpt.cli.training.preference_rows import encode_rows, load_split
from fgpt.data.preferences import Judgment
from fgpt.data.prompt_templates import template
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.pairs import PairBatch
from fgpt.recipes import PreferenceRecipe, find
from fgpt.tree import leaves

SHORT = ["--base", "nano", "--steps", "4", "--micro-batch-size", "2", "--grad-accumulation-steps", "2"]
SHORT += ["--num-heldout", "3", "--compare-prompts", "2", "--max-new-tokens", "4", "--eval-every", "2"]
SHORT += ["--compare-data", "heldout", "--rpo-alpha", "0"]
OFTEN = ["--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]


def pair(i: int) -> dict[str, str]:
    return {"prompt": f"Say {i}.", "chosen": f"It is {i}." + " Yes." * (i % 3), "rejected": f"No{' no' * (i % 4)}."}


def judged(i: int) -> dict[str, Any]:
    return {"prompt": f"Say {i}.", "completion": f"It is {i}.", "label": i % 3 > 0}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", [pair(i) for i in range(20)])


@pytest.fixture(scope="module")
def dpo_run(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dpo")
    assert main(["train", "dpo-nano", "--data", str(pairs_file), *SHORT, *OFTEN, "--out", str(out)]) == 0
    return out / "dpo-nano"


@pytest.mark.slow
def test_a_run_leaves_its_figures(dpo_run: Path):
    lines = read_metrics(dpo_run / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # the policy is its reference
    assert lines[0]["weight"] == 4
    assert "heldout_loss" in lines[1]
    figures = json.loads((dpo_run / "result.json").read_text())
    assert figures["heldout_rows"] == 3
    assert 0 <= figures["accuracy"] <= 1
    assert figures["kl"] >= 0
    assert isinstance(run_dir.read_run(dpo_run), PreferenceRecipe)
    assert main(["generate", str(dpo_run), "Say 3.", "--max-new-tokens", "3"]) == 0
    assert main(["eval", "run", str(dpo_run)]) == 0
    assert main(["report", str(dpo_run)]) == 0


def assert_resumes_exactly(run: Path, folder: Path) -> None:
    """A copy of a run of four steps that is interrupted after two ends as the run did."""
    resumed = folder / "again" / run.name
    copy_interrupted(run, resumed, after=2)
    assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) == 0
    last = [path / "checkpoints" / "step-000004" / "state.safetensors" for path in (resumed, run)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.slow
def test_it_resumes_exactly(dpo_run: Path, tmp_path: Path):
    assert_resumes_exactly(dpo_run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        ["--objective", "orpo", "--beta", "0.2"],
        ["--objective", "simpo", "--gamma", "0.5"],
        ["--loss-type", "ipo", "--quantize", "nf4"],
        ["--loss-type", "robust", "--label-smoothing", "0.1", "--quantize", "int8"],
        ["--rpo-alpha", "0.5", "--adapter.dropout", "0.1"],
    ],
    ids=["orpo", "simpo", "ipo-nf4", "robust-int8", "rpo-dropout"],
)
def test_other_objectives(objective: list[str], pairs_file: Path, tmp_path: Path):
    options = ["--data", str(pairs_file), *SHORT, *OFTEN, "--compare-prompts", "0", *objective]
    assert main(["train", "dpo-nano", *options, "--out", str(tmp_path)]) == 0
    losses = [line["loss"] for line in read_metrics(tmp_path / "dpo-nano" / "metrics.jsonl")]
    assert len(losses) == 4
    assert_resumes_exactly(tmp_path / "dpo-nano", tmp_path)


@pytest.mark.slow
def test_kto(tmp_path: Path):
    path = write(tmp_path / "judged.jsonl", [judged(i) for i in range(20)])
    options = [*SHORT, *OFTEN, "--compare-prompts", "0", "--desirable-weight", "1"]
    assert main(["train", "kto-nano", "--data", str(path), *options, "--out", str(tmp_path)]) == 0
    lines = read_metrics(tmp_path / "kto-nano" / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert_resumes_exactly(tmp_path / "kto-nano", tmp_path)
    assert main(["eval", "run", str(tmp_path / "kto-nano"), "--limit", "1"]) == 0  # of one label, as no training may be


def test_kto_takes_pairs_apart(pairs_file: Path):
    train, heldout = load_split(recipe_of(pairs_file, objective="kto", rpo_alpha=0.0), judged=True)
    assert (len(train), len(heldout)) == (37, 3)
    rows = [row for row in (*train, *heldout) if isinstance(row, Judgment)]
    assert Counter((row.messages[0].content, row.label) for row in rows) == Counter(
        (pair(i)["prompt"], label) for i in range(20) for label in (True, False)
    )
    assert {row.answer[0].content for row in rows if row.label} == {pair(i)["chosen"] for i in range(20)}


def recipe_of(path: Path, **changes: Any) -> PreferenceRecipe:
    from dataclasses import replace

    recipe: Any = find("dpo-nano")
    return replace(recipe, base="nano", data=(str(path),), num_heldout=3, **changes)


def test_every_pair_is_read_once_an_epoch_with_its_own_reference(pairs_file: Path):
    recipe = recipe_of(pairs_file, micro_batch_size=3)
    train, _ = load_split(recipe)
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    examples = encode_rows(recipe, train, template("plain"), tokenizer, 512)
    reference, order = reference_logprobs(params, examples), preference_order(examples, recipe)
    per_epoch = -(-len(train) // 3)
    updates = [[i for row in rows for i in row] for rows, _ in zip(order.indices(), range(per_epoch))]
    assert sorted(i for update in updates for i in update) == list(range(len(train)))
    found = batches(order, examples, reference, 2, begin=1)
    first, second = next(found)
    assert isinstance(first, PairBatch)
    assert leaves(first).keys() == leaves(second).keys()
    for i in updates[1]:
        alone = batch_of(examples, reference, [i])
        assert isinstance(alone, PairBatch)
        with torch.no_grad():
            from fgpt.objectives.logprobs import sequence_logprobs

            close(sequence_logprobs(params, alone.batch).sums, alone.reference, 1e-3, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--objective", "orpo", "--label-smoothing", "0.1"],
            "orpo has no --label-smoothing",
        ),
        (["--label-smoothing", "0.6"], "expected a share below 0.5"),
        (["--desirable-weight", "2"], "belong to kto"),
        (["--eval-data", "x.jsonl", "--eval-every", "1"], "--eval-data is of instruction tuning"),
        (["--max-seq-len", "8", "--overlong", "error"], "raise --max-seq-len, or give --overlong drop"),
        (["--max-seq-len", "4"], "no row fits 4 tokens"),
        (["--objective", "kto", "--rpo-alpha", "0", "--columns.label", "good"], "no column 'good'"),
        (["--objective", "kto"], "--objective kto has no --rpo-alpha: give --rpo-alpha 0"),
        (["--objective", "kto", "--rpo-alpha", "0", "--micro-batch-size", "1"], "give 2 rows or more"),
        (["--gamma", "3"], "--gamma is of simpo"),
        (["--mixture", "tokens"], "--mixture is of instruction tuning"),
        (["--forget", "rows.jsonl"], "--forget is of instruction tuning: leave it out"),
        (["--columns.prompt", "question"], "no column 'question'"),
        (["--num-heldout", "0", "--eval-every", "1"], "needs held-out rows, and there are none"),
        (["--overlong", "cut"], "expected one of error, drop"),
        (["--micro-batch-size", "auto"], "--micro-batch-size"),
    ],
)
def test_bad_options(
    options: list[str], message: str, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    args = ["train", "dpo-nano", "--base", "nano", "--data", str(pairs_file), *options, "--out", str(tmp_path)]
    assert main(args) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "dpo-nano").exists()


@pytest.mark.slow
def test_weights_of_sources_are_refused_and_repeats_are_said(
    pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = [*SHORT, "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(["train", "dpo-nano", *options, "--data", f"{pairs_file}:0.7", f"{pairs_file}:0.3"]) == 2
    assert "preferences are not mixed by weights" in capsys.readouterr().err
    assert main(["train", "dpo-nano", *options, "--data", str(pairs_file), str(pairs_file)]) == 0
    lines = " ".join(capsys.readouterr().err.split())
    assert "preference pairs (columns prompt, chosen, rejected), 20 rows" in lines
    assert "is given 2 times" in lines


@pytest.mark.slow
def test_labels_of_several_files_count_together(tmp_path: Path):
    files = [
        write(tmp_path / f"{label}.jsonl", [judged(i) | {"label": label} for i in range(9)]) for label in (True, False)
    ]
    options = [*SHORT, "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(["train", "kto-nano", "--data", *map(str, files), *options]) == 0


def test_mismatched_answers_are_of_other_prompts():
    """Though the answers to one prompt follow each other."""
    from fgpt.cli.training.preference_rows import mismatched_answer
    from fgpt.data.conversations import Message
    from fgpt.data.preferences import Judgment

    rows: Any = [
        Judgment((Message("user", f"q{i // 4}"),), (Message("assistant", f"a{i // 4}"),), True) for i in range(12)
    ]
    for i, row in enumerate(rows):
        assert mismatched_answer(rows, i)[0].content != row.answer[0].content
    assert mismatched_answer(rows[:3], 0) == rows[1].answer  # all of one prompt


@pytest.mark.slow
@pytest.mark.parametrize("command", ["replay", "doctor", "lr-range", "eval"])
def test_other_commands(
    command: str, dpo_run: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--data", str(pairs_file), *SHORT, "--compare-prompts", "0", "--out", str(tmp_path)]
    if command == "replay":
        assert main(["replay", str(dpo_run), "--step", "2"]) == 0
        assert "It is" in capsys.readouterr().err
    elif command == "doctor":
        assert main(["doctor", "dpo-nano", *options]) == 0
    elif command == "lr-range":
        assert main(["lr-range", "dpo-nano", *options, "--num-steps", "2", "--num-lrs", "2"]) == 0
    else:
        assert main(["eval", "run", str(dpo_run), "--test", str(pairs_file)]) == 2
        assert "is evaluated on its held-out rows: leave out --test" in capsys.readouterr().err


@pytest.mark.slow
def test_new_tokens_are_saved_with_their_tokenizer(pairs_file: Path, tmp_path: Path):
    options = [
        "--data",
        str(pairs_file),
        *SHORT,
        "--compare-prompts",
        "0",
        "--new-tokens",
        "<a>",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "dpo-nano", *options, "--adapter.kind", "full"]) == 0
    assert fgpt.tokenizer(tmp_path / "dpo-nano" / "model").encode_special("<a>") == [4096]


def test_bad_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    same = write(tmp_path / "same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    good = write(tmp_path / "good.jsonl", [{**judged(i), "label": True} for i in range(5)])
    for recipe, path, message in [("dpo-nano", same, "are the same answer"), ("kto-nano", good, "labels are true")]:
        assert main(["train", recipe, "--base", "nano", "--data", str(path), "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("differ", [False, True])
def test_processes_share_the_reference(pairs_file: Path, dpo_run: Path, tmp_path: Path, differ: bool):
    """Each scores half of the answers, and one reads what another has kept; with other rows no training begins."""
    scored, log = tmp_path / "scored", tmp_path / "log"
    other = write(tmp_path / "other.jsonl", [pair(i + 1) for i in range(20)])

    def count_rows(rank: int) -> None:
        def count(params: Any, batch: Any) -> Any:
            with scored.open("a") as file:
                file.write(f"{rank} {len(batch.tokens)}\n")
            return sequence_logprobs(params, batch)

        preference_batches.sequence_logprobs = count  # in a process of its own
        preference_batches.REFERENCE_ROWS = 4
        reference_cache.MIN_WORK = 0

    def command(file: Path) -> list[str]:
        return ["train", "dpo-nano", "--data", str(file), *SHORT, "--out", str(tmp_path)]

    files = [pairs_file, other if differ else pairs_file]
    for _ in range(1 if differ else 2):  # the second time all is in the cache
        codes = run_processes(
            [command(file) for file in files], 2, log, spoil=count_rows, FGPT_CACHE=str(tmp_path / "cache")
        )
        assert codes == ([2, 2] if differ else [0, 0]), log.read_text()
    counts = [sum(int(n) for r, n in map(str.split, scored.read_text().splitlines()) if r == rank) for rank in "01"]
    assert counts == ([40, 40] if differ else [24, 24])  # where one has no more, it computes what the other does
    if not differ:
        mine, alone = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "dpo-nano", dpo_run))
        assert [x["loss"] for x in mine] == pytest.approx([x["loss"] for x in alone], rel=1e-5)
