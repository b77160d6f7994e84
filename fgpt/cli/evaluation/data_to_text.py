"""A data-to-text run on inputs with several references each: its texts by beam search, and their scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fgpt.cli import processes
from fgpt.cli.console import console, show_progress
from fgpt.cli.evaluation.metrics.reference_scores import challenge_scores
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.tables import Metrics, print_metrics
from fgpt.data.instruction_datasets import Columns, RowStream, columns_of, locate_source
from fgpt.data.prompt_templates import encode_prompt, template
from fgpt.data.rows import InstructionRow
from fgpt.distributed import map_over_ranks
from fgpt.errors import InputError, short_repr
from fgpt.extras import require_extra
from fgpt.generation.beam import beam_search_batch
from fgpt.generation.sampling import SamplingParams
from fgpt.io.files import write
from fgpt.model import GPT
from fgpt.recipes import DataToTextRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

NUM_SHOWN = 3


class ReferenceSet(NamedTuple):
    """Inputs, and the references of each."""

    rows: list[InstructionRow]
    references: list[list[str]]


def load_references(source: str, recipe: DataToTextRecipe, limit: int | None = None) -> ReferenceSet:
    """The first `limit` inputs of a source, in their order; rows of equal inputs are the references of one. Where the
    source names no split, its test split is read.

    Raises InputError as `load_examples` does, for rows that are conversations or raw text, and for an input without a
    reference.
    """
    columns = None if recipe.columns == Columns() else recipe.columns
    references: dict[InstructionRow, list[str]] = {}
    for row in RowStream(source, columns_of(source, 1, columns), located=locate_source(source, split="test")):
        if type(row) is not InstructionRow:
            raise InputError(f"{source}: expected inputs and references, such as columns mr and ref; got other rows")
        if not row.output.strip():
            text = short_repr(row.instruction)
            raise InputError(f"{source}: the input {text} has a row without a reference: fill it, or remove the row")
        references.setdefault(replace(row, output=""), []).append(row.output)
    inputs = list(references)[:limit]
    return ReferenceSet(inputs, [references[row] for row in inputs])


def with_decoding(recipe: DataToTextRecipe, options: RunEvaluationOptions) -> DataToTextRecipe:
    """The recipe with the decoding that the options name."""
    names = ("num_beams", "length_penalty", "no_repeat_ngram")
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    return replace(recipe, **changes)


def require_metrics() -> None:
    """Raises InputError without the package of BLEU."""
    require_extra("nlg", "the scores of data-to-text", "sacrebleu")


def write_texts(
    params: GPT, tokenizer: Tokenizer, recipe: DataToTextRecipe, rows: Sequence[InstructionRow], batch_size: int
) -> list[str]:
    """The likeliest text of each input by the recipe's beam search; no n-gram of the text itself is repeated.

    Args:
        params: The tuned model.
        tokenizer: Its tokenizer.
        recipe: The template and the decoding.
        rows: The inputs.
        batch_size: Inputs in a batch; several processes share the batches.

    Raises InputError for an input that is too long for the model.
    """
    prompts = [encode_prompt(row, template(recipe.template), tokenizer) for row in rows]
    _check_lengths(rows, prompts, params.cfg.cached_context)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def search(batch: list[int]) -> list[str]:
        several = beam_search_batch(
            params,
            [prompts[i] for i in batch],
            eos_token_id=tokenizer.eos_token_ids,
            max_new_tokens=recipe.max_new_tokens,
            num_beams=recipe.num_beams,
            length_penalty=recipe.length_penalty,
            sampling=SamplingParams(no_repeat_ngram=recipe.no_repeat_ngram or None),
            prompt_counts=False,
        )
        return [tokenizer.decode(beams[0].tokens).strip() if beams else "" for beams in several]

    texts: dict[int, str] = {}
    with show_progress("writing", len(rows)) as advance:
        for batch, outputs in zip(batches, map_over_ranks(search, batches), strict=True):
            texts.update(zip(batch, outputs, strict=True))
            advance(len(batch))
    return [texts[i] for i in range(len(rows))]


def reference_metrics(recipe: DataToTextRecipe, test: ReferenceSet, texts: Sequence[str]) -> Metrics:
    """The challenge's metrics of the texts, printed with the first few of them."""
    for row, text, references in list(zip(test.rows, texts, test.references, strict=True))[:NUM_SHOWN]:
        lines = (row.instruction, f"  text       {text}", f"  reference  {references[0]}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    counts = {
        "inputs": len(test.rows),
        "references": sum(map(len, test.references)),
        "empty texts": sum(not text for text in texts),
        "beams": recipe.num_beams,
    }
    return print_metrics("texts with several references", counts, challenge_scores(texts, test.references))


def save_texts(texts: Sequence[str], path: Path) -> None:
    """Write one text a line, in the order of the inputs. Of several processes the first one does."""
    if processes.is_first():
        write(path, "".join(" ".join(text.split()) + "\n" for text in texts))
        console.print(f"texts, one a line: {path}", markup=False, soft_wrap=True)


def _check_lengths(rows: Sequence[InstructionRow], prompts: Sequence[Sequence[int]], context: int) -> None:
    for row, prompt in zip(rows, prompts, strict=True):
        if len(prompt) >= context:
            raise InputError(
                f"the input {short_repr(row.instruction)} has {len(prompt)} tokens: expected at most {context - 1}, "
                "the context without one new token"
            )
