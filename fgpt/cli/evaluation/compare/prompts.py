"""What the sides of a comparison are asked, and the words and settings that say so."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.cli.console import console
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.evaluation.compare import prompt_file
from fgpt.cli.evaluation.compare.contenders import Contender
from fgpt.cli.inference.options import ComparisonDecoding
from fgpt.cli.paths import shareable
from fgpt.cli.results import training_id
from fgpt.cli.training.job import content_hash
from fgpt.data import finqa
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.io import models

PENALTIES = ("repetition_penalty", "no_repeat_ngram")
"""The filters that greedy decoding obeys, too."""


@dataclass(frozen=True)
class ComparisonPrompts:
    """What every side is asked."""

    rows: Sequence[InstructionRow]
    source: str
    """Where the rows are from, to be read after their number."""
    heldout: bool


def held_out(sides: Sequence[Contender], heldout: Sequence[InstructionRow], count: int) -> ComparisonPrompts:
    """The first `count` rows that the first run held out and whose prompts leave room to answer: of rows too long, the
    run's training dropped its own.

    Raises InputError where there are none.
    """
    first = sides[0].run
    if not heldout:
        raise InputError(f"{first.name} held no rows out: give prompts with --prompts FILE, or --prompts general")
    cfg, tokenizer = models.load_config_and_tokenizer(first.base)
    encoded = [compare_sides.prompts(side, heldout, tokenizer) for side in sides]
    rows = [row for i, row in enumerate(heldout) if all(len(some[i]) < cfg.n_ctx for some in encoded)]
    if not rows:
        raise InputError(f"no held-out prompt of {first.name} fits the context of {cfg.n_ctx} tokens: give --prompts")
    return ComparisonPrompts(rows[:count], f"held-out prompts of {first.name}", heldout=True)


def from_file(sides: Sequence[Contender], source: str, count: int | None) -> ComparisonPrompts:
    """The first `count` prompts of a file. FinQA's pages are shortened to where every side has room to answer.

    Raises InputError as `prompt_file.read` does.
    """
    rows = prompt_file.read(source)[:count]
    if any(isinstance(row, finqa.FinQA) for row in rows):
        cfg, tokenizer = models.load_config_and_tokenizer(sides[0].run.base)
        width = min(cfg.n_ctx, *(side.run.max_seq_len for side in sides))

        def length(row: InstructionRow) -> int:
            return finqa.ANSWER_TOKENS + max(len(compare_sides.prompts(side, [row], tokenizer)[0]) for side in sides)

        rows, cut = finqa.shorten(rows, width, length)
        if cut:
            console.print(f"shortened the text of {cut:,} FinQA prompts to {width} tokens; their tables are whole")
    return ComparisonPrompts(rows, f"prompts of {Path(source).name}", heldout=False)


def check(prompts: Mapping[str, Sequence[Sequence[int]]], context: int) -> None:
    """Raises InputError for a prompt, of any side, that leaves no room in the context to answer."""
    for side, some in prompts.items():
        for number, prompt in enumerate(some, 1):
            if len(prompt) >= context:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens in the template of {side}: expected at most "
                    f"{context - 1}, the context less one to write; shorten it"
                )


def title(sides: Sequence[Contender]) -> str:
    """Who stands beside whom."""
    names = [side.name for side in sides[1:]]
    if len(names) == 1:
        return f"{sides[1].run.name}: base against tuned"
    return f"{sides[0].run.base} against {', '.join(names[:-1])} and {names[-1]}"


def about(sides: Sequence[Contender], asked: ComparisonPrompts, most: int, alike: ComparisonDecoding) -> list[str]:
    """How it is done, in sentences, and what to bear in mind."""
    first, drawn = sides[0].run, alike.sampling.temperature > 0
    chosen = {name: x for name, x in dataclasses.asdict(alike.sampling).items() if x and (drawn or name in PENALTIES)}
    rule = [f"{name.replace('_', '-')} {value}" for name, value in chosen.items()]
    how = ", ".join([*([] if drawn else ["greedy"]), *rule, *([f"seed {alike.seed}"] if drawn else [])])
    templates = {side.run.template for side in sides}
    look = (
        f"the template {first.template}" if len(templates) == 1 else "each run's own template, the base in the first's"
    )
    over = f"{shareable(first.base)} in {first.dtype}" + (f" and {first.quantize}" if first.quantize else "")
    told = [
        f"Base: {over}.",
        f"{len(asked.rows)} {asked.source}, in {look}.",
        f"Decoding, the same for all: {how}, at most {most} tokens.",
    ]
    if asked.heldout:
        seen = [side.name for side in sides if compare_sides.may_have_seen(side.run, first)]
        told += [f"{name} held other rows out: it may have been trained on some of these." for name in seen]
    return told


def settings(
    sides: Sequence[Contender], asked: ComparisonPrompts, most: int, alike: ComparisonDecoding
) -> dict[str, Any]:
    """The same for a program."""
    first = sides[0].run
    return {
        "base": shareable(first.base),
        "dtype": first.dtype,
        "quantize": first.quantize,
        "trained": {side.name: training_id(side.folder) for side in sides if side.folder is not None},
        "prompts": asked.source,
        "prompts_sha256": content_hash(list(asked.rows)),
        "most": most,
        "sampling": dataclasses.asdict(alike.sampling),
        "seed": alike.seed,
        "templates": {side.name: side.run.template for side in sides},
    }
