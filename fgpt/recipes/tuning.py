"""What every recipe that fine-tunes a base has: the adapter, the base, and how it is trained."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from fgpt.adapter_defaults import RANK, TARGET
from fgpt.errors import InputError
from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, Seed
from fgpt.recipes.pattern_options import parse_patterns
from fgpt.recipes.training import TrainingRecipe

Epochs: TypeAlias = Annotated[float, Range(above=0, most=1e6)]
Length: TypeAlias = Annotated[int, Range(least=2, most=2**31 - 1)]
"""Tokens in a sequence: a single token predicts nothing."""

Kind: TypeAlias = Literal["lora", "dora", "ia3", "ln", "bias", "full"]
INITIALIZATIONS = ("default", "pissa", "olora", "eva", "lora_ga")
"""What a LoRA can begin as; any other word is a run, or a folder of adapters."""


@dataclass(frozen=True)
class AdapterDefaults:
    """The defaults of a kind of adapter."""

    target: str
    """Regular expression for whole paths of layers (lora, dora, ia3) or of parameters (the others)."""
    lr: float


ADAPTER_DEFAULTS: dict[Kind, AdapterDefaults] = {
    "lora": AdapterDefaults(TARGET, 5e-4),  # ten times full tuning's: Schulman et al. 2025, "LoRA Without Regret"
    "dora": AdapterDefaults(TARGET, 5e-4),
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
    rank: PositiveInt = RANK
    """Of lora and dora."""
    alpha: PositiveFloat | None = None
    """The update is scaled by alpha / rank. None takes twice the rank."""
    rs: bool = False
    """rsLoRA, of lora and dora: scale by alpha / sqrt(rank)."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks for some layers, each as REGEX=RANK, such as blocks\\..*\\.(up|down)=16; the first that matches a
    layer's whole path counts. Of lora and dora."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas for some layers, each as REGEX=ALPHA."""
    dropout: Fraction = 0.0
    """On the input of each lora or dora while training."""
    target: str | None = None
    """Regular expression for whole paths of what is trained, such as blocks\\..*\\.(q|v); None takes the kind's own.
    For ia3, of the layers whose outputs are scaled."""
    init: str = "default"
    """What lora begins as: default (A random, B 0), pissa, olora, eva or lora_ga; what they take from the base is given
    back in what is saved. Or, of any kind, the adapter of a run or of a folder in PEFT's format, to train it on."""

    @property
    def target_pattern(self) -> str:
        return ADAPTER_DEFAULTS[self.kind].target if self.target is None else self.target

    @property
    def ranks(self) -> dict[str, int]:
        """`rank_pattern` as a mapping. Raises InputError if it is malformed."""
        values = parse_patterns(self.rank_pattern, "--adapter.rank-pattern", "'.*\\.(up|down)=16'")
        if broken := [value for value in values.values() if value != int(value)]:
            raise InputError(f"--adapter.rank-pattern: a rank is {broken[0]:g}: expected an integer of 1 or more")
        return {pattern: int(value) for pattern, value in values.items()}

    @property
    def alphas(self) -> dict[str, float]:
        """`alpha_pattern` as a mapping. Raises InputError if it is malformed."""
        return parse_patterns(self.alpha_pattern, "--adapter.alpha-pattern", "'.*\\.(up|down)=32'")

    def check(self) -> None:
        """Raises InputError for a malformed pattern, and for options that this kind of adapter does not have."""
        values = {"--adapter.rs": self.rs, "--adapter.rank-pattern": self.ranks, "--adapter.alpha-pattern": self.alphas}
        used = [option for option, value in values.items() if value]
        if used and self.kind not in ("lora", "dora"):
            raise InputError(f"{used[0]} is of --adapter.kind lora and dora: {self.kind} has none, leave it out")
        if self.init not in INITIALIZATIONS or self.init == "default":
            return
        if self.kind != "lora":
            raise InputError(f"--adapter.init {self.init} is of --adapter.kind lora, not of {self.kind}: leave it out")
        if self.rank_pattern or self.alpha_pattern:
            raise InputError(
                f"--adapter.init {self.init} gives all layers one rank: leave out --adapter.rank-pattern and "
                ".alpha-pattern"
            )


