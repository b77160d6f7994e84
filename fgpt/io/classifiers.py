"""A classifier in Hugging Face's layout, as transformers' `AutoModelForSequenceClassification` reads it.

transformers reads the class at the last token that is not `pad_token_id`. Our texts end with the token that ends a
document, which must not be that: a model that has no other token for it gets one, `<|pad|>`, and a row of zeros in its
embedding table if no row is unused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fgpt.classification_head import num_classes
from fgpt.errors import InputError
from fgpt.families.mapping import Place
from fgpt.layers import has_quantized
from fgpt.model import GPT, Embedding, Linear
from fgpt.tokenizers.chat_template import TOKENIZER_CONFIG
from fgpt.tokenizers.huggingface import TOKENIZER_JSON
from fgpt.tokenizers.special_tokens import SPECIAL_TOKENS_MAP, token_content

PAD = "<|pad|>"
Files = Mapping[str, bytes | str]


def with_head(body: GPT, score: Any, place: Place) -> GPT:
    """`body`, which has no head, with the head of classes that a file holds, as `place` casts it.

    Raises InputError if that is none.
    """
    if not isinstance(score, Tensor) or not score.is_floating_point() or score.ndim != 2:
        raise InputError("tensor score.weight: expected a matrix of a floating dtype, [classes, d_model]")
    if score.shape[1] != body.cfg.d_model or not len(score):
        raise InputError(f"tensor score.weight: expected shape [classes, {body.cfg.d_model}], got {list(score.shape)}")
    return replace(body, head=Linear(place("head.w", score)), cfg=replace(body.cfg, tie_word_embeddings=False))


def to_hf_classifier(
    params: GPT, files: Files, config: Mapping[str, Any], labels: Sequence[str]
) -> tuple[GPT, Files, dict[str, Any]]:
    """A classifier as it is to be written, the files of its tokenizer, and what its `config.json` says besides the
    family's fields in `config`: architecture, names of the classes and padding.

    Raises InputError for a classifier over quantized weights, or labels that are not one for each class.
    """
    if has_quantized(params):
        raise InputError('a classifier over quantized weights has no such format: merge(params, base="dequantized")')
    more = _labels(config, num_classes(params) or 0, labels)
    if TOKENIZER_JSON not in files:
        return params, files, more
    padded, files, pad = _with_pad_token(params, files, config.get("eos_token_id"))
    return padded, files, more | {"pad_token_id": pad, "vocab_size": padded.cfg.vocab_size}


def _labels(config: Mapping[str, Any], classes: int, labels: Sequence[str]) -> dict[str, Any]:
    names = list(labels) or [f"LABEL_{i}" for i in range(classes)]
    if len(names) != classes or len(set(names)) < classes:
        raise InputError(f"a head of {classes} classes: expected as many labels, each once, got {', '.join(names)}")
    family = config["architectures"][0].removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return {
        "architectures": [f"{family}ForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _with_pad_token(params: GPT, files: Files, eos: Any) -> tuple[GPT, Files, int]:
    """Model and tokenizer with a token for padding, which is none that ends a text; and that token."""
    from tokenizers import Tokenizer

    config = _read(files.get(TOKENIZER_CONFIG, "{}"))
    tokenizer = Tokenizer.from_str(_text(files[TOKENIZER_JSON]))
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.token_to_id(token_content(config.get("eos_token")))}
    token = PAD
    for name in ("unk_token", "pad_token"):  # the last that will do
        known = tokenizer.token_to_id(token_content(config.get(name)))
        if known is not None and known not in ends and known < params.cfg.vocab_size:
            token = token_content(config[name])
    tokenizer.add_special_tokens([token])
    pad = tokenizer.token_to_id(token)
    assert pad is not None
    more = {TOKENIZER_JSON: tokenizer.to_str(pretty=True), TOKENIZER_CONFIG: _json(config | {"pad_token": token})}
    if SPECIAL_TOKENS_MAP in files:
        more[SPECIAL_TOKENS_MAP] = _json(_read(files[SPECIAL_TOKENS_MAP]) | {"pad_token": token})
    return _with_rows(params, pad + 1), {**files, **more}, pad


def _with_rows(params: GPT, rows: int) -> GPT:
    """`params` with at least `rows` rows in its embedding table; new ones are zero."""
    table = params.wte.w
    if rows <= params.cfg.vocab_size or not isinstance(table, Tensor):
        return params
    zeros = table.new_zeros(rows - len(table), table.shape[1])
    return replace(params, wte=Embedding(torch.cat([table, zeros])), cfg=replace(params.cfg, vocab_size=rows))


def _text(data: bytes | str) -> str:
    return data.decode() if isinstance(data, bytes) else data


def _read(data: bytes | str) -> dict[str, Any]:
    read = json.loads(_text(data))
    return read if isinstance(read, dict) else {}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
