"""From rows to examples: in which template, and on which answers of a conversation the loss is."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fgpt.cli.console import console, show_progress
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.examples import Example
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import Template, batch_pieces
from fgpt.data.rows import ConversationRow, InstructionRow
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

ROWS_PER_BATCH = 256
"""Rows that are tokenized at once: few enough to show how far it is."""
MARKERS = (
    *("### Instruction:", "### Response:", "<|im_start|>", "<|im_end|>", "[INST]", "<|user|>", "<|assistant|>"),
    *("<|start_header_id|>", "<start_of_turn>", "\n\nAssistant:"),
)
"""What prompt templates are known by."""


def resolve_template(recipe: InstructionRecipe) -> InstructionRecipe:
    """The recipe with a template in place of auto: the base's own if it has one, else alpaca.

    Raises InputError if the base's tokenizer cannot be read.
    """
    if recipe.template != "auto":
        return recipe
    tokenizer = load_tokenizer(recipe).tokenizer
    return replace(recipe, template="alpaca" if tokenizer.chat_template is None else "chat")


def loss_rows(recipe: InstructionRecipe, rows: list[InstructionRow]) -> list[InstructionRow]:
    """The rows, of each conversation with the loss on what `assistant_turns` says. How many answers become context is
    printed.
    """
    if recipe.assistant_turns == "all":
        return rows
    last: list[InstructionRow] = []
    count = 0
    for row in rows:
        if isinstance(row, ConversationRow):
            count += len(row.turns()) - 1
            row = row.last_turn()
        last.append(row)
    if count:
        console.print(
            f"{count:,} answers before the last of their conversation are context only (--assistant-turns last)"
        )
    return last


def report_templates(recipe: InstructionRecipe, rows: Sequence[InstructionRow]) -> None:
    """Print if most prompts hold a template already, around which another would be put."""
    if recipe.template == "none":
        return
    counts = Counter(marker for row in rows for marker in MARKERS if marker in _first_prompt(row))
    (marker, count), *_ = counts.most_common(1) or [("", 0)]
    if 2 * count > len(rows):
        console.print(
            f"{count:,} of {len(rows):,} prompts hold a template already ({marker!r}), and --template "
            f"{recipe.template} is put around it: --template none leaves them as they are",
            soft_wrap=True,
        )


def encode_rows(
    rows: Sequence[InstructionRow], prompt_template: Template, tokenizer: Tokenizer
) -> tuple[list[Example], int]:
    """The examples of rows, of any length, and how many conversations are an example for each answer, since the chat
    template rewrites their earlier turns.

    Raises InputError as `prompt_templates.batch_pieces` does.
    """
    examples: list[Example] = []
    num_divided = 0
    with show_progress("tokenizing", len(rows)) as advance:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            batch = rows[start : start + ROWS_PER_BATCH]
            of_rows = batch_pieces(batch, prompt_template, tokenizer)
            num_divided += sum(len(of_row) > 1 for of_row in of_rows)
            examples += encode_pieces(list(itertools.chain(*of_rows)), tokenizer)
            advance(len(batch))
    return examples, num_divided


def _first_prompt(row: InstructionRow) -> str:
    if isinstance(row, ConversationRow):
        return next((message.content for message in row.messages if message.role == "user"), "")
    return row.instruction
