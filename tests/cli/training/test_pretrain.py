"""Pretraining: rows that lose no token, the share of the machine it uses, and a model that serves as a base."""

import base64
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from builders import SharedData

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.inference.generation import LoadedRun, encode_conversation
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training import documents, mfu
from fgpt.cli.training.examples import load_instruction_split
from fgpt.cli.training.pretraining import batches, config_of, figures, heldout_perplexity
from fgpt.data import instruction_datasets, packing
from fgpt.data.conversations import Message
from fgpt.data.prompt_templates import Example, InstructionRow, Turn, encode, encode_prompt, template
from fgpt.evaluation import likelihood
from fgpt.evaluation.likelihood import loglikelihood_rolling, perplexity
from fgpt.io import models
from fgpt.model import abstract_params
from fgpt.optim import cosine_schedule
from fgpt.recipes import PretrainingRecipe, find
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks, gpt2
from fgpt.tree import leaves, num_elements

NANO = from_ranks(models.EMBEDDED["nano"] / RANKS)
SIZE = [
    "--tokenizer",
    "nano",
    "--vocab",
    "4100",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--d-model",
    "32",
    "--max-seq-len",
    "64",
]
SHORT = [
    "--micro-batch-size",
    "2",
    "--grad-accumulation-steps",
    "3",
    "--steps",
    "16",
    "--warmup-steps",
    "4",
    "--lr",
    "1e-2",
    "--no-compile",
]


def told(name: str, times: int) -> str:
    return " ".join(f"Once there was a fox named {name}. {name} ran home to eat." for _ in range(times))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("texts")
    names = ["Tim", "Sue", "Max", "Ann", "Ben"]
    (at / "train.txt").write_text("\n<|endoftext|>\n".join(told(name, 2 + i) for i, name in enumerate(names)))
    (at / "held.txt").write_text(told("Tom", 9))
    return at / "train.txt", at / "held.txt"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, texts: tuple[Path, Path]) -> Path:
    out = tmp_path_factory.mktemp("runs")
    data = ["--data", str(texts[0]), "--heldout", str(texts[1]), "--peak-tflops", "0.05", "--eval-every", "8"]
    assert main(["train", "tinytiny-pretrain", *data, *SIZE, *SHORT, "--out", str(out)]) == 0
    return out / "tinytiny-pretrain"


# ------------------------------------------------------------------------------------------------------------ the model


def test_tinytiny_has_its_origins_parameters():
    run: Any = find("tinytiny-pretrain")
    cfg = config_of(run, 50_257)
    bare = abstract_params(cfg)
    assert bare.wpe is not None
    assert num_elements(bare) - num_elements(bare.wpe) == 26_398_080
    assert num_elements(bare.wpe) == 256 * 384
    assert bare.head is None
    assert not any(path.endswith(".b") for path in leaves(bare))
    assert run.micro_batch_size * run.grad_accumulation_steps * run.max_seq_len == 122_880
    assert mfu.flops(bare, run.max_seq_len) == 6 * 26_398_080 + 12 * 4 * 384 * 256
    lora = fgpt.lora(bare, fgpt.key(0), 32, 64.0, find("tinytiny-sft-lora").adapter.target_pattern)  # pyright: ignore
    assert fgpt.num_trainable(lora) == 2_506_752


def test_flops_worked_by_hand():
    """One layer of two heads, 4 wide, and 10 tokens: 40 in the table, 12 · 16 in the block, 12 in norms."""
    sizes: Any = {"n_layer": 1, "n_head": 2, "d_model": 4, "n_ctx": 8, "vocab_size": 10, "d_mlp": 16, "biases": ""}
    tied = abstract_params(fgpt.Config(**sizes))
    assert mfu.flops(tied, 8) == 6 * (40 + 192 + 12) + 12 * 1 * 2 * 2 * 8 == 1848
    assert (
        mfu.flops(abstract_params(fgpt.Config(**sizes, tie_word_embeddings=False)), 8) == 1848
    )  # the head multiplies, the table does not
    assert mfu.flops(tied, 4) == 1848 - 12 * 4 * 4
    assert 1e8 < mfu.peak(torch.device("cpu")) < 1e15


def test_a_model_without_biases_is_transformers_own_with_biases_of_zero(pretrained: Path):
    saved = pretrained / "model"
    ours = fgpt.load(str(saved))
    assert ours.cfg.biases == ""
    assert json.loads((saved / "config.json").read_text())["bias"] is False
    theirs = transformers.GPT2LMHeadModel.from_pretrained(saved, dtype=torch.float32).eval()
    tokens = torch.randint(0, 4096, (2, 40), generator=fgpt.key(0))
    torch.testing.assert_close(theirs(tokens).logits, fgpt.apply(ours, tokens), atol=1e-5, rtol=0)


