"""`fgpt forget` makes the run that a training without some rows makes, to the byte."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import fgpt
from fgpt.cli import tasks
from fgpt.cli.main import main
from fgpt.data.example_store import StoredExamples, example_batch
from fgpt.data.examples import Example, Span

ROWS = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(24)]
STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, and some of them to forget."""
    at = tmp_path_factory.mktemp("forget")
    (at / "rows.json").write_text(json.dumps(ROWS))
    (at / "some.json").write_text(json.dumps([ROWS[3], ROWS[14], ROWS[14]]))
    (at / "unknown.json").write_text(json.dumps([ROWS[3], {"instruction": "Say 99.", "output": "No."}]))
    return at


def options(files: Path, out: Path, *others: str) -> list[str]:
    data = ["--data", str(files / "rows.json"), "--num-heldout", "0", "--compare-prompts", "0", "--out", str(out)]
    size = ["--micro-batch-size", "1", "--grad-accumulation-steps", "2", "--max-seq-len", "48", "--steps", str(STEPS)]
    often = ["--checkpoint-every-minutes", "0", "--keep-checkpoints", "99", "--adapter.dropout", "0.1"]
    return ["lora-nano", *data, *size, *often, *others]


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    assert main(["train", *options(files, files / "runs")]) == 0
    return files / "runs" / "lora-nano"


@pytest.fixture(scope="module")
def without(files: Path) -> Path:
    """The training that never learned the rows, from its start."""
    assert (
        main(["train", *options(files, files / "runs", "--name", "without", "--forget", str(files / "some.json"))]) == 0
    )
    return files / "runs" / "without"


def weights_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["all", "none"])
def test_it_is_the_training_without_the_rows(
    checkpoints: str, trained: Path, without: Path, tmp_path: Path, files: Path
):
    run = tmp_path / "runs" / "lora-nano"
    shutil.copytree(trained, run)
    if checkpoints == "none":
        shutil.rmtree(run / "checkpoints")
    rows = str(files / "some.json")
    assert main(["forget", str(run), "--rows", rows, "--out", str(tmp_path / "runs")]) == 0
    forgot = tmp_path / "runs" / "lora-nano-forget"
    assert weights_of(forgot) == weights_of(without) != weights_of(trained)
    manifest = json.loads((forgot / "forget.json").read_text())
    first, begin = manifest["first_step_that_reads_them"], manifest["taken_up_after_step"]
    assert begin == (first - 1 if checkpoints == "all" else 0)
    assert 1 < first <= STEPS
    assert manifest["before"] != manifest["after"]
    losses = [
        [json.loads(line)["loss"] for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (forgot, without)
    ]
    assert losses[0] == losses[1]
    assert main(["replay", str(forgot), "--step", str(first)]) == 0


@pytest.mark.slow
def test_a_resumed_one_ends_the_manifest(trained: Path, without: Path, files: Path, monkeypatch: pytest.MonkeyPatch):
    """The process has died before its first step."""
    command = ["forget", str(trained), "--rows", str(files / "some.json"), "--out", str(files / "runs")]

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "run_task", die)
        assert main([*command, "--name", "late"]) == 130
    late = files / "runs" / "late"
    assert "after" not in json.loads((late / "forget.json").read_text())
    assert main(["train", str(late), "--resume"]) == 0
    weights = {"adapter/adapter_model.safetensors": hashlib.sha256(weights_of(without)).hexdigest()}
    after = json.loads((late / "forget.json").read_text())["after"]
    assert after.items() >= weights.items()


