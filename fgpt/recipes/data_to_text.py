"""Recipes that write a text from data: the meaning representations of the E2E NLG challenge."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fgpt.generation.beam import LengthPenalty
from fgpt.ranges import BatchSize, CountOrFraction, NonNegativeInt, PositiveInt
from fgpt.recipes.instruction import InstructionRecipe
from fgpt.recipes.tuning import Adapter

E2E = "tuetschek/e2e_nlg@refs/convert/parquet"
"""The challenge's dataset on the Hub, at the revision without a program."""


@dataclass(frozen=True, kw_only=True)
class DataToTextRecipe(InstructionRecipe):
    """Data-to-text generation: from a meaning representation to a text, scored against several references each."""

    kind: ClassVar[str] = "data-to-text"

    test: str | None = None
    """The inputs to answer and score, as for data: rows of equal inputs are the references of one."""
    template: str = "data-to-text"
    num_heldout: CountOrFraction = 0
    """Rows to hold out of training. Rows of one input are divided, too: eval_data is the better measure."""
    compare_prompts: NonNegativeInt = 0
    """Held-out prompts that base and tuned model answer after training; 0 for none."""
    max_new_tokens: PositiveInt = 64
    """New tokens of a text, at most."""
    num_beams: BatchSize = 10
    """Beams of the search by which a run is scored."""
    length_penalty: LengthPenalty = 0.8
    """Beam search divides log-probabilities by the length to this power."""
    no_repeat_ngram: NonNegativeInt = 4
    """No n-gram of so many tokens twice in a text; 0 allows them. The input does not count."""

    def suggest_use(self, folder: Path) -> str:
        return f"it writes texts from data: fgpt eval run {shlex.quote(str(folder))} scores them"


def e2e_medium() -> DataToTextRecipe:
    """The LoRA paper's GPT-2 medium on E2E NLG: r 4, alpha 32 on q and v, data from the Hub.

    fgpt train e2e-medium, then fgpt eval run e2e-medium; of the challenge's files: --data trainset.csv --test
    testset_w_refs.csv. 393,216 trained parameters. The settings are those of the paper's table 11 and of its code, the
    gradient clipped to a norm of 1 and rows sorted by length apart. Not measured yet: it needs the Hub. With --base
    smollm2 --quantize int8 --lr 1e-3 --warmup-steps 5 --steps 50 --data devset.csv, 400 rows of the development set,
    BLEU 62.0, NIST 6.97, METEOR 42.3, ROUGE-L 69.2, CIDEr 2.64 on the first 100 test inputs by 4 beams.
    """
    return DataToTextRecipe(
        name="e2e-medium",
        base="gpt2-medium",
        data=(E2E,),
        test=f"{E2E}[test]",
        adapter=Adapter(rank=4, alpha=32, dropout=0.1, target=r"blocks\..*\.(q|v)"),
        lr=2e-4,
        lr_scheduler_type="linear",
        warmup_steps=500,
        weight_decay=0.01,
        label_smoothing_factor=0.1,
        epochs=5,
        max_seq_len=512,
        packing=False,
        micro_batch_size=8,
    )


def e2e_nano() -> DataToTextRecipe:
    """e2e-medium on the embedded base, which is small: LoRA (r 16, alpha 32, every linear layer), a higher rate, one
    epoch.

    fgpt train e2e-nano --data devset.csv --test testset_w_refs.csv, then fgpt eval run e2e-nano. 294,912 trained
    parameters. After the challenge's development set, 4,672 rows, BLEU 41.1, NIST 4.30, METEOR 25.6, ROUGE-L 50.7,
    CIDEr 0.51 on the 630 test inputs: fluent texts, of which 382 name the right restaurant. 584 steps in 930 s and the
    texts in 214 s of CPU time on two cores of an AMD EPYC that others kept busy; 0.70 GB.
    """
    return replace(
        e2e_medium(),
        name="e2e-nano",
        base="nano",
        adapter=Adapter(rank=16, alpha=32, target=r"blocks\..*\.(q|k|v|o|up|down)"),
        lr=6e-3,
        warmup_steps=50,
        label_smoothing_factor=0.0,
        epochs=1,
    )


RECIPES: tuple[Callable[[], DataToTextRecipe], ...] = (e2e_medium, e2e_nano)
