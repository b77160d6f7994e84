"""The main job, end to end: real training in small, what it leaves behind, and what bad input brings."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.build import load_base
from fgpt.recipes import RECIPES, InstructionRecipe, find

ROOT = Path(__file__).parents[1]
SHORT = ["--steps", "6", "--micro-batch-size", "2", "--compare-prompts", "4", "--max-new-tokens", "24"]
"""Enough to train, save and compare in seconds."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", "lora-nano", *SHORT, "--warmup-steps", "1", "--out", str(out)]) == 0
    return out / "lora-nano"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"The number is {i}."} for i in range(24)]
    path.write_text(json.dumps(rows))
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert len(said) == 1, said
    return said[0]


# ---------------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_all_it_promises(trained: Path):
    names = {p.name for p in trained.iterdir()}
    assert names == {
        *("run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard", "loss.png"),
        *("checkpoints", "adapter", "compare.md", "compare.html", "compare.json"),
    }
    metrics = read_metrics(trained / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert all(m["memory_gb"] > 0 and m["tokens"] > 0 for m in metrics)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    compared = json.loads((trained / "compare.json").read_text())
    assert len(compared["answers"]) == 4
    assert compared["scores"]["tuned"].keys() == compared["scores"]["base"].keys()
    page, text = (trained / "compare.html").read_text(), (trained / "compare.md").read_text()
    for row in compared["answers"]:
        assert " ".join(row["instruction"].split()) in text
    assert page.count("<tr>") > 4


def test_the_resolved_run_reads_back(trained: Path):
    run = run_dir.read_run(trained)
    assert isinstance(run, InstructionRecipe)
    assert (run.steps, run.micro_batch_size, run.max_new_tokens, run.base) == (6, 2, 24, "nano")
    assert run.adapter == find("lora-nano").adapter  # pyright: ignore[reportAttributeAccessIssue]


def test_the_adapter_is_peft_s(trained: Path):
    import peft
    import transformers

    from fgpt.io import models

    base = transformers.GPT2LMHeadModel.from_pretrained(models.EMBEDDED["nano"], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained / "adapter").eval()
    tokens = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0))
    ours = fgpt.apply(run_dir.load_tuned(trained, fgpt.load("nano")), tokens)
    torch.testing.assert_close(theirs(tokens).logits, ours, atol=1e-5, rtol=0)
    assert not torch.equal(ours, fgpt.apply(fgpt.load("nano"), tokens))


def test_generate_and_compare_again(trained: Path, capsys: pytest.CaptureFixture[str]):
    before = (trained / "compare.json").read_text()
    assert main(["generate", str(trained), "Write a story about a fox named Tim.", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["compare", str(trained)]) == 0
    assert (trained / "compare.json").read_text() == before  # greedy: the same again, from the files alone


def test_full_tuning_leaves_a_model(tmp_path: Path, data: Path):
    options = ["--adapter.kind", "full", "--adapter.target", ".*", "--lr", "1e-4", "--num-heldout", "4"]
    assert main(["train", "lora-nano", *options, *SHORT, "--data", str(data), "--out", str(tmp_path)]) == 0
    saved = fgpt.load(str(tmp_path / "lora-nano" / "model"))
    base = fgpt.load("nano")
    assert not torch.equal(saved.blocks[0].attn.q.w, base.blocks[0].attn.q.w)  # pyright: ignore
    assert saved.cfg == base.cfg


METHODS = {name: [name] for name in RECIPES if name.endswith("-nano") and name != "pretrain-nano"} | {
    "bias": ["lora-nano", "--adapter.kind", "bias", "--adapter.target", r".*\.b", "--lr", "1e-2"],
    "dropout": ["lora-nano", "--adapter.dropout", "0.2"],
    "remat": ["qdora-nano", "--remat"],
}


def test_every_method_trains_saves_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """They differ in what they train: the first loss, before any step, is the base's, and from then on they part."""
    losses = {}
    for name, args in METHODS.items():
        options = [
            "--steps",
            "3",
            "--micro-batch-size",
            "1",
            "--warmup-steps",
            "1",
            "--compare-prompts",
            "0",
            "--out",
            str(tmp_path / name),
        ]
        assert main(["train", *args, *options]) == 0
        out = tmp_path / name / args[0]
        losses[name] = [m["loss"] for m in read_metrics(out / "metrics.jsonl")]
        run = run_dir.read_run(out)
        base = load_base(run)
        tokens = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0))
        assert not torch.equal(fgpt.apply(run_dir.load_tuned(out, base), tokens), fgpt.apply(load_base(run), tokens))
        assert main(["generate", str(out), "Write a story about a fox.", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()
    quantized = {name for name in METHODS if name.startswith("q") or name == "remat"}
    for alike in (quantized, METHODS.keys() - quantized):
        first = [losses[name][0] for name in alike]
        assert max(first) - min(first) < 1e-5
    assert losses["qlora-nano"][0] != losses["lora-nano"][0]
    assert losses["remat"] == pytest.approx(losses["qdora-nano"], abs=1e-5)
    ends = [losses[name][2] for name in METHODS if name != "remat"]
    assert len(set(ends)) == len(ends)


def test_merge_says_what_it_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [
        "--steps",
        "8",
        "--micro-batch-size",
        "1",
        "--warmup-steps",
        "1",
        "--compare-prompts",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "qlora-nano", *options]) == 0
    out = tmp_path / "qlora-nano"
    capsys.readouterr()
    assert main(["merge", str(out)]) == 2
    assert "was trained over nf4: give --merge-base dequantized" in one_line(capsys)
    assert not list(out.glob("merged*"))
    tokens = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0))
    tuned = fgpt.apply(run_dir.load_tuned(out, load_base(run_dir.read_run(out))), tokens)
    for onto, least, most in (("dequantized", 0.0, 1e-3), ("original", 0.1, 50.0)):
        assert main(["merge", str(out), "--merge-base", onto]) == 0
        told = json.loads((out / f"merged-{onto}" / "merge.json").read_text())
        merged = fgpt.load(str(out / f"merged-{onto}"))
        assert least <= told["read back"]["logit"] <= most
        assert least <= float((fgpt.apply(merged, tokens) - tuned).abs().max()) <= most
        assert f"{told['read back']['logit']:.3g}" in capsys.readouterr().err
    assert {p.name for p in out.glob("merged*")} == {"merged-dequantized", "merged-original"}  # each is still there


