"""Recipes that pretrain: from random parameters to a model folder, which is then a base."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from fgpt.recipes.training import TrainingRecipe
from fgpt.recipes.tuning import Length, default_warmup


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(TrainingRecipe):
    """Next-token training of a small GPT-2 from random parameters on a stream of documents."""

    kind: ClassVar[str] = "pretraining"

    data: tuple[Path, ...] = ()
    """Text files of documents separated by <|endoftext|>, or of WikiText articles; without any, source is used."""
    source: Literal["tinystories", "wikitext-103"] = "tinystories"
    """The dataset on the Hugging Face Hub if no files are given."""
    heldout: Path | None = None
    """A file of held-out text. None takes WikiText's validation split from the Hub; of other data it holds out 500
    documents, or a twentieth if that is less; of a single text the last tenth."""
    tokenizer: str = "nano"
    """The model whose tokenizer is used; gpt2 needs no model, only its merges."""
    vocab: PositiveInt | None = None
    """Rows of the token embedding; None takes as many as there are tokens."""
    n_layer: Annotated[int, Range(least=1, most=1024)] = 4
    """Transformer blocks."""
    n_head: PositiveInt = 4
    """Attention heads."""
    d_model: PositiveInt = 256
    """The hidden size."""
    biases: bool = True
    """Give linear layers and norms a bias."""
    max_seq_len: Length = 512
    """Tokens in a sequence, which is the model's context length too."""
    micro_batch_size: BatchSize = 4
    """Sequences in a micro-batch."""
    grad_accumulation_steps: BatchSize = 1
    """Micro-batches in an optimizer step."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate of AdamW, after linear warmup and before cosine decay to min_lr_ratio of it."""
    min_lr_ratio: Annotated[float, Range(least=0, most=1)] = 0.01
    """Final learning rate / peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Of AdamW. The second is high: in 2,048 tokens a step, most tokens of the vocabulary do not occur."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warmup; None takes 150, or a tenth of the training if that is less."""
    weight_decay: NonNegativeFloat = 0.1
    """Of AdamW, on matrices and embeddings alone."""
    steps: PositiveInt = 6600
    """Optimizer steps."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of the device, for the model FLOPs utilization (MFU); None measures it."""
    compile: bool = True
    """Compile the training step: 0.95 of its time on a CPU, after 34 s of CPU time. Needs a C++ compiler."""

    def suggest_use(self, folder: Path) -> str:
        model = shlex.quote(str(folder / "model"))
        return f"tune it first, fgpt train RECIPE --base {model}, or fgpt eval text FILE --base {model}"

    def num_warmup_steps(self) -> int:
        """Steps of linear warmup."""
        return default_warmup(WARMUP, self.steps) if self.warmup_steps is None else self.warmup_steps


WARMUP = 150


def pretrain_nano() -> PretrainingRecipe:
    """How the embedded base was made: a 4.3 M GPT-2 on simple English stories.

    fgpt train pretrain-nano takes TinyStories from the Hub. The embedded file is of other, local stories:
    fgpt train pretrain-nano --data stories-train.txt.xz tinystories_sample.txt --heldout stories-valid.txt

    13.5 M tokens, 2.8 epochs of 26,674 stories; 0.702 bits per character on 500 held-out stories; 1.1 GB. 48 minutes on
    2 cores of an AMD EPYC without other load (4,700 tokens/s; the embedded file was made beside other work).
    """
    return PretrainingRecipe(name="pretrain-nano")


def tinytiny_pretrain() -> PretrainingRecipe:
    """A 26 M GPT-2 without biases on WikiText-103 from the Hub: 122,880 tokens a step.

    fgpt train tinytiny-pretrain, or on local files: --data wiki.train.raw.xz --heldout wiki.valid.raw. 26,398,080
    parameters and 98,304 of positions; 6,000 steps are 6.2 epochs of WikiText-103 and need a GPU: a thread of an AMD
    EPYC reads 350 tokens/s (62 % of its peak) in 2.6 GB, so that an epoch of WikiText-2 takes two hours. Its folder
    model/ is the base of tinytiny-sft-full and tinytiny-sft-lora. Not measured to its end: 0.3 epochs of WikiText-2,
    737,280 tokens in an hour of one busy thread, bring the held-out loss from 10.9 to 6.42 nats per token in many small
    steps (--grad-accumulation-steps 1 --lr 2e-3 --betas 0.9 0.99 --steps 240 --warmup-steps 25), to 6.84 in few large
    ones (--grad-accumulation-steps 4 --steps 60 --warmup-steps 10).
    """
    return PretrainingRecipe(
        name="tinytiny-pretrain",
        source="wikitext-103",
        tokenizer="gpt2",
        vocab=50_304,
        n_layer=4,
        n_head=4,
        d_model=384,
        biases=False,
        max_seq_len=256,
        micro_batch_size=12,
        grad_accumulation_steps=40,
        lr=6e-4,
        min_lr_ratio=0.1,
        betas=(0.9, 0.95),
        warmup_steps=800,
        steps=6000,
        eval_every=500,
    )


RECIPES: tuple[Callable[[], PretrainingRecipe], ...] = (pretrain_nano, tinytiny_pretrain)