@dataclass(frozen=True)
class Privacy:
    """Differential privacy of each example that is trained on: DP-SGD, by any optimizer."""

    epsilon: PositiveFloat | None = None
    """The privacy budget of the whole training: each example is a row, what it adds to a step is bounded, and noise is
    added that hides it. None trains without."""
    delta: Annotated[float, Range(above=0, below=1)] | None = None
    """The probability that epsilon does not hold: below 1 / examples, such as 1e-5."""
    max_norm: PositiveFloat = 0.1
    """The largest norm of an example's gradient, which is summed over its tokens. It takes the place of the clipping of
    the whole gradient."""
    seed: Seed | None = None
    """Of the noise and of which examples a step reads: who knows it can take the noise away. None draws one, which
    local.json of the run holds."""

    def check(self) -> None:
        """Raises InputError for a budget of one number, and for options without a budget."""
        if self.epsilon is not None and self.delta is None:
            raise InputError(
                f"--privacy.epsilon {self.epsilon:g} is a budget with --privacy.delta: give one below 1 / examples, "
                "such as 1e-5"
            )
        if self.epsilon is None and self != Privacy():
            raise InputError(
                "--privacy.delta, .max-norm and .seed are of --privacy.epsilon: give it, or leave them out"
            )


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
    quantize: Literal["nf4", "fp4", "int8", "rotated-int8", "blockwise8"] | None = None
    """Quantize the base's linear layers to 4 or 8 bits. int8 is the fast format on a CPU; rotated-int8 spreads outliers
    before it rounds, with a sixth of int8's cost in loss. nf4 is the small one."""
    shard_base: bool = False
    """Under torchrun, hold only this process's part of each matrix of the blocks, and gather what a product needs: the
    same bits, for a base that does not fit otherwise. With --adapter.kind full it is also what is trained that is in
    parts, with its gradients and moments."""
    remat: bool = False
    """Activation (gradient) checkpointing: recompute each block in the backward pass. A step takes a quarter more time,
    and its peak memory above the model falls to some 0.6."""
    compile: bool = False
    """Compile the transformer block: one program for all layers, batch sizes and widths. Needs a C++ compiler and, the
    first time, 13 to 39 s of CPU time; on a CPU a gradient then takes 0.92 (SmolLM2) to 0.97 (GPT-2) of its time."""
    cuda_graphs: bool = False
    """Record each training step as a CUDA graph: one call starts all its kernels, for which a small model waits
    otherwise. What is trained, with its moments, takes two copies more in memory. adamw8bit cannot be recorded."""
    lr: PositiveFloat | None = None
    """Peak learning rate, after linear warmup and before the decay to 0. None takes the adapter kind's."""
    lr_scheduler_type: Literal["cosine", "linear"] = "cosine"
    """The form of the decay to 0 after the warmup. schedule_free_adamw has none."""
    lr_multipliers: tuple[str, ...] = ()
    """Factors of lr for some of what is trained, each as REGEX=FACTOR for whole paths; the first that matches counts.
    LoRA+ is '.*/b=16': each B learns 16 times as fast as its A."""
    optimizer: Literal["adamw", "adamw8bit", "muon", "schedule_free_adamw"] = "adamw"
    """adamw8bit keeps its moments in 8 bits. muon orthogonalizes the update of each matrix, at AdamW's rates.
    schedule_free_adamw averages its iterates in place of the decay of lr."""
    ema_decay: Fraction | None = None
    """Evaluate and save the exponential moving average of what is trained, with this weight of the past; None takes the
    last state."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warmup; None takes 20, or a tenth of the training if that is less."""
    weight_decay: NonNegativeFloat = 0.0
    """Of every optimizer: lr times this share of each matrix is subtracted in each step."""
    neftune_noise_alpha: NonNegativeFloat = 0.0
    """NEFTune: noise uniform in ±alpha / √(sequence length · width of the model) on the embeddings in training; 5 is
    usual."""
    epochs: Epochs = 1.0
    """Passes over the examples."""
    steps: PositiveInt | None = None
    """Optimizer steps, in place of epochs."""
    lengthened_at: tuple[PositiveInt, ...] = ()
    """Steps after which this run had finished once: until then, lr is that of a training so long. --resume with more
    --steps or --epochs adds to them."""
    max_seq_len: Length
    """Tokens in a sequence. Examples are packed into sequences; each attends to itself alone."""
    micro_batch_size: BatchSize | Literal["auto"]
    """Sequences in a micro-batch. auto takes the most that fit into a GPU's memory, and as many micro-batches as leave
    the optimizer step its sequences; on a CPU, where larger ones gain nothing, the recipe's own number."""
    grad_accumulation_steps: BatchSize = 1
    """Micro-batches in an optimizer step."""
    privacy: Privacy = field(default_factory=Privacy)
    """Differential privacy of the examples."""
    per_example: bool = False
    """Compute the gradient of each training row at the end, of 10,000 rows at most: say how noisy they are, write loss
    and norm of each to per_example.jsonl, and show the worst percent in the report, where mislabeled rows are."""

    def check_schedule(self) -> None:
        """Raises InputError for a decay that the optimizer does not have."""
        if self.optimizer == "schedule_free_adamw" and self.lr_scheduler_type != "cosine":
            raise InputError(
                f"--lr-scheduler-type {self.lr_scheduler_type} is a decay: schedule_free_adamw has none, leave it out"
            )

    @property
    def multipliers(self) -> dict[str, float]:
        """`lr_multipliers` as a mapping. Raises InputError if it is malformed."""
        return parse_patterns(self.lr_multipliers, "--lr-multipliers", "'.*/b=16'")

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
