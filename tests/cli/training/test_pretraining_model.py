"""The model that pretraining makes: its size, its flops, its files."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import SharedData

import fgpt
from fgpt.cli.tasks.pretraining import config_of
from fgpt.cli.training import mfu
from fgpt.io import models
from fgpt.model import abstract_params
from fgpt.recipes import find
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks, gpt2
from fgpt.tree import leaves, num_elements

NANO = from_ranks(models.EMBEDDED["nano"] / RANKS)


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
    sizes: Any = {"n_layer": 1, "n_head": 2, "d_model": 4, "n_ctx": 8, "vocab_size": 10, "d_mlp": 16}
    sizes |= {"biases": frozenset()}
    tied = abstract_params(fgpt.Config(**sizes))
    assert mfu.flops(tied, 8) == 6 * (40 + 192 + 12) + 12 * 1 * 2 * 2 * 8 == 1848
    assert (
        mfu.flops(abstract_params(fgpt.Config(**sizes, tie_word_embeddings=False)), 8) == 1848
    )  # the head multiplies, the table does not
    assert mfu.flops(tied, 4) == 1848 - 12 * 4 * 4
    assert 1e8 < mfu.peak(torch.device("cpu")) < 1e15


def test_a_model_without_biases_is_transformers_own_with_biases_of_zero(pretrained_run: Path):
    saved = pretrained_run / "model"
    ours = fgpt.load(str(saved))
    assert ours.cfg.biases == frozenset()
    assert json.loads((saved / "config.json").read_text())["bias"] is False
    reference = transformers.GPT2LMHeadModel.from_pretrained(saved, dtype=torch.float32).eval()
    tokens = torch.randint(0, 4096, (2, 40), generator=fgpt.key(0))
    torch.testing.assert_close(reference(tokens).logits, fgpt.apply(ours, tokens), atol=1e-5, rtol=0)


def test_ranks_are_saved_with_a_model(tmp_path: Path):
    sizes: Any = {"n_layer": 1, "n_head": 1, "d_model": 4, "n_ctx": 8, "vocab_size": 4100, "d_mlp": 16}
    sizes |= {"biases": frozenset()}
    fgpt.save(fgpt.init(fgpt.Config(**sizes), fgpt.key(0)), tmp_path, like=NANO)
    assert (tmp_path / RANKS).read_bytes() == (models.EMBEDDED["nano"] / RANKS).read_bytes()
    assert fgpt.tokenizer(str(tmp_path)).eos_token_id == NANO.eos_token_id
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == NANO.eos_token_id


def test_gpt2s_own_ranks_are_saved_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: SharedData):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data("gpt2-bpe") / "tiktoken_cache"))
    tokenizer = gpt2()
    (tmp_path / RANKS).write_text(tokenizer.files()[RANKS])
    reloaded, text = from_ranks(tmp_path / RANKS), " = Robert Boulter = \n 26 @.@ 4 <unk> naïve\n\n<|user|>\n"
    assert reloaded.encode(text) == tokenizer.encode(text)
    assert (reloaded.eos_token_id, reloaded.n_vocab) == (50_256, 50_257)
    lines = [line.split() for line in (shared_data("gpt2-bpe") / "gpt2.tiktoken").read_text().splitlines()]
    assert [base64.b64decode(token) for token, _ in lines[-3:]] == [
        tokenizer.bpe.decode_single_token_bytes(rank) for rank in range(50_253, 50_256)
    ]