def test_a_second_run_of_a_name_keeps_the_first(tmp_path: Path, data: Path):
    for _ in range(2):
        options = [*SHORT[:-4], "--compare-prompts", "0", "--data", str(data), "--num-heldout", "4"]
        assert main(["train", "lora-nano", *options, "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora-nano", "lora-nano-2"]
    assert run_dir.find_finished("lora-nano", tmp_path).name == "lora-nano-2"
    first, second = (fgpt.load_peft(tmp_path / n / "adapter", fgpt.load("nano")) for n in ("lora-nano", "lora-nano-2"))
    for path in first:  # the same seed, the same adapter
        assert torch.equal(first[path].b, second[path].b)  # pyright: ignore[reportAttributeAccessIssue]


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)


def test_runs_are_listed_newest_first(trained: Path, capsys: pytest.CaptureFixture[str]):
    out = trained.parent
    for age, name, state in ((300, "mine", "running"), (600, "broken", "failed")):
        (out / name).mkdir()
        values = json.loads((trained / "run.json").read_text()) | {"name": name}
        (out / name / "run.json").write_text("[]" if name == "broken" else json.dumps(values))
        (out / name / "status.json").write_text(json.dumps({"state": state, "steps": 9}))
        (out / name / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
        written = trained.joinpath("run.json").stat().st_mtime - age
        os.utime(out / name / "run.json", (written, written))
    assert main(["runs", "--out", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    loss = f"{read_metrics(trained / 'metrics.jsonl')[-1]['loss']:.3f}"
    assert lines == [
        ["name", "recipe", "step", "loss", "state"],
        ["lora-nano", "lora-nano", "6/6", loss, "finished"],
        ["mine", "lora-nano", "2/9", "1.500", "killed"],  # no process has its lock
        ["broken", "damaged"],
    ]
    assert main(["runs", "--out", str(out / "none")]) == 0
    assert "no runs in" in capsys.readouterr().out
    for name in ("mine", "broken"):
        shutil.rmtree(out / name)


def test_ctrl_c_leaves_a_usable_adapter(tmp_path: Path):
    command = [sys.executable, "-m", "fgpt", "train", "lora-nano", "--epochs", "100", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "lora-nano" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    adapters = fgpt.load_peft(tmp_path / "lora-nano" / "adapter", fgpt.load("nano"))
    assert all(bool(x.b.any()) for x in adapters.values())  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian", "lora-nano"], "expected one of train"),
        (["train"], "expected a recipe"),
        (["train", "lora-nanno"], "did you mean lora-nano"),
        (["train", "lora-nano", "--lrr", "1"], "no option --lrr; did you mean --lr"),
        (["train", "lora-nano", "--lr", "fast"], "fast"),
        (["train", "lora-nano", "--template", "chta"], "no template named 'chta'; there are alpaca, plain, chat"),
        (["train", "lora-nano", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["train", "lora-nano", "--data", "missing.json"], "missing.json: no such file"),
        (["train", "lora-nano", "--base", "./missing"], "no such model folder"),
        (["train", "lora-nano", "--adapter.rank", "300"], "expected 1 to 256"),
        (["train", "lora-nano", "--adapter.target", r"blocks\.\d+\.atn\.q"], "matches no path; nearest are"),
        (["train", "lora-nano", "--adapter.target", "("], "not a regular expression"),
        (["train", "lora-nano", "--max-seq-len", "20"], "tokens, the limit is 20"),
        (["generate", "lora-nano", "hi", "--max-new-tokens", "x"], "x"),
        (["generate", "nothing", "hi"], "no trained run 'nothing'"),
        (["compare", "nothing"], "no trained run 'nothing'"),
        (["merge", "nothing"], "no trained run 'nothing'"),
        (["merge", "nothing", "--merge-base", "both"], "both"),
        (["train", "lora-nano", "--quantize", "nf5"], "nf5"),
        (["train", "full-nano", "--quantize", "nf4"], "which is quantized"),
        (["train", "lora-nano", "--adapter.dropout", "1"], "--adapter.dropout is 1.0: expected 0 or more, below 1"),
        (["train", "ia3-nano", "--adapter.target", "wte"], "IA3 on wte: expected a linear layer"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []  # nothing half-made


def test_bad_columns_and_rows(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", str(tmp_path / "runs")]
    assert main(["train", "lora-nano", "--data", str(data), "--columns.output", "answer", *out]) == 2
    assert "no column 'answer'; there are 'instruction', 'input', 'output'" in one_line(capsys)
    single = tmp_path / "single.json"
    single.write_text(json.dumps([{"instruction": "Say one.", "output": "one"}]))
    assert main(["train", "lora-nano", "--data", str(single), *out]) == 2
    assert "single.json has 1 rows: expected 2 or more, one of them to be held out" in one_line(capsys)
    silent = tmp_path / "silent.json"
    silent.write_text(json.dumps([{"instruction": "Say nothing.", "output": ""}] * 9))
    assert main(["train", "lora-nano", "--data", str(silent), "--num-heldout", "2", *out]) == 2
    assert "row 1 has no response" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_nan_ends_with_one_line_and_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", "lora-nano", "--lr", "1e30", "--warmup-steps", "0", *SHORT, "--out", str(tmp_path)]
    assert main(args) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: the loss became")
    assert "lower --lr" in said
    left = {p.name for p in (tmp_path / "lora-nano").iterdir()}
    assert left == {"run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard"}


def test_a_tokenizer_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    fgpt.save(fgpt.init(fgpt.Config(1, 1, 8, 64, 1000, 32), fgpt.key(0)), model, like="nano")
    assert main(["train", "lora-nano", "--base", str(model), "--out", str(tmp_path / "runs")]) == 2
    assert "the vocabulary does not fit the model" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/shm").exists(), reason="mounting a full disk needs root")
def test_a_full_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        command = [sys.executable, "-m", "fgpt", "train", "lora-nano", *SHORT, "--out", str(disk)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert not list(disk.rglob("*.safetensors"))
        assert [p.name for p in disk.rglob(".*")] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_hub_away_says_so_at_once(tmp_path: Path):
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    for options, thing in (([], "alpaca"), (["--data", str(tmp_path / "rows.json")], "gpt2-medium")):
        rows = [{"instruction": "a", "output": "b"}] * 80
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        command = [sys.executable, "-m", "fgpt", "train", "lora-medium", *options]
        command += ["--out", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
        assert done.returncode == 2
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("held out")]
        assert len(lines) <= 2, lines
        assert thing in lines[0]
        assert "lora-nano" in lines[-1]
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.slow
def test_pretraining_learns_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stories = tmp_path / "stories.txt"
    told = [f"Once there was a fox named {name}. {name} ran home." for name in ("Tim", "Sue")]
    stories.write_text("\n<|endoftext|>\n".join(told))
    options = [
        "--data",
        str(stories),
        "--heldout",
        str(stories),
        "--steps",
        "60",
        "--warmup-steps",
        "5",
        "--micro-batch-size",
        "2",
    ]
    size = ["--n-layer", "1", "--n-head", "2", "--d-model", "32", "--max-seq-len", "32", "--no-compile"]
    assert main(["train", "pretrain-nano", *options, *size, "--lr", "1e-2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "pretrain-nano" / "result.json").read_text())
    assert result["bits_per_character"] < 0.5 < math.log2(4096) / 4  # it knows its two stories by heart
    params = fgpt.load(str(tmp_path / "pretrain-nano" / "model"))
    assert params.cfg.n_layer == 1
    assert "Once" in capsys.readouterr().err
