"""A reward model, from its recipe to how often it prefers the chosen answer of held-out pairs.

result.json    held-out pairs: accuracy, margin and mean of the rewards
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt, trainable_leaves
from fgpt.classification_head import with_classification_head
from fgpt.cli import run_dir
from fgpt.cli.console import announce, console
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.training.build import (
    build_adapters,
    describe_sizes,
    drop_replaced_leaves,
    load_base,
    row_length,
    save_trained,
    warn_if_all_warmup,
)
from fgpt.cli.training.format_cost import print_format_cost
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.preference_batches import PreferenceExamples, map_heldout, no_reference
from fgpt.cli.training.preference_job import assemble_preference_job
from fgpt.cli.training.preference_rows import HELD_OUT, Row, encode_rows, load_split
from fgpt.cli.training.row_reports import resolve_template
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import Columns
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import template
from fgpt.errors import InputError
from fgpt.io.files import write_json
from fgpt.model import GPT
from fgpt.model import Config as ModelConfig
from fgpt.objectives.reward import bradley_terry, rewards
from fgpt.recipes import RewardRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device


@dataclass(frozen=True, eq=False)
class RewardTask:
    """Train a reward model."""

    recipe: RewardRecipe
    job: TrainingJob
    heldout: PreferenceExamples
    loss_unit: ClassVar[str] = "pair"
    report_section: ClassVar[str] = "pairs"

    @classmethod
    def build(cls, recipe: RewardRecipe) -> "RewardTask":
        """Raises InputError for bad input."""
        recipe = resolve_precision(recipe)
        cfg, tokenizer, _ = load_tokenizer(recipe)
        recipe = resolve_template(recipe, tokenizer)
        train, heldout = load_split(recipe)
        examples = encode_pairs(recipe, train, tokenizer, cfg)
        heldout_examples = encode_pairs(recipe, heldout, tokenizer, cfg, HELD_OUT)
        base = RewardTask.load_base(recipe)
        adapters = build_adapters(recipe, base) | trainable_leaves(base, r"head\..*")
        job = assemble_preference_job(
            recipe,
            base,
            drop_replaced_leaves(base, adapters),
            adapters=adapters,
            examples=examples,
            reference=no_reference(examples),
            objective=lambda params, batch: objective(recipe, params, batch),
            tokenizer=tokenizer,
            heldout=heldout_examples,
            heldout_loss=lambda params: heldout_figures(recipe, params, heldout_examples)["loss"],
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{len(examples):,} pairs, {len(heldout_examples):,} held out, {job.steps} steps",
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        print_format_cost(recipe, base, examples.chosen)
        return cls(recipe, job, heldout_examples)

    @staticmethod
    def load_base(recipe: RewardRecipe) -> GPT:
        return with_classification_head(load_base(recipe), 1, fold_in(key(recipe.seed), "head"))

    @staticmethod
    def class_names(recipe: RewardRecipe) -> tuple[str, ...]:
        return ("reward",)

    @staticmethod
    def load_heldout_examples(recipe: RewardRecipe, limit: int) -> list[Example]:
        cfg, tokenizer, _ = load_tokenizer(recipe)
        train, heldout = load_split(recipe)
        pairs = encode_pairs(recipe, (heldout or train)[:limit], tokenizer, cfg, HELD_OUT)
        return [*pairs.chosen, *pairs.rejected][:limit]

    @staticmethod
    def evaluate(recipe: RewardRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        if (options.test, options.columns, options.labels) != (None, Columns(), ()) or options.num_generations:
            raise InputError(f"{folder} is a reward model: leave out --test, --columns, --labels and --num-generations")
        cfg, tokenizer, _ = load_tokenizer(recipe)
        pairs = encode_pairs(recipe, load_split(recipe)[1][: options.limit], tokenizer, cfg, HELD_OUT)
        if not len(pairs):
            raise InputError(f"{folder} held out no pairs: there is nothing to score it on")
        params = run_dir.load_tuned(folder, RewardTask.load_base(recipe))
        check_shared_evaluation(options, params, {"chosen": pairs.chosen, "rejected": pairs.rejected})
        figures = heldout_figures(recipe, params, pairs)
        print_figures(figures, len(pairs))
        return {"held-out pairs": {**figures}}

    @staticmethod
    def eval_command(folder: str) -> str:
        return f"fgpt eval run {folder}"

    def score_initial(self) -> None:
        """A new head prefers nothing: there is nothing to be scored."""

    def save(self, trainable: Adapters, out: Path) -> Path:
        return save_trained(self.recipe, self.job, trainable, out)

    def score(self, trainable: Adapters, out: Path) -> dict[str, float]:
        """The figures of held-out pairs; none if there are no such pairs."""
        if not len(self.heldout):
            return {}
        return heldout_figures(self.recipe, adapt(self.job.frozen, trainable), self.heldout)

    def report(self, before: None, after: dict[str, float], out: Path) -> None:
        """Print the figures, and write them to result.json."""
        if after:
            print_figures(after, len(self.heldout))
        write_json(out / run_dir.RESULT, {**after, "heldout_pairs": len(self.heldout)})


def objective(recipe: RewardRecipe, params: GPT, batch: Any) -> tuple[Tensor, Tensor]:
    """(Σ loss, number of pairs)."""
    return bradley_terry(
        params, batch, center=recipe.center_rewards_coefficient, remat=recipe.remat, compile=recipe.compile
    )


def encode_pairs(
    recipe: RewardRecipe, rows: list[Row], tokenizer: Tokenizer, cfg: ModelConfig, which: str = ""
) -> PreferenceExamples:
    """The pairs as tokens, of which the last one of each text is weighted: its hidden state is what is judged.

    Raises InputError as `encode_rows` does.
    """
    pairs = encode_rows(recipe, rows, template(recipe.template), tokenizer, row_length(recipe, cfg), which)
    chosen, rejected = (
        [Example.classification(example.tokens, 0) for example in side] for side in (pairs.chosen, pairs.rejected)
    )
    return PreferenceExamples(chosen, rejected)


def heldout_figures(recipe: RewardRecipe, params: GPT, pairs: PreferenceExamples) -> dict[str, float]:
    """Of pairs the share whose chosen answer has the higher reward, the mean difference of the two rewards, their mean,
    and the loss.
    """

    def score(batch: Any) -> tuple[Tensor, float]:
        pair_rewards = torch.stack(rewards(params, batch.batch).float().cpu().chunk(2))
        return pair_rewards, float(objective(recipe, params, batch)[0])

    both: list[Tensor] = []
    loss = 0.0
    for pair_rewards, batch_loss in map_heldout(score, pairs, no_reference(pairs), device(params)):
        both.append(pair_rewards)
        loss += batch_loss
    chosen, rejected = torch.cat(both, -1)
    margins = chosen - rejected
    return {
        "accuracy": float((margins > 0).float().mean()),
        "margin": float(margins.mean()),
        "mean_reward": float(torch.cat([chosen, rejected]).mean()),
        "loss": loss / len(pairs),
    }


def print_figures(figures: dict[str, float], num_pairs: int) -> None:
    console.print(
        f"{num_pairs:,} held-out pairs: the chosen answer has the higher reward in {100 * figures['accuracy']:.1f} %, "
        f"by {figures['margin']:.3f} on average; mean reward {figures['mean_reward']:.3f}, loss {figures['loss']:.4f}"
    )
