"""Our options by the names that they have in transformers, TRL, litgpt and PEFT: hints for errors, and no aliases."""

import re

OPTIONS = {
    # model and data
    "model": "--base",
    "model-name": "--base",
    "model-name-or-path": "--base",
    "base-model": "--base",
    "checkpoint-dir": "--base",
    "pretrained": "--base",
    "tokenizer-name": "--tokenizer",
    "tokenizer-dir": "--tokenizer",
    "dataset": "--data",
    "dataset-name": "--data",
    "dataset-path": "--data",
    "train-file": "--data",
    "train-data": "--data",
    "validation-file": "--heldout",
    "test-file": "--test",
    "val-split-fraction": "--num-heldout",
    "test-size": "--num-heldout",
    "dataset-text-field": "--columns.text",
    "text-column": "--columns.text",
    "label-column": "--columns.label",
    "prompt-column": "--columns.instruction",
    "response-column": "--columns.output",
    "chat-template": "--template chat",
    "chat-template-path": "--template chat",
    "prompt-style": "--template",
    "prompt-template": "--template",
    # length and batch
    "max-length": "--max-seq-len",
    "max-seq-length": "--max-seq-len",
    "seq-len": "--max-seq-len",
    "seq-length": "--max-seq-len",
    "block-size": "--max-seq-len",
    "cutoff-len": "--max-seq-len",
    "sequence-len": "--max-seq-len",
    "context-length": "--max-seq-len",
    "truncation": "--overlong cut",
    "per-device-train-batch-size": "--micro-batch-size",
    "per-device-eval-batch-size": "--batch-size",
    "train-batch-size": "--micro-batch-size",
    "device-batch-size": "--micro-batch-size",
    "batch-size": "--micro-batch-size",
    "global-batch-size": "--grad-accumulation-steps",
    "gradient-accumulation-steps": "--grad-accumulation-steps",
    "gradient-accumulation-iters": "--grad-accumulation-steps",
    "accumulate-grad-batches": "--grad-accumulation-steps",
    "grad-accum": "--grad-accumulation-steps",
    "grad-accum-steps": "--grad-accumulation-steps",
    # optimization
    "learning-rate": "--lr",
    "max-lr": "--lr",
    "peak-lr": "--lr",
    "min-lr": "--min-lr-ratio",
    "min-lr-rate": "--min-lr-ratio",
    "final-lr-frac": "--min-lr-ratio",
    "num-train-epochs": "--epochs",
    "num-epochs": "--epochs",
    "max-epochs": "--epochs",
    "max-steps": "--steps",
    "num-steps": "--steps",
    "num-iterations": "--steps",
    "max-iters": "--steps",
    "iters": "--steps",
    "train-iters": "--steps",
    "num-warmup-steps": "--warmup-steps",
    "lr-warmup-steps": "--warmup-steps",
    "warmup-ratio": "--warmup-steps",
    "warmup-iters": "--warmup-steps",
    "optim": "--optimizer",
    "optim-type": "--optimizer",
    "adam-beta1": "--betas",
    "adam-beta2": "--betas",
    # memory and precision
    "gradient-checkpointing": "--remat",
    "fsdp": "--shard-base",
    "grad-checkpoint": "--remat",
    "activation-checkpointing": "--remat",
    "load-in-4bit": "--quantize nf4",
    "use-4bit": "--quantize nf4",
    "bnb-4bit-quant-type": "--quantize nf4",
    "load-in-8bit": "--quantize int8",
    "quantization": "--quantize",
    "bits": "--quantize",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype bfloat16",
    "precision": "--dtype",
    "torch-dtype": "--dtype",
    "model-dtype": "--dtype",
    "mixed-precision": "--dtype bfloat16",
    "torch-compile": "--compile",
    "no-cuda": "--device cpu",
    "use-cpu": "--device cpu",
    # adapters
    "peft-type": "--adapter.kind",
    "use-peft": "--adapter.kind lora",
    "use-lora": "--adapter.kind lora",
    "use-dora": "--adapter.kind dora",
    "finetuning-type": "--adapter.kind",
    "full-finetuning": "--adapter.kind full",
    "r": "--adapter.rank",
    "rank": "--adapter.rank",
    "lora-r": "--adapter.rank",
    "lora-rank": "--adapter.rank",
    "alpha": "--adapter.alpha",
    "lora-alpha": "--adapter.alpha",
    "dropout": "--adapter.dropout",
    "lora-dropout": "--adapter.dropout",
    "target": "--adapter.target",
    "target-modules": "--adapter.target",
    "lora-target": "--adapter.target",
    "lora-target-modules": "--adapter.target",
    "lora-query": "--adapter.target",
    "lora-key": "--adapter.target",
    "lora-value": "--adapter.target",
    "modules-to-save": "--tune-also",
    "init-lora-weights": "--adapter.init",
    "adapter-name-or-path": "--adapter.init",
    "adapter-path": "--adapter.init",
    "lora-path": "--adapter.init",
    # the run: output, logs, checkpoints, held-out loss
    "output-dir": "--out",
    "out-dir": "--out",
    "save-dir": "--out",
    "run-name": "--name",
    "exp-name": "--name",
    "project-name": "--name",
    "report-to": "--tracker",
    "logger-name": "--tracker",
    "log-with": "--tracker",
    "wandb": "--tracker wandb",
    "eval-steps": "--eval-every",
    "eval-interval": "--eval-every",
    "eval-strategy": "--eval-every",
    "evaluation-strategy": "--eval-every",
    "steps-per-eval": "--eval-every",
    "save-steps": "--checkpoint-every-minutes",
    "save-every": "--checkpoint-every-minutes",
    "save-interval": "--checkpoint-every-minutes",
    "save-strategy": "--checkpoint-every-minutes",
    "save-total-limit": "--keep-checkpoints",
    "load-best-model-at-end": "--keep-best",
    "load-best-at-end": "--keep-best",
    "resume-from-checkpoint": "--resume",
    "resume-adapter-file": "--resume",
    "random-seed": "--seed",
    "data-seed": "--seed",
    # generation and evaluation
    "max-tokens": "--max-new-tokens",
    "max-gen-toks": "--max-new-tokens",
    "temp": "--temperature",
    "beams": "--num-beams",
    "beam-size": "--num-beams",
    "n": "--num-return-sequences",
    "num-samples": "--num-return-sequences",
    "no-repeat-ngram-size": "--no-repeat-ngram",
    "stop-sequences": "--stop",
    "stop-strings": "--stop",
    "fewshot": "--num-fewshot",
    "shots": "--num-fewshot",
    "apply-chat-template": "--chat",
    "output-path": "--out",
}
"""Names without their dashes in front, - for _; the values are options, or options with a value."""

