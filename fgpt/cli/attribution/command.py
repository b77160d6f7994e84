"""`fgpt attribute RUN PROMPT`: which training rows made a run answer as it does, and by how much.

attribution-PROMPT.html    the rows that speak for the answer and those that speak against it, in the run directory
attribution-PROMPT.json    the effect of every row
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional, arg

from fgpt.adapter_types import Adapters
from fgpt.adapters import adapt
from fgpt.cli import run_dir, tasks
from fgpt.cli.attribution.effects import Attribution, answer_loss, at_the_end, through_training
from fgpt.cli.attribution.page import Page, Row, write_page
from fgpt.cli.console import console, quiet, result_console
from fgpt.cli.results import SETTINGS, free_name, name_part, training_id
from fgpt.cli.training.job import TrainingJob
from fgpt.cli.training.preview import text_with_mask
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import InstructionRow, encode_prompt, template
from fgpt.errors import InputError
from fgpt.generation.loop import generate
from fgpt.io.files import write_json
from fgpt.ranges import PositiveInt
from fgpt.recipes import InstructionRecipe

PRINTED = 5
"""Rows of each kind that are printed."""
SHOWN = 20
"""Rows of each kind on the page."""


@dataclass(frozen=True)
class AttributeOptions:
    """Show which training rows made a run answer as it does: the effect of leaving each of them out."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """The name of an instruction-tuned run, or its folder."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """The instruction."""
    input: str = ""
    """What the instruction is applied to."""
    response: str | None = None
    """The answer to explain; None takes the run's own, greedily decoded."""
    method: Literal["metagradient", "cosine"] = "metagradient"
    """metagradient: through every step of the training, at the price of about 4 trainings. cosine: the similarity of
    gradients at its end, which is fast and says less."""
    max_new_tokens: PositiveInt = 64
    """New tokens of the run's own answer, at most."""
    out: Path = Path("runs")
    """The folder of run directories."""


def run(options: AttributeOptions) -> Path:
    """Print the rows of largest effect, and write the page and the effects. Returns the page.

    Raises InputError for a run whose examples are not known, and for a prompt or response that is empty or too long.
    """
    if not options.prompt.strip():
        raise InputError("the prompt is empty: say what was to be answered")
    folder = run_dir.find_finished(options.run, options.out)
    recipe = run_dir.instruction_run(folder)
    with quiet():
        job = tasks.build_job(recipe)
    if job.row_indices is None:
        raise InputError(
            f"{folder} has no rows of its own to name: it was streamed, is private, or has learned from its own answers"
        )
    row = InstructionRow(options.prompt, options.input, "")
    prompt = encode_prompt(row, template(recipe.template), job.tokenizer)
    adapters = run_dir.load_adapters_of(folder, job.frozen)
    example = _example(recipe, job, adapters, prompt, options)
    query = collate([[example]])
    with torch.no_grad():
        run_loss = float(answer_loss(job.frozen, adapters, query))
    result = at_the_end(job, adapters, query) if options.method == "cosine" else through_training(recipe, job, query)
    return _write(folder, job, options, example, result, run_loss)


def _example(
    recipe: InstructionRecipe, job: TrainingJob, adapters: Adapters, prompt: Sequence[int], options: AttributeOptions
) -> Example:
    """The prompt with the answer to explain, within the run's sequences.

    Raises InputError for an empty answer, and if both are too long.
    """
    limit = min(recipe.max_seq_len, job.frozen.cfg.n_ctx)
    if options.response is None:
        (output,) = generate(
            adapt(job.frozen, adapters),
            [prompt],
            eos_token_id=job.tokenizer.eos_token_ids,
            max_new_tokens=max(1, min(options.max_new_tokens, limit - len(prompt))),
        )
        response = [*output.tokens]
    else:
        response = [*job.tokenizer.encode(options.response), job.tokenizer.eos_token_id]
        if len(response) == 1:
            raise InputError("--response is empty: give an answer, or leave it out for the run's own")
    if len(prompt) + len(response) > limit:
        raise InputError(
            f"prompt and answer have {len(prompt) + len(response)} tokens, and the run's sequences {limit}: shorten one"
        )
    return Example.completion((*prompt, *response), len(prompt))


def _write(
    folder: Path, job: TrainingJob, options: AttributeOptions, example: Example, result: Attribution, run_loss: float
) -> Path:
    """Print the rows of largest effect, and write page and effects."""
    answer = job.tokenizer.decode(example.tokens[example.prompt_length :])
    settings = {
        "prompt": options.prompt,
        "input": options.input,
        "response": options.response,
        "method": options.method,
        "max_new_tokens": options.max_new_tokens,
        "training": training_id(folder),
    }
    name = free_name(folder, [f"attribution-{name_part(options.prompt)}"], settings, (".json", ".html"))
    summary = _summary(options, result, run_loss, len(job.examples))
    order = result.effects.argsort(descending=True).tolist()
    page = Page(
        title=f"Why {folder.name} answers so",
        summary=summary,
        prompt=options.prompt if not options.input else f"{options.prompt}\n\n{options.input}",
        answer=answer,
        unit="nats" if options.method == "metagradient" else "cosine",
        supporting=_rows(job, result, [i for i in order[:SHOWN] if result.effects[i] > 0]),
        opposing=_rows(job, result, [i for i in order[::-1][:SHOWN] if result.effects[i] < 0]),
    )
    _print(page)
    write_json(
        folder / f"{name}.json",
        {
            SETTINGS: settings,
            "answer": answer,
            "loss": result.loss,
            "run_loss": run_loss,
            "effects": result.effects.tolist(),
        },
    )
    path = write_page(folder / f"{name}.html", page)
    console.print(f"written: {path}, and the effect of every row beside it", markup=False, soft_wrap=True)
    return path


def _summary(options: AttributeOptions, result: Attribution, run_loss: float, num_rows: int) -> str:
    if options.method == "cosine":
        return f"The cosine of each of {num_rows:,} rows' gradients with the answer's, at the end of the training."
    return (
        "The effect of a row is how many nats less likely the answer would be without it, to first order, through "
        f"every step of the training on {num_rows:,} rows. The training was taken again by a smooth AdamW: the "
        f"answer's loss is {result.loss:.3f} nats after it, and {run_loss:.3f} after the run."
    )


def _rows(job: TrainingJob, result: Attribution, indices: Sequence[int]) -> list[Row]:
    return [
        Row(
            i + 1,
            float(result.effects[i]),
            text_with_mask(job.examples[i], job.tokenizer, colored=False, short=True).plain,
        )
        for i in indices
    ]


def _print(page: Page) -> None:
    result_console.print(f"answer: {page.answer.strip()}", markup=False)
    result_console.print(page.summary, markup=False)
    for title, rows in (("for the answer", page.supporting), ("against it", page.opposing)):
        table = Table("row", page.unit, "text, with what is trained on marked", title=title, title_justify="left")
        for row in rows[:PRINTED]:
            table.add_row(str(row.number), f"{row.effect:+.2g}", Text(" ".join(row.text.split())))
        result_console.print(table)