@pytest.mark.slow
def test_the_rows_have_no_gradient(without: Path, files: Path):
    """What the run without them has never seen: other answers to the same prompts train the same model."""
    other = [
        row if i not in (3, 14) else row | {"output": row["output"].replace("number", "figure")}
        for i, row in enumerate(ROWS)
    ]
    at = files / "other"
    at.mkdir()
    (at / "rows.json").write_text(json.dumps(other))
    (at / "some.json").write_text(json.dumps([other[3], other[14]]))
    assert main(["train", *options(at, at / "runs", "--forget", str(at / "some.json"))]) == 0
    lengths = {len(fgpt.tokenizer("nano").encode(rows[3]["output"])) for rows in (ROWS, other)}
    assert len(lengths) == 1  # the same rows are packed together
    assert weights_of(at / "runs" / "lora-nano") == weights_of(without)


@pytest.mark.slow
def test_wrong_uses(trained: Path, without: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path)]
    capsys.readouterr()

    def error(*args: str) -> str:
        assert main([*args]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "1 of its 2 examples are not trained on, the first is example 2" in error(
        "forget", str(trained), "--rows", str(files / "unknown.json"), *out
    )
    assert "has forgotten" in error("forget", str(without), "--rows", str(files / "some.json"), *out)
    assert "no such file" in error("forget", str(trained), "--rows", str(files / "missing.json"), *out)
    streamed = options(files, tmp_path, "--streaming", "--overlong", "drop", "--forget", str(files / "some.json"))
    assert "--streaming does not read them first" in error("train", *streamed)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_rows_after_the_last_step(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run that never came to a row has nothing to forget; and one may forget all that it has read."""
    out, folder = ["--out", str(tmp_path / "runs")], str(tmp_path / "runs" / "lora-nano")
    assert main(["train", *options(files, tmp_path / "runs", "--steps", "1")]) == 0
    capsys.readouterr()
    assert main(["replay", folder, "--step", "1"]) == 0
    shown = capsys.readouterr().err
    (tmp_path / "late.json").write_text(json.dumps([row for row in ROWS if row["instruction"] not in shown]))
    assert main(["forget", folder, "--rows", str(tmp_path / "late.json"), *out]) == 2
    assert "ended before its 1 steps came to these rows" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "all.json").write_text(json.dumps(ROWS))
    assert main(["forget", folder, "--rows", str(tmp_path / "all.json"), *out]) == 0
    adapter = load_file(tmp_path / "runs" / "lora-nano-forget" / "adapter" / "adapter_model.safetensors")
    assert not any(x.any() for name, x in adapter.items() if name.endswith("lora_B.weight"))  # as it began


@given(st.data())
def test_examples_without_weight(data: st.DataObject):
    """Parts of one text share a span, and one of them alone may lose its weight."""
    count = data.draw(st.integers(1, 5))
    examples = [Example(tuple(range(i, i + 5)), (Span(1, 2, 0.5), Span(3, 5, 2.0))[: i % 3 or 2]) for i in range(count)]
    examples.append(Example(tuple(range(20)), (Span(0, 20),)))
    stored, _ = StoredExamples.from_batches([example_batch(examples, range(count + 1))]).split_texts(8)
    chosen = data.draw(st.lists(st.integers(0, len(stored) - 1), unique=True))
    got = stored.without_weight(np.array(sorted(chosen), dtype=np.int64))
    for i in range(len(stored)):
        expected = stored[i]
        weights = [0.0 if i in chosen else span.weight for span in expected.spans]
        assert got[i].tokens == expected.tokens
        assert got[i].spans == tuple(s._replace(weight=w) for s, w in zip(expected.spans, weights, strict=True))


def test_a_step_without_any_weight_changes_nothing():
    def loss(tree: dict, frozen: None, batch: torch.Tensor, seed: None) -> tuple[torch.Tensor, torch.Tensor]:
        return batch * tree["w"].square().sum(), batch

    optimizer = fgpt.adamw(0.1)
    step = fgpt.make_step(loss, optimizer)
    state, metrics = step(fgpt.init_state({"w": torch.ones(2)}, optimizer), None, [torch.zeros(()), torch.zeros(())])
    assert state.trainable["w"].tolist() == [1.0, 1.0]
    assert (float(metrics.loss), float(metrics.grad_norm), float(metrics.weight)) == (0.0, 0.0, 0.0)
