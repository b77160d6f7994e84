"""What every recipe that fine-tunes a base has: the adapter, the base, and how it is trained."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from fgpt.recipes.training import TrainingRecipe

Epochs: TypeAlias = Annotated[float, Range(above=0, most=1e6)]
Length: TypeAlias = Annotated[int, Range(least=2, most=2**31 - 1)]
"""Tokens in a sequence: a single token predicts nothing."""

Kind: TypeAlias = Literal["lora", "dora", "ia3", "ln", "bias", "full"]


@dataclass(frozen=True)
class AdapterDefaults:
    """The defaults of a kind of adapter."""

    target: str
    """Regular expression for whole paths of layers (lora, dora, ia3) or of parameters (the others)."""
    lr: float


ADAPTER_DEFAULTS: dict[Kind, AdapterDefaults] = {
    "lora": AdapterDefaults(r"blocks\..*\.(q|k|v|o)", 3e-4),
    "dora": AdapterDefaults(r"blocks\..*\.(q|k|v|o)", 3e-4),
    "ia3": AdapterDefaults(r"blocks\..*\.(k|v)", 3e-2),
    "ln": AdapterDefaults(r".*ln_.*", 2e-2),
    "bias": AdapterDefaults(r".*\.b", 2e-2),
    "full": AdapterDefaults(".*", 5e-5),
}


@dataclass(frozen=True)
class Adapter:
    """What is trained."""

    kind: Kind = "lora"
    """lora: a low-rank update of each target layer. dora: that with magnitude and direction apart. ia3: a scale for
    keys, values and the input of each MLP's second layer. ln, bias, full: norms, biases, all parameters."""
    rank: PositiveInt = 8
    """Of lora and dora."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """On the input of each lora or dora while training."""
    target: str | None = None
    """Regular expression for whole paths of what is trained, such as blocks\\..*\\.(q|v); None takes the kind's own.
    For ia3, of the layers whose outputs are scaled."""

    @property
    def target_pattern(self) -> str:
        return ADAPTER_DEFAULTS[self.kind].target if self.target is None else self.target


@dataclass(frozen=True, kw_only=True)
class FineTuningRecipe(TrainingRecipe):
    """Training of an adapter on a frozen base."""

    base: str
    """nano (embedded), smollm2 (a package), a local folder or GGUF file, or a name on the Hugging Face Hub."""
    adapter: Adapter = field(default_factory=Adapter)
    new_tokens: tuple[str, ...] = ()
    """Special tokens to add to the base's tokenizer, such as "<|user|>" "<|assistant|>", wherever they stand in a text.
    Their rows of the embedding, and of a head of its own, are trained besides the adapter; a token that exists is not
    added, and its row trained."""
    quantize: Literal["nf4", "fp4", "int8", "blockwise8"] | None = None
    """Quantize the base's linear layers to 4 or 8 bits."""
    remat: bool = False
    """Activation (gradient) checkpointing: recompute each block in the backward pass. A step takes a quarter more time,
    and its peak memory above the model falls to some 0.6."""
    compile: bool = False
    """Compile the transformer block: one program for all layers, batch sizes and widths. Needs a C++ compiler and, the
    first time, 13 to 39 s of CPU time; on a CPU a gradient then takes 0.92 (SmolLM2) to 0.97 (GPT-2) of its time."""
    lr: PositiveFloat | None = None
    """Peak learning rate, after linear warmup and before cosine decay to 0. None takes the adapter kind's."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps its moments in 8 bits."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warmup; None takes 20, or a tenth of the training if that is less."""
    weight_decay: NonNegativeFloat = 0.0
    """Of AdamW."""
    epochs: Epochs = 1.0
    """Passes over the examples."""
    steps: PositiveInt | None = None
    """Optimizer steps, in place of epochs."""
    max_seq_len: Length
    """Tokens in a sequence. Examples are packed into sequences; each attends to itself alone."""
    micro_batch_size: BatchSize | Literal["auto"]
    """Sequences in a micro-batch. auto takes the most that fit into a GPU's memory, and as many micro-batches as leave
    the optimizer step its sequences; on a CPU, where larger ones gain nothing, the recipe's own number."""
    grad_accumulation_steps: BatchSize = 1
    """Micro-batches in an optimizer step."""

    @property
    def rows_per_update(self) -> int:
        """Sequences in an optimizer step. While micro_batch_size is auto, grad_accumulation_steps is their number."""
        return self.grad_accumulation_steps * (1 if self.micro_batch_size == "auto" else self.micro_batch_size)

    @property
    def peak_lr(self) -> float:
        return ADAPTER_DEFAULTS[self.adapter.kind].lr if self.lr is None else self.lr

    def num_warmup_steps(self, steps: int) -> int:
        """Of `steps` optimizer steps, those of linear warmup."""
        return default_warmup(WARMUP, steps) if self.warmup_steps is None else self.warmup_steps


WARMUP = 20


def default_warmup(usual: int, steps: int) -> int:
    """The steps of warmup if none are given: `usual`, but at most a tenth of `steps` (rounded up, as transformers
    rounds `warmup_ratio`), so that a short training reaches its learning rate too.

    >>> default_warmup(20, steps=30)
    3
    """
    return min(usual, math.ceil(steps / 10))