def test_ranks_are_saved_with_a_model(tmp_path: Path):
    sizes: Any = {"n_layer": 1, "n_head": 1, "d_model": 4, "n_ctx": 8, "vocab_size": 4100, "d_mlp": 16, "biases": ""}
    fgpt.save(fgpt.init(fgpt.Config(**sizes), fgpt.key(0)), tmp_path, like=NANO)
    assert (tmp_path / RANKS).read_bytes() == (models.EMBEDDED["nano"] / RANKS).read_bytes()
    assert fgpt.tokenizer(str(tmp_path)).eos == NANO.eos
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == NANO.eos


def test_gpt2s_own_ranks_are_saved_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: SharedData):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("gpt2-bpe") / "tiktoken_cache"))
    own = gpt2()
    (tmp_path / RANKS).write_text(own.files()[RANKS])
    again, text = from_ranks(tmp_path / RANKS), " = Robert Boulter = \n 26 @.@ 4 <unk> naïve\n\n<|user|>\n"
    assert again.encode(text) == own.encode(text)
    assert (again.eos, again.n_vocab) == (50_256, 50_257)
    lines = [line.split() for line in (shared_data("gpt2-bpe") / "gpt2.tiktoken").read_text().splitlines()]
    assert [base64.b64decode(token) for token, _ in lines[-3:]] == [
        own.bpe.decode_single_token_bytes(rank) for rank in range(50_253, 50_256)
    ]


# ------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(("lengths", "seq"), [([5, 3, 9], 4), ([1], 7), ([40, 2], 6)])
def test_rows_lose_no_token(lengths: list[int], seq: int):
    """After `seq` epochs the stream ends with a row: each token was to be predicted as often as it came."""
    numbers = itertools.count(1)
    given = [torch.tensor([next(numbers) for _ in range(n)], dtype=torch.int32) for n in lengths]
    epoch = sum(lengths) + len(lengths)
    stream = documents.rows(given, 0, seq, fgpt.key(0))
    rows = [next(stream) for _ in range(epoch)]  # seq epochs of `epoch` tokens, in rows of seq
    assert Counter(t for row in rows for t in row[1:].tolist()) == Counter(
        {t: seq for x in given for t in x.tolist()} | {0: seq * len(lengths)}
    )
    after = {b: a for x in given for a, b in itertools.pairwise([0, *x.tolist()])}
    assert all(after.get(b, a) == a for row in rows for a, b in itertools.pairwise(row.tolist()))
    again = documents.rows(given, 0, seq, fgpt.key(0))
    assert all(torch.equal(row, next(again)) for row in rows)


def test_micro_batches_are_rows_one_after_the_other():
    given = [torch.arange(1, 200, dtype=torch.int32)]
    (one,) = next(batches(given, 0, PretrainingRecipe(name="a", max_seq_len=5, micro_batch_size=6), fgpt.key(1)))
    three = next(
        batches(
            given,
            0,
            PretrainingRecipe(name="a", max_seq_len=5, micro_batch_size=2, grad_accumulation_steps=3),
            fgpt.key(1),
        )
    )
    assert len(three) == 3
    assert torch.equal(torch.cat([batch.tokens for batch in three]), one.tokens)
    assert torch.equal(one.targets[:, :-1], one.tokens[:, 1:])
    assert bool(one.weights.all())


WIKI = " \n = One = \n \n Text = 3 . \n \n = = Part = = \n \n = = = Sub = = = \n \n \n = Two = \n \n More . \n \n"


def test_articles_of_wikitext_put_together_are_the_text(tmp_path: Path, shared_data: SharedData):
    assert documents.articles(WIKI) == [WIKI[: WIKI.index(" \n = Two")], WIKI[WIKI.index(" \n = Two") :]]
    assert documents.articles("plain = text = \n") == ["plain = text = \n"]
    real = (shared_data("wikitext-2") / "wiki.valid.raw").read_text()
    assert "".join(found := documents.articles(real)) == real
    assert len(found) == 60
    (tmp_path / "b.txt").write_text("one<|endoftext|>\n<|endoftext|> two \n")
    assert documents.read(tmp_path / "b.txt") == ["one", "two"]


