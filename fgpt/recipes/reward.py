"""Recipes that train reward models: one number for an answer, higher for those that are preferred."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from fgpt.data.preferences import PreferenceColumns
from fgpt.ranges import BatchSize, CountOrFraction, NonNegativeFloat
from fgpt.recipes.instruction import lora_nano
from fgpt.recipes.tuning import FineTuningRecipe, Length


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(FineTuningRecipe):
    """A reward model, trained on pairs of a chosen and a rejected answer: an adapter and a new head of one row."""

    kind: ClassVar[str] = "reward"

    data: tuple[str, ...]
    """One or several files of pairs: prompt, chosen, rejected; or a folder, or a dataset on the Hugging Face Hub."""
    columns: PreferenceColumns = field(default_factory=PreferenceColumns)
    """The names of the columns, where they are not the usual ones."""
    template: str = "auto"
    """The prompt template: alpaca, plain, tulu, chat (the base's own), or none for prompts that hold theirs. auto takes
    chat if the base has a chat template, else alpaca."""
    max_seq_len: Length = 512
    """Tokens of a prompt with its answer, at most. Rows are not packed."""
    micro_batch_size: BatchSize = 8
    """Pairs in a micro-batch."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with pairs of which an answer ends after max_seq_len tokens: error refuses to start, drop leaves them
    out."""
    num_heldout: CountOrFraction = 64
    """Pairs to hold out of training; below 1 the fraction of them. A tenth if these would be more than half."""
    center_rewards_coefficient: NonNegativeFloat = 0.0
    """The weight of (sum of a pair's rewards)² in the loss, which keeps rewards around 0; 0.01 is usual."""

    def suggest_use(self, folder: Path) -> str:
        path = shlex.quote(str(folder))
        return f"it is a reward model: fgpt eval run {path} scores pairs, fgpt merge {path} exports it"


def reward_nano() -> RewardRecipe:
    """A reward model on the embedded base after lora-nano, on pairs of its own answers.

    Made as dpo-nano's: fgpt train lora-nano, fgpt merge lora-nano, python -m experiments.nano.make_pairs runs/lora-nano
    pairs.jsonl, then fgpt train reward-nano. On 740 of the script's pairs the chosen answer of 64 held-out ones has the
    higher reward in 71.9, 67.2 and 54.7 % with seeds 0, 1, 2. 200 to 820 s on one busy core of an AMD EPYC, 0.61 GB.
    """
    sft = lora_nano()
    return RewardRecipe(
        name="reward-nano",
        base="runs/lora-nano/merged",
        data=("pairs.jsonl",),
        template=sft.template,
        adapter=sft.adapter,
        center_rewards_coefficient=0.01,
        lr=3e-4,
        epochs=2,
        micro_batch_size=4,
        overlong="drop",
    )


RECIPES: tuple[Callable[[], RewardRecipe], ...] = (reward_nano,)
