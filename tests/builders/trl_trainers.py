"""TRL's trainers of a tiny GPT-2, for the loss of a batch of theirs."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fgpt

EOS, PAD = 30, 29
OFFLINE: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w28, each one token."""
    vocab = {f"w{i}": i for i in range(PAD)} | {"<pad>": PAD, "<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    special: dict[str, Any] = {"unk_token": "w0", "pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def trainer(cls: Any, config: Any, model: Any, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """A trainer in evaluation mode, which draws no dropout, and its one batch of all rows."""
    model.config.pad_token_id = PAD
    args = {name: options.pop(name) for name in list(options) if name not in ("ref_model",)}
    args = config(output_dir=str(folder), per_device_train_batch_size=len(rows), **OFFLINE, **args)
    made = cls(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(), **options)
    made.model.eval()
    return made, next(iter(made.get_train_dataloader()))


def batch_of(rows: list[tuple[list[int], list[int]]]) -> fgpt.Batch:
    """Prompts with their answers, each answer with an end-of-sequence token; the weights are 1 on the answers."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + 1
    tokens, weights = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width)
    for i, (prompt, answer) in enumerate(rows):
        full = [*prompt, *answer, EOS]
        tokens[i, : len(full)] = torch.tensor(full)
        weights[i, len(prompt) : len(full)] = 1
    return fgpt.Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), weights[:, 1:].contiguous())