def test_wikitext_and_tulu_as_the_hub_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = ["" if line == " \n" else line for line in WIKI.splitlines(keepends=True)]
    part = tmp_path / "wikitext-103-raw-v1"
    part.mkdir()
    for name, text in (("train", lines), ("validation", ["only this"])):
        pyarrow.parquet.write_table(pyarrow.table({"text": text}), part / f"{name}-00000-of-00001.parquet")
    (tmp_path / "data").mkdir()
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    chats = pyarrow.table({"dataset": ["x"], "messages": [said]})
    pyarrow.parquet.write_table(chats, tmp_path / "data" / "train-00000.parquet")
    monkeypatch.setattr(instruction_datasets, "download", lambda name, hub, option: tmp_path)
    assert documents.from_hub("wikitext-103") == documents.articles(WIKI)
    assert documents.from_hub("wikitext-103-valid") == ["only this"]
    (row,) = instruction_datasets.load_rows("tulu")
    assert isinstance(row, Turn)
    assert (row.messages, row.output) == ((Message("system", "s"), Message("user", "u")), "a")


def test_long_answers_are_cut_and_long_prompts_are_not():
    long = Example(tuple(range(20)), 6)
    assert packing.truncate(long, 20) == long
    assert packing.truncate(long, 9) == Example(tuple(range(9)), 6)
    assert packing.truncate(long, 8) == Example(tuple(range(8)), 6)  # two tokens of the answer
    assert packing.truncate(long, 7) == long
    kept, dropped = packing.filter_by_length([packing.truncate(long, width) for width in (8, 7)], 8, drop=True)
    assert (len(kept), dropped.long, dropped.empty) == (1, 1, 0)
    assert packing.collate([kept]).weights.tolist() == [[0, 0, 0, 0, 0, 1, 1, 0]]


# --------------------------------------------------------------------------------------------------------- the training


def test_the_schedule_falls_to_its_floor_as_torchs_does():
    run: Any = find("tinytiny-pretrain")
    schedule = cosine_schedule(run.lr, 50, warmup_steps=10, final_lr=run.lr * run.min_lr_ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=6e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=6e-5)
    ours = [float(schedule(torch.tensor(step))) for step in range(60)]
    assert ours[:10] == pytest.approx([6e-5 * (step + 1) for step in range(10)])
    for step in range(41):
        assert ours[10 + step] == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()
    assert ours[30] == pytest.approx(3.3e-4)  # half way
    assert ours[50:] == pytest.approx([6e-5] * 10)


def test_it_learns_and_says_so(pretrained: Path, texts: tuple[Path, Path]):
    metrics, result = read_metrics(pretrained / "metrics.jsonl"), json.loads((pretrained / "result.json").read_text())
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 1
    assert [m["step"] for m in metrics if "heldout_loss" in m] == [8, 16]
    assert result["perplexity"] < 0.2 * result["before"]["perplexity"]
    assert result["before"]["loss"] == pytest.approx(math.log(4100), abs=0.1)  # it knew nothing
    assert 1e-3 < metrics[-1]["lr"] < 1.2e-3 < metrics[0]["lr"]  # a tenth of the peak is left
    assert [m["tokens"] for m in metrics] == [2 * 3 * 64 * n for n in range(1, 17)]
    params = fgpt.load(str(pretrained / "model"))
    before, last = metrics[-2:]
    speed = (last["tokens"] - before["tokens"]) / (last["seconds"] - before["seconds"])
    assert last["mfu"] == pytest.approx(speed * mfu.flops(params, 64) / 0.05e12, rel=0.1)  # seconds are rounded
    assert last["heldout_loss"] == pytest.approx(result["loss"], abs=1e-2)  # saved in fp16
    tokenizer = fgpt.tokenizer(str(pretrained / "model"))
    text = documents.read(texts[1])
    assert figures(heldout_perplexity(params, tokenizer, text, 8), text) == pytest.approx(
        {name: x for name, x in result.items() if name not in ("before", "heldout_documents")}, rel=1e-4
    )


def test_held_out_figures_are_the_evaluations(pretrained: Path, texts: tuple[Path, Path], capsys: Any):
    params, text = fgpt.load(str(pretrained / "model")), documents.read(texts[1])[0]
    ended = loglikelihood_rolling(params, [*NANO.encode(text), NANO.eos], bos_token_id=NANO.bos, stride=64)
    of = heldout_perplexity(params, NANO, [text], 8)
    assert of.nats == pytest.approx(-math.fsum(ended.logprobs), rel=1e-5)
    assert (of.bytes, of.words) == perplexity([-1.0], text)[2:]
    two = heldout_perplexity(params, NANO, [text, text], 3)
    assert (two.loss, two.bits_per_byte) == pytest.approx((of.loss, of.bits_per_byte), rel=1e-5)
    assert main(["eval", "--base", str(pretrained / "model"), "--text", str(texts[1])]) == 0
    assert "word perplexity" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- as a base for SFT


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> tuple[Path, Path]:
    at = tmp_path_factory.mktemp("sft")
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (i % 9 + 1)} for i in range(40)]
    (at / "rows.json").write_text(json.dumps(rows))
    options = ["--base", str(pretrained / "model"), "--data", str(at / "rows.json"), "--out", str(at), "--steps", "2"]
    small = [
        "--micro-batch-size",
        "2",
        "--num-heldout",
        "8",
        "--warmup-steps",
        "1",
        "--compare-prompts",
        "0",
        "--max-new-tokens",
        "6",
    ]
    for name in ("tinytiny-sft-full", "tinytiny-sft-lora"):
        assert main(["train", name, *options, *small]) == 0
    return at / "tinytiny-sft-full", at / "tinytiny-sft-lora"


