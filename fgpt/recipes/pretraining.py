"""The runs that pretrain: from random params to a model folder, which is then a base."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from fgpt.recipes.training import TrainingRecipe
from fgpt.recipes.tuning import Length, default_warmup


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(TrainingRecipe):
    """Next-token training of a small GPT-2 from random params on a stream of documents."""

    data: tuple[Path, ...] = ()
    """Text files of documents separated by <|endoftext|>, or of WikiText's articles; none takes `source`."""
    source: Literal["tinystories", "wikitext-103"] = "tinystories"
    """What the hub gives where no files are named."""
    heldout: Path | None = None
    """A text for the held-out figures; None takes WikiText's validation part from the hub, and of all else keeps 500
    of the training documents out, or a twentieth if that is less."""
    tokenizer: str = "nano"
    """The model whose tokenizer is used; "gpt2" is GPT-2's own, which needs no model, but its ranks once."""
    vocab: PositiveInt | None = None
    """Rows of the token table; None takes as many as there are tokens."""
    n_layer: Annotated[int, Range(least=1, most=1024)] = 4
    n_head: PositiveInt = 4
    d_model: PositiveInt = 256
    biases: bool = True
    """Of the block matrices and norms."""
    max_seq_len: Length = 512
    """Tokens in a row, and the model's context."""
    micro_batch_size: BatchSize = 4
    """Rows in a micro-batch."""
    grad_accumulation_steps: BatchSize = 1
    """Micro-batches in an update."""
    lr: PositiveFloat = 3e-3
    """Peak of AdamW's rate; it rises over `warmup` steps and falls on a cosine to `floor` of it."""
    min_lr_ratio: Annotated[float, Range(least=0, most=1)] = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """A second moment of long memory: with 2,048 tokens a step most tokens' gradients are absent from most steps."""
    warmup_steps: NonNegativeInt | None = None
    """None takes 150, or a tenth of the training where that is less."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices and tables alone."""
    steps: PositiveInt = 6600
    peak_tflops: PositiveFloat | None = None
    """The machine's TFLOP/s, for the share that training uses (see `mfu`); None measures it."""
    compile: bool = True
    """Compile the gradient (needs a C++ compiler); about 1.4x on a CPU."""

    def num_warmup_steps(self) -> int:
        """Over how many updates the rate rises."""
        return default_warmup(WARMUP, self.steps) if self.warmup_steps is None else self.warmup_steps


WARMUP = 150


def pretrain_nano() -> PretrainingRecipe:
    """How the embedded base was made: a 4.3 M GPT-2 on simple English stories.

    just train pretrain-nano takes TinyStories from the hub. The embedded file is of other, local stories:
    just train pretrain-nano --data stories-train.txt.xz tinystories_sample.txt --heldout stories-valid.txt

    13.5 M tokens, 2.8 epochs of 26,674 stories; 0.702 bits per character on 500 held-out stories; 1.1 GB. 48 minutes on
    2 cores of an AMD EPYC where it is alone (4,700 tokens/s; the embedded file was made beside other work).
    """
    return PretrainingRecipe(name="pretrain-nano")


def tinytiny_pretrain() -> PretrainingRecipe:
    """A 26 M GPT-2 without biases on WikiText-103 from the hub: 122,880 tokens an update.

    just train tinytiny-pretrain, or on local files: --data wiki.train.raw.xz --heldout wiki.valid.raw. 26,398,080
    parameters and 98,304 of positions; 6,000 updates are 6.2 epochs of WikiText-103 and want a GPU: a thread of an AMD
    EPYC reads 350 tokens/s (62 % of its peak) in 2.6 GB, so that an epoch of WikiText-2 takes two hours. Its folder
    model/ is the base of tinytiny-sft-full and tinytiny-sft-lora. Not measured to its end: 0.3 epochs of WikiText-2,
    737,280 tokens in an hour of one busy thread, bring the held-out loss from 10.9 to 6.42 nats a token in many small
    updates (--grad-accumulation-steps 1 --lr 2e-3 --betas 0.9 0.99 --steps 240 --warmup-steps 25), to 6.84 in few large ones
    (--grad-accumulation-steps 4 --steps 60 --warmup-steps 10).
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


RUNS: tuple[Callable[[], PretrainingRecipe], ...] = (pretrain_nano, tinytiny_pretrain)
