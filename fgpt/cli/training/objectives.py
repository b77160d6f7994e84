"""What an instruction tuning minimizes: the loss of the next token, with smoothed targets, or beside a teacher's."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from fgpt.classification_head import num_classes
from fgpt.cli.console import show_progress
from fgpt.cli.devices import resolve_device, resolve_dtype
from fgpt.cli.training.shared_models import load_once
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.losses import Batch, nll
from fgpt.model import GPT, Config
from fgpt.objectives.distillation import distillation
from fgpt.objectives.label_smoothing import smoothed_nll
from fgpt.recipes import FineTuningRecipe, InstructionRecipe, TrainingRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

TokenLoss: TypeAlias = Callable[[GPT, Batch], tuple[Tensor, Tensor]]
"""(Σ weight · loss, Σ weight) of params and a batch."""


INSTRUCTION_OPTIONS = (
    "eval_data",
    "streaming",
    "shuffle_buffer_size",
    "mixture",
    "assistant_turns",
    "forget",
    "documents",
    "packing",
    "label_smoothing_factor",
    "teacher",
    "kd_ratio",
    "kd_temperature",
)
"""The options that preference tuning and GRPO have from instruction tuning, and do not read."""


def refuse_instruction_options(recipe: InstructionRecipe) -> None:
    """Raises InputError for the first of INSTRUCTION_OPTIONS that is given."""
    default = {field.name: field.default for field in dataclasses.fields(recipe)}
    if used := [name for name in INSTRUCTION_OPTIONS if getattr(recipe, name) != default[name]]:
        raise InputError(f"--{used[0].replace('_', '-')} is of instruction tuning: leave it out")


def check_objective(recipe: InstructionRecipe, cfg: Config, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raises InputError for options that do not go together, and for a teacher without the student's tokens or context.

    Args:
        recipe: The recipe.
        cfg: The student's config.
        tokenizer: The student's tokenizer.
        max_seq_len: Tokens of a sequence.
    """
    if recipe.teacher == "":
        raise InputError("--teacher names no model: expected one as --base names it")
    if recipe.teacher is None:
        if (recipe.kd_ratio, recipe.kd_temperature) != (InstructionRecipe.kd_ratio, InstructionRecipe.kd_temperature):
            raise InputError("--kd-ratio and --kd-temperature are of distillation: give a --teacher, or leave them out")
        return
    if recipe.label_smoothing_factor:
        raise InputError("--teacher gives soft targets, and so does --label-smoothing-factor: leave one of them out")
    teacher_cfg, teacher_tokenizer = models.load_config_and_tokenizer(recipe.teacher)
    if recipe.new_tokens:
        raise InputError("--teacher does not know --new-tokens: leave one of them out")
    if teacher_cfg.vocab_size != cfg.vocab_size or not _equal(tokenizer, teacher_tokenizer):
        others = " others" if teacher_cfg.vocab_size == cfg.vocab_size else f", and the base {cfg.vocab_size:,}"
        raise InputError(
            f"--teacher {recipe.teacher}: expected a model with the tokens of {recipe.base}, for their distributions "
            f"are compared; it has {teacher_cfg.vocab_size:,}{others}"
        )
    if teacher_cfg.n_ctx < max_seq_len:
        raise InputError(
            f"--teacher {recipe.teacher} has a context of {teacher_cfg.n_ctx} tokens, fewer than --max-seq-len "
            f"{max_seq_len}: lower it"
        )


def _equal(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether each id is the same text to both."""
    both = first, second
    if len({(x.n_vocab, x.eos_token_id) for x in both}) > 1:
        return False
    return all(first.decode([token]) == second.decode([token]) for token in range(first.n_vocab))


def load_teacher(recipe: InstructionRecipe) -> GPT | None:
    """The recipe's teacher, in the dtype and on the device of the training; None if it has none.

    Raises InputError as `models.load` does, and for a classifier.
    """
    if recipe.teacher is None:
        return None
    device = resolve_device(recipe.device)
    with show_progress(f"loading {recipe.teacher}"):
        name, dtype = recipe.teacher, resolve_dtype(recipe.dtype, device)
        teacher = load_once(("teacher", name, dtype, device), lambda: models.load(name, dtype, device=device))
    if (classes := num_classes(teacher)) is not None:
        raise InputError(f"--teacher {recipe.teacher} is a classifier of {classes} classes: expected a language model")
    return teacher


def has_soft_targets(recipe: TrainingRecipe) -> bool:
    """Whether the loss is another than that of the next token, and so not bounded by that of a uniform guess."""
    return isinstance(recipe, InstructionRecipe) and bool(recipe.teacher or recipe.label_smoothing_factor)


def token_loss(recipe: FineTuningRecipe, teacher: GPT | None = None) -> TokenLoss:
    """The loss that the recipe minimizes."""
    options: dict[str, bool] = {"remat": recipe.remat, "compile": recipe.compile}
    if not isinstance(recipe, InstructionRecipe) or not has_soft_targets(recipe):
        return partial(nll, **options)
    if teacher is None:
        return partial(smoothed_nll, label_smoothing=recipe.label_smoothing_factor, **options)
    return partial(
        distillation, teacher=teacher, temperature=recipe.kd_temperature, kd_ratio=recipe.kd_ratio, **options
    )


def describe_objective(recipe: InstructionRecipe) -> list[str]:
    """One phrase for what is not the usual loss; none for the loss of the next token."""
    if recipe.teacher is not None:
        return [f"teacher {recipe.teacher}, {recipe.kd_ratio:g} of the loss, temperature {recipe.kd_temperature:g}"]
    return [f"label smoothing {recipe.label_smoothing_factor:g}"] if recipe.label_smoothing_factor else []