def test_a_pretrained_model_serves_full_tuning_and_lora_alike(tuned: tuple[Path, Path], capsys: Any):
    full, lora = (read_metrics(at / "metrics.jsonl") for at in tuned)
    assert full[0]["loss"] == pytest.approx(lora[0]["loss"], abs=1e-5)  # the same rows over the same base
    assert [m["weight"] for m in full] == [m["weight"] for m in lora]
    assert [m["tokens"] for m in full] == [m["tokens"] for m in lora]
    assert (tuned[0] / "model").is_dir()
    assert (tuned[1] / "adapter").is_dir()
    assert main(["compare", str(tuned[0]), str(tuned[1]), "--num-prompts", "3"]) == 0
    found = json.loads((tuned[0].parent / "compare-tinytiny-sft-full-tinytiny-sft-lora" / "compare.json").read_text())
    assert list(found["scores"]) == ["base", "tinytiny-sft-full", "tinytiny-sft-lora"]
    assert main(["generate", str(tuned[1]), "Say 3.", "--max-new-tokens", "3"]) == 0


def test_training_generation_and_evaluation_use_one_prompt(tuned: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    run, row = run_dir.read_run(tuned[0]), InstructionRow("Name a fox.", "", "Tim.")
    assert run.template == "tulu"
    text = "<|user|>\nName a fox.\n<|assistant|>\n"
    prompt = encode_prompt(row, template("tulu"), NANO)
    assert NANO.decode(list(prompt)) == text
    example = encode(row, template("tulu"), NANO)
    assert example.tokens[: example.prompt_length] == prompt
    assert NANO.decode(list(example.tokens)) == text + "Tim.<|endoftext|>"
    assert compare_sides.encode_prompts(compare_sides.Contender("base", run), [row], NANO) == [prompt]
    params = fgpt.load(run.base)
    assert encode_conversation(LoadedRun(run, params, NANO), [InstructionRow("Name a fox.")]) == list(prompt)
    read: list[list[int]] = []
    hidden = likelihood.hidden
    monkeypatch.setattr(likelihood, "hidden", lambda p, x: (read.extend(x.tolist()), hidden(p, x))[1])
    assert main(["eval", str(tuned[0])]) == 0
    prompts = [list(encode_prompt(each, template("tulu"), NANO)) for each in load_instruction_split(run)[1]]
    assert 4 <= len(read) <= len(prompts) == 8  # rows longer than the context are left out
    assert all(any(x[: len(prompt)] == prompt for prompt in prompts) for x in read)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: expected a text in UTF-8"),
        (["--data", "empty.txt"], "empty.txt: holds no text"),
        (["--data", "bytes.txt"], "bytes.txt: expected a text in UTF-8"),
        (["--data", "one.txt"], "one.txt holds one document: name another text to measure on, --heldout FILE"),
        (["--data", "one.txt", "--heldout", "missing.txt"], "missing.txt: expected a text"),
        (["--max-seq-len", "1"], "--max-seq-len is 1: expected 2 or more"),
        (["--steps", "0"], "steps is 0: expected 1 or more"),
        (["--grad-accumulation-steps", "0"], "--grad-accumulation-steps is 0: expected 1 or more"),
        (["--eval-every", "0"], "--eval-every is 0: expected 1 or more"),
        (["--peak-tflops", "0"], "--peak-tflops is 0.0: expected a number above 0"),
        (["--vocab", "4000"], "vocab is 4000: expected a row for each of the 4096 tokens, or more"),
        (["--n-head", "5"], "does not divide into 5 heads"),
        (["--source", "wikipedia"], "wikipedia"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n<|endoftext|>\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "one.txt").write_text("Once.")
    assert main(["train", "tinytiny-pretrain", *SIZE, *args]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert not (tmp_path / "runs").exists()


def test_tuning_wants_the_pretrained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 120))
    assert main(["train", "tinytiny-sft-lora", "--data", "rows.json"]) == 2
    assert "runs/tinytiny-pretrain/model: no such model folder" in capsys.readouterr().err
