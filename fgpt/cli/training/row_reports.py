"""The template of a recipe, and what is printed of how rows became examples."""

from collections import Counter
from dataclasses import replace
from typing import TypeVar

from fgpt.cli.console import console
from fgpt.data import conversations
from fgpt.data.template_markers import MARKERS
from fgpt.data.tokenization import CONTEXT, DIVIDED, SHORTENED, TEXTS
from fgpt.recipes import InstructionRecipe, RewardRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

R = TypeVar("R", InstructionRecipe, RewardRecipe)


def resolve_template(recipe: R, tokenizer: Tokenizer) -> R:
    """The recipe with a template in place of auto: the one of the base's `tokenizer` if it has one, else alpaca."""
    if recipe.template != "auto":
        return recipe
    return replace(recipe, template="alpaca" if tokenizer.chat_template is None else "chat")


def report_left_out(left_out: Counter[str]) -> None:
    """Print what of the rows is not trained on, by reason."""
    if reasons := conversations.summary(left_out):
        console.print(f"left out: {reasons}", markup=False)


def report_parts(num_parts: int, max_seq_len: int) -> None:
    """Print that raw texts are split, if that makes `num_parts` more examples."""
    if num_parts:
        console.print(f"split texts longer than {max_seq_len} tokens: {num_parts:,} more examples")


def report_counts(recipe: InstructionRecipe, counts: Counter[str], num_rows: int, max_seq_len: int) -> None:
    """Print what was done to the rows.

    Args:
        recipe: The recipe.
        counts: See `fgpt.data.tokenization`.
        num_rows: All rows.
        max_seq_len: Tokens of a sequence.
    """
    if count := counts[CONTEXT]:
        console.print(
            f"{count:,} answers before the last of their conversation are context only (--assistant-turns last)"
        )
    if count := counts[SHORTENED]:
        console.print(f"shortened the text of {count:,} FinQA rows to {max_seq_len} tokens; their tables are complete")
    if count := counts[DIVIDED]:
        console.print(
            f"the chat template rewrites earlier turns, or does not end them: {count:,} conversations are an example "
            "for each answer"
        )
    if recipe.template != "none" and counts[TEXTS] == num_rows:
        console.print(
            f"no template is put around raw text, but around prompts of fgpt generate ({recipe.template}): with "
            "--template none it continues a text",
            soft_wrap=True,
        )
    marker = max(MARKERS, key=lambda marker: counts[marker])
    if recipe.template != "none" and 2 * counts[marker] > num_rows:
        console.print(
            f"{counts[marker]:,} of {num_rows:,} prompts hold a template already ({marker!r}), and --template "
            f"{recipe.template} is put around it: --template none leaves them as they are",
            soft_wrap=True,
        )
