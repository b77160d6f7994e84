"""What every run that tunes a base has: what is trained, over which base, and how."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from fgpt.recipes.training import TrainingRecipe

Epochs: TypeAlias = Annotated[float, Range(above=0, most=1e6)]
Length: TypeAlias = Annotated[int, Range(least=2, most=2**31 - 1)]
"""Of a row: one token predicts nothing."""

Kind: TypeAlias = Literal["lora", "dora", "ia3", "ln", "bias", "full"]


@dataclass(frozen=True)
class AdapterDefaults:
    """What a kind of adapter does when it is not told otherwise."""

    target: str
    """Regular expression that must match the whole path of a layer (lora, dora, ia3), or of a leaf (the others)."""
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
    """What is trained, and from where."""

    kind: Kind = "lora"
    """lora: a low-rank product beside each target layer. dora: that, and each row's magnitude apart. ia3: a scale for
    each key and value, and for each input of the MLP's second product. ln, bias, full: norms, biases, all leaves."""
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    """Of the input of each LoRA, while training."""
    target: str | None = None
    """Regular expression for the whole path of what is adapted or tuned; None takes the kind's own. For ia3, of the
    layers whose outputs are scaled."""

    @property
    def target_pattern(self) -> str:
        return ADAPTER_DEFAULTS[self.kind].target if self.target is None else self.target


@dataclass(frozen=True, kw_only=True)
class FineTuningRecipe(TrainingRecipe):
    """Training of an adapter over a frozen base."""

    base: str
    """Embedded ("nano"), packaged ("smollm2"), a local folder or GGUF file, or a hub name."""
    adapter: Adapter = field(default_factory=Adapter)
    quantize: Literal["nf4", "fp4", "int8", "blockwise8"] | None = None
    """Hold the base's block matrices in 4 or 8 bits."""
    remat: bool = False
    """Compute each block again in the backward instead of keeping it: a tenth is saved for the backward, a step's peak
    above the model falls to some 0.6, and it takes a quarter more time."""
    lr: PositiveFloat | None = None
    """Peak learning rate of AdamW; it rises over `warmup` steps and falls to 0 on a cosine. None takes the kind's."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    warmup_steps: NonNegativeInt | None = None
    """Updates over which the rate rises; None takes 20, or a tenth of the training where that is less."""
    weight_decay: NonNegativeFloat = 0.0
    epochs: Epochs = 1.0
    steps: PositiveInt | None = None
    """Stop after so many updates; None trains `epochs`."""
    max_seq_len: Length
    """Tokens in a row, into which examples are packed, each seeing itself alone."""
    micro_batch_size: BatchSize
    """Rows in a micro-batch."""
    grad_accumulation_steps: BatchSize = 1
    """Micro-batches in an update."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base and the activations. Adapters and optimizer state are fp32."""

    @property
    def peak_lr(self) -> float:
        return ADAPTER_DEFAULTS[self.adapter.kind].lr if self.lr is None else self.lr

    def num_warmup_steps(self, steps: int) -> int:
        """Over how many of `steps` updates the rate rises."""
        return default_warmup(WARMUP, steps) if self.warmup_steps is None else self.warmup_steps


WARMUP = 20


def default_warmup(usual: int, steps: int) -> int:
    """A warm-up that nobody asked for: the usual one, but no more than a tenth of the training (rounded up, as
    transformers rounds `warmup_ratio`), so that a short one comes to its rate as well.
    """
    return min(usual, math.ceil(steps / 10))
