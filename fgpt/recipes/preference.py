"""Recipes that tune a model on preferences: pairs of answers, or answers judged good or bad."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias

from fgpt.data.preferences import PreferenceColumns
from fgpt.ranges import BatchSize, Fraction, NonNegativeFloat, PositiveFloat
from fgpt.recipes.instruction import InstructionRecipe, lora_nano, lora_smollm2
from fgpt.recipes.tuning import Length

Objective: TypeAlias = Literal["dpo", "orpo", "simpo", "kto"]

BETAS: dict[Objective, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
"""The defaults of beta: TRL's."""


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(InstructionRecipe):
    """Preference tuning on pairs of a chosen and a rejected answer, or on answers judged good or bad. The reference
    policy is the base without the adapter.
    """

    kind: ClassVar[str] = "preference"

    columns: PreferenceColumns = field(default_factory=PreferenceColumns)
    """The names of the columns, where they are not the usual ones."""
    max_seq_len: Length = 512
    """Tokens of a prompt with its answer, at most. Rows are not packed."""
    micro_batch_size: BatchSize = 8
    """Rows in a micro-batch, each with its two answers. kto estimates the divergence from the reference in each."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with rows of which an answer ends after max_seq_len tokens: error refuses to start, drop leaves them
    out."""

    objective: Objective = "dpo"
    """dpo, orpo, simpo: of pairs. kto: of judged answers. orpo and simpo have no reference policy."""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """The loss of dpo."""
    beta: PositiveFloat | None = None
    """How closely the policy is held to the reference (dpo, kto), the weight of the odds ratio (orpo), or the scale of
    the rewards (simpo). None takes 0.1, for simpo 2."""
    label_smoothing: Fraction = 0.0
    """The share of pairs whose order is wrong, below 0.5; for dpo with sigmoid or robust."""
    rpo_alpha: NonNegativeFloat = 0.0
    """The weight of the nll of the chosen answer in dpo, which alone may make both answers less likely."""
    compare_data: Literal["heldout", "nano"] = "heldout"
    """The prompts that base and tuned model answer after training: held-out ones, or the embedded held-out
    instructions, whose answers get points."""
    gamma: NonNegativeFloat = 1.0
    """The margin between the rewards, of simpo."""
    desirable_weight: PositiveFloat = 1.0
    """Of good answers, in kto."""
    undesirable_weight: PositiveFloat = 1.0
    """Of bad answers, in kto."""

    @property
    def resolved_beta(self) -> float:
        return BETAS[self.objective] if self.beta is None else self.beta


def dpo_nano() -> PreferenceRecipe:
    """DPO on the embedded base after lora-nano, on pairs of its own answers.

    fgpt train lora-nano, fgpt merge lora-nano, python -m experiments.nano.make_pairs runs/lora-nano pairs.jsonl, then
    fgpt train dpo-nano. On 740 of the script's pairs the points rise from 55.6 to 61.1, 58.1 and 58.2 with seeds 0, 1,
    2; KL from the start 0.11 nats per token. 180 to 365 s on one busy core of an AMD EPYC, 0.65 GB. Without --rpo-alpha
    they fell to 32.6 at this rate, and to 54.2 at a tenth of it, in one epoch.
    """
    sft = lora_nano()
    return PreferenceRecipe(
        name="dpo-nano",
        base="runs/lora-nano/merged",
        data=("pairs.jsonl",),
        template=sft.template,
        adapter=sft.adapter,
        rpo_alpha=1.0,
        lr=1e-3,
        epochs=3,
        micro_batch_size=4,
        compare_prompts=sft.compare_prompts,
        max_new_tokens=sft.max_new_tokens,
        overlong="drop",
        compare_data="nano",
    )


def kto_nano() -> PreferenceRecipe:
    """KTO on the embedded base after lora-nano, on its own answers judged by their instructions' demands.

    As dpo-nano, but on judged.jsonl, which the script writes beside the pairs if it is named, too. On 2,988 good and
    4,617 bad answers it gains nothing: 55.6 points before; 52.8, 54.2 and 55.4 after with seeds 0, 1, 2; KL 0.01 nats
    per token; 220 s on a core of an AMD EPYC, 0.96 GB. At lr 5e-4 it unlearns the questions, most of whose answers are
    bad: 35.9 points, KL 0.86. Pairs can be given as well (--data pairs.jsonl).
    """
    return replace(
        dpo_nano(),
        name="kto-nano",
        data=("judged.jsonl",),
        objective="kto",
        rpo_alpha=0.0,
        desirable_weight=2.0,
        lr=1e-4,
        epochs=0.5,
        micro_batch_size=8,
        grad_accumulation_steps=2,
    )


def dpo_smollm2() -> PreferenceRecipe:
    """DPO (LoRA, r 8, alpha 16, every linear layer) on SmolLM2-135M-Instruct and UltraFeedback's pairs from the Hub, in
    the base's own chat template.

    fgpt train dpo-smollm2, or on local pairs: --data pairs.json. 2,442,240 trained parameters. On 177 pairs the loss of
    26 held-out ones falls from 0.693 to 0.677 after 10 steps and 0.665 after 20 of 23; a minute a step on one busy core
    of an AMD EPYC, 5.8 GB. Not measured to its end.
    """
    lora = lora_smollm2()
    return PreferenceRecipe(
        name="dpo-smollm2",
        base=lora.base,
        data=("HuggingFaceH4/ultrafeedback_binarized[train_prefs[:2000]]",),
        template="chat",
        adapter=lora.adapter,
        lr=1e-4,
        epochs=1,
        max_seq_len=1024,
        micro_batch_size=1,
        grad_accumulation_steps=8,
        overlong="drop",
        num_heldout=40,
        compare_prompts=4,
    )


RECIPES: tuple[Callable[[], PreferenceRecipe], ...] = (dpo_nano, kto_nano, dpo_smollm2)