MODULES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "c_attn": "q|k|v",
    "c_proj": "o|down",
    "c_fc": "up",
    "fc_in": "up",
    "fc_out": "down",
    "query_key_value": "q|k|v",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "all-linear": "q|k|v|o|gate|up|down",
    "embed_tokens": "wte",
    "lm_head": "head",
}
"""Our layers by the names that they have in transformers' GPT-2, GPT-J, GPT-NeoX and Llama."""


def similar_option(option: str) -> str | None:
    """Our option for the name of another library's; None if there is none.

    >>> similar_option("--load_in_4bit")
    '--quantize nf4'
    """
    return OPTIONS.get(option.lstrip("-").replace("_", "-").lower())


def target_hint(target: str) -> str | None:
    r"""What to write for a target that names modules of transformers; None if it names none.

    >>> target_hint("q_proj|v_proj")
    'q_proj is q here, v_proj is v here: --adapter.target "blocks\\..*\\.(q|v)"'
    """
    modules = [name for name in MODULES if re.search(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])", target)]
    if not modules:
        return None
    layers = list(dict.fromkeys("|".join(MODULES[name] for name in modules).split("|")))
    names = ", ".join(f"{name} is {MODULES[name].replace('|', ', ')} here" for name in modules)
    inside = [layer for layer in layers if layer not in ("wte", "head")]
    parts = [rf"blocks\..*\.({'|'.join(inside)})"] if inside else []
    parts += [layer for layer in layers if layer in ("wte", "head")]
    return f'{names}: --adapter.target "{"|".join(parts)}"'
