"""Folders of models that both lm-eval and we read."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fgpt
from builders.tokenizers import CHATML, SPECIAL, train_tokenizer
from fgpt.cli.evaluation.lm_eval_model import Model

FOLDERS = TemporaryDirectory()
CONTEXT = 48


@cache
def model_folder(kind: str) -> Path:
    """A tiny random model that transformers has saved, with a tokenizer of 500 tokens; two put a BOS before texts."""
    path = Path(FOLDERS.name) / kind
    path.mkdir()
    tokenizer = train_tokenizer()
    if kind == "gpt2":
        tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(path / "tokenizer.json"))
    begin, end = ("<|endoftext|>",) * 2 if kind == "gpt2" else ("<|im_start|>", "<|im_end|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    config |= {"clean_up_tokenization_spaces": False, "chat_template": CHATML, "additional_special_tokens": SPECIAL}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    sizes |= {
        "bos_token_id": tokenizer.token_to_id(begin),
        "eos_token_id": tokenizer.token_to_id(end),
        "pad_token_id": None,
    }
    if kind == "llama":
        llama = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
        rest = {"intermediate_size": 40, "max_position_embeddings": CONTEXT}
        model: Any = LlamaForCausalLM(LlamaConfig(**llama, **rest, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=CONTEXT, **sizes))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            p.copy_(0.3 * torch.randn(p.shape, generator=rng) + gain)
    model.save_pretrained(path)
    return path


def hf_lm(kind: str, rows: int = 1) -> HFLM:
    return HFLM(str(model_folder(kind)), device="cpu", dtype="float32", batch_size=rows)


def our_lm(kind: str, rows: int = 4) -> Model:
    return Model(fgpt.load(str(model_folder(kind))), fgpt.tokenizer(str(model_folder(kind))), rows)


def requests_of(kind: Any, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in args]
