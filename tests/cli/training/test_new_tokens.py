"""--new-tokens: rows that are trained beside the adapter, and a tokenizer that goes with the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.training.build import load_base
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.tree import leaves

NEW = ["<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("new_tokens") / "rows.jsonl"
    lines = [{"instruction": f"<|user|> say {i}", "output": f"<|assistant|> {i}"} for i in range(24)]
    file.write_text("\n".join(json.dumps(x) for x in lines))
    return file


def train(rows: Path, out: Path, *args: str) -> int:
    options = ["--micro-batch-size", "1", "--warmup-steps", "1", "--compare-prompts", "0", "--data", str(rows)]
    options += ["--num-heldout", "4", "--max-seq-len", "64", "--new-tokens", *NEW, "--out", str(out)]
    return main(["train", "lora-nano", "--steps", "3", *options, *args])


@pytest.mark.slow
def test_a_run_with_new_tokens_is_used_with_them(rows: Path, tmp_path: Path):
    assert train(rows, tmp_path) == 0
    out = tmp_path / "lora-nano"
    recipe: Any = run_dir.read_run(out)
    assert recipe.new_tokens == tuple(NEW)
    base, tokenizer = load_base(recipe), load_tokenizer(recipe).tokenizer
    assert base.cfg.vocab_size == tokenizer.n_vocab == 4098
    adapters = fgpt.load_peft(out / "adapter", base)
    assert adapters.keys() >= {"wte", "blocks.0.attn.q"}
    assert tokenizer.encode("<|user|>") == [4096]
    tokens = torch.tensor([tokenizer.encode_special("<|user|> hello <|assistant|>")])
    assert {4096, 4097} < {*tokens[0].tolist()}
    assert AutoTokenizer.from_pretrained(out / "adapter")("<|user|>")["input_ids"] == [4096]
    assert main(["generate", str(out), "<|user|> Hello", "--max-new-tokens", "3"]) == 0
    assert main(["merge", str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(fgpt.apply(fgpt.adapt(base, adapters), tokens), logits, atol=1e-3, rtol=0)
    assert AutoTokenizer.from_pretrained(out / "merged")("a<|assistant|>")["input_ids"][-1] == 4097
    assert main(["compare", str(out), "--num-prompts", "2", "--max-new-tokens", "3"]) == 0
    assert main(["eval", "run", str(out)]) == 0
    (tmp_path / "text.txt").write_text("<|user|> some text <|assistant|> and more of it.")
    assert main(["eval", "text", str(tmp_path / "text.txt"), "--run", str(out)]) == 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(rows: Path, tmp_path: Path):
    assert train(rows, tmp_path, "--checkpoint-every-minutes", "0") == 0
    done = tmp_path / "lora-nano"
    whole = leaves(run_dir.load_tuned(done, load_base(run_dir.read_run(done))))  # pyright: ignore[reportArgumentType]
    (done / "status.json").write_text(json.dumps(json.loads((done / "status.json").read_text()) | {"state": "failed"}))
    shutil.rmtree(done / "adapter")
    shutil.rmtree(done / "checkpoints" / "step-000003")
    assert main(["train", str(done), "--resume"]) == 0
    again = leaves(run_dir.load_tuned(done, load_base(run_dir.read_run(done))))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(x, again[path]) for path, x in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "target"), [("full", ".*"), ("ln", ".*ln_.*"), ("dora", r"blocks\..*\.q"), ("ia3", r"blocks\..*\.k")]
)
def test_every_kind_trains_the_new_rows(kind: str, target: str, rows: Path, tmp_path: Path):
    assert train(rows, tmp_path, "--adapter.kind", kind, "--adapter.target", target) == 0
    out = tmp_path / "lora-nano"
    recipe: Any = run_dir.read_run(out)
    if kind == "full":
        assert fgpt.load(str(out / "model")).cfg.vocab_size == 4098
        assert fgpt.tokenizer(str(out / "model")).encode_special("<|user|>") == [4096]
    tuned, base = run_dir.load_tuned(out, load_base(recipe)), load_base(recipe)
    old, new = fgpt.dense(base.wte.w), fgpt.dense(tuned.wte.w)
    assert not torch.equal(old[4096:], new[4096:])
    assert torch.equal(old[:4095], new[:4095]) is (kind != "full")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--new-tokens", "<a>", ""], "new token '' is empty or white space"),
        (["--new-tokens", "<a>", "<a>"], "new token '<a>' is given twice"),
        (["--adapter.target", "wte"], "--adapter.target adapts wte, and --new-tokens trains rows of it"),
    ],
)
def test_wrong_options(args: list[str], error: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(rows, tmp_path, *args) != 0
    shown = capsys.readouterr()
    assert error in " ".join((shown.out + shown.err).split())
