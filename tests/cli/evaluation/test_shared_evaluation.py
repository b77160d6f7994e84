"""Evaluations by two and three processes are those of one, to the last bit, and each computes its share."""

import json
from pathlib import Path

import pytest
from builders.torchrun import run_together

from fgpt.cli.main import main

SHORT = ["--base", "nano", "--steps", "2", "--micro-batch-size", "2", "--lr", "3e-3", "--max-seq-len", "96"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind that is evaluated on its own rows."""
    at = tmp_path_factory.mktemp("shared")
    pairs = [
        {"prompt": f"Tell {i}.", "chosen": f"It was happy {i}." * (1 + i % 3), "rejected": f"It was sad {i}."}
        for i in range(60)
    ]
    (at / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    judged = [{"prompt": f"Tell {i}.", "completion": f"It is {i}.", "label": bool(i % 2)} for i in range(40)]
    (at / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    (at / "texts.txt").write_text(
        "\n".join(f"I am {('glad', 'sad')[i % 2]} {i}{' very' * 30};{'xy'[i % 2]}" for i in range(240))
    )
    (at / "rows.json").write_text(
        json.dumps([{"instruction": f"Say {i}.", "output": f"It is {i}. " * (1 + i % 3)} for i in range(160)])
    )
    data = ["--data", str(at / "pairs.jsonl"), "--num-heldout", "26"]
    judged_data = ["--data", str(at / "judged.jsonl"), "--num-heldout", "20"]
    rows = ["--data", str(at / "rows.json"), "--num-heldout", "80", "--max-new-tokens", "3"]
    texts = ["--train", str(at / "texts.txt"), "--test", str(at / "texts.txt"), "--head", "classifier"]
    for name, options in {
        "instruct": ["lora-nano", *rows, "--compare-prompts", "0"],
        "classify": ["emotion-small", *texts],
        "prefer": ["dpo-nano", *data, "--compare-prompts", "0"],
        "judge": ["kto-nano", *judged_data, "--compare-prompts", "0"],
        "reward": ["reward-nano", *data],
    }.items():
        assert main(["train", *options, *SHORT, "--name", name, "--out", str(at / "runs")]) == 0
    return at / "runs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "names"), [(2, ["instruct", "classify", "prefer", "judge", "reward"]), (3, ["classify"])]
)
def test_they_are_those_of_one_process(count: int, names: list[str], runs: Path):
    done = run_together(count, "shared_evaluations.py", *(str(runs / name) for name in names))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 4 + len(names)
    for name, result in report.items():
        assert result["equal"], name
        assert 0 < min(result["flops"]) <= max(result["flops"]) < 0.75 * result["alone"], (name, result)


@pytest.mark.slow
def test_one_of_them_writes_and_prints(runs: Path, tmp_path: Path):
    evaluate = ["eval", "run", str(runs / "instruct"), "--num-generations", "3", "--batch-size", "2"]
    assert main([*evaluate, "--out", str(tmp_path / "one")]) == 0
    done = run_together(2, "-m", "fgpt", *evaluate, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    expected, result = ([json.loads(path.read_text()) for path in tmp_path.glob(f"{x}/*")] for x in ("one", "two"))
    assert result == expected
    assert len(result) == 1
    assert done.stderr.count("written: ") == done.stderr.count("response perplexity") == 1


@pytest.mark.slow
def test_processes_of_other_options_end_by_one_line(runs: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("Once upon a time.")
    line = f"-m fgpt eval text {tmp_path / 'a.txt'} --base nano --window $((8 + RANK))"
    done = run_together(2, line, shell=True)
    assert done.returncode != 0
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert errors == ["error: rank 1 differs from rank 0 in window (window: 9, not 8): give all processes the same"], (
        done.stderr[-2000:]
    )
