"""The prompts of a comparison, and the sentences and settings that describe how they are answered."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.cli.console import console
from fgpt.cli.evaluation.compare import contenders, prompt_file
from fgpt.cli.evaluation.compare.contenders import Contender
from fgpt.cli.inference.options import ComparisonDecoding
from fgpt.cli.paths import shareable
from fgpt.cli.results import training_id
from fgpt.cli.training.hashes import content_hash
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data import finqa
from fgpt.data.rows import InstructionRow, TextRow
from fgpt.errors import InputError

PENALTIES = ("repetition_penalty", "no_repeat_ngram")
"""The logits processors that apply to greedy decoding, too."""


@dataclass(frozen=True)
class ComparisonPrompts:
    """What every side answers."""

    rows: Sequence[InstructionRow]
    source: str
    """Where the rows come from, to be read after their number."""
    heldout: bool


def held_out(sides: Sequence[Contender], heldout: Sequence[InstructionRow], count: int) -> ComparisonPrompts:
    """The first `count` rows that the first run held out and whose prompts leave tokens for an answer. Raw texts
    have none.

    Raises InputError if there are none.
    """
    first = sides[0].run
    if not heldout:
        raise InputError(f"{first.name} held out no rows: give prompts with --prompts FILE, or --prompts general")
    cfg, tokenizer, _ = load_tokenizer(first)
    with_prompt = [row for row in heldout if not isinstance(row, TextRow)]
    if not with_prompt:
        raise InputError(f"{first.name} held out raw text, and no prompts: give --prompts FILE, or --prompts general")
    encoded = [contenders.encode_prompts(side, with_prompt, tokenizer) for side in sides]
    rows = [row for i, row in enumerate(with_prompt) if all(len(of_side[i]) < cfg.n_ctx for of_side in encoded)]
    if not rows:
        raise InputError(f"no held-out prompt of {first.name} fits the context of {cfg.n_ctx} tokens: give --prompts")
    return ComparisonPrompts(rows[:count], f"held-out prompts of {first.name}", heldout=True)


def from_file(sides: Sequence[Contender], source: str, count: int | None) -> ComparisonPrompts:
    """The first `count` prompts of a file. FinQA's texts are shortened so that every side has tokens left to answer.

    Raises InputError as `prompt_file.read` does.
    """
    rows = prompt_file.read(source)[:count]
    if any(isinstance(row, finqa.FinQA) for row in rows):
        cfg, tokenizer, _ = load_tokenizer(sides[0].run)
        width = min(cfg.n_ctx, *(side.run.max_seq_len for side in sides))

        def length(row: InstructionRow) -> int:
            return finqa.ANSWER_TOKENS + max(
                len(contenders.encode_prompts(side, [row], tokenizer)[0]) for side in sides
            )

        rows, num_shortened = finqa.shorten(rows, width, length)
        if num_shortened:
            console.print(
                f"shortened the text of {num_shortened:,} FinQA prompts to {width} tokens; their tables are complete"
            )
    return ComparisonPrompts(rows, f"prompts of {Path(source).name}", heldout=False)


def check(prompts: Mapping[str, Sequence[Sequence[int]]], context: int) -> None:
    """Raises InputError for a prompt, of any side, that leaves no token of the context for an answer."""
    for side, of_side in prompts.items():
        for number, prompt in enumerate(of_side, 1):
            if len(prompt) >= context:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens in the template of {side}: expected at most "
                    f"{context - 1}, the context less one for the answer; shorten it"
                )


def title(sides: Sequence[Contender]) -> str:
    """Who is compared with whom."""
    names = [side.name for side in sides if side.folder is not None]
    if len(names) == 1:
        return f"{sides[1].run.name}: base against tuned"
    return f"{sides[0].run.base} against {', '.join(names[:-1])} and {names[-1]}"


def about(
    sides: Sequence[Contender], chosen: ComparisonPrompts, max_new_tokens: int, decoding: ComparisonDecoding
) -> list[str]:
    """How it is done, in sentences, and what to bear in mind."""
    first = sides[0].run
    template = f"the template {first.template}"
    if len({side.run.template for side in sides}) > 1:
        template = "each run's own template, the base in the first's"
    sentences = [
        f"Base: {contenders.describe_base(first)}.",
        *(f"The {side.name}: {contenders.describe_base(side.run)}." for side in sides[1:] if side.folder is None),
        f"{len(chosen.rows)} {chosen.source}, in {template}.",
        f"Decoding, the same for all: {_describe(decoding)}, at most {max_new_tokens} new tokens.",
    ]
    if chosen.heldout:
        for side in sides:
            if contenders.may_have_seen(side.run, first):
                sentences.append(f"{side.name} held out other rows: it may have been trained on some of these.")
    return sentences


def _describe(decoding: ComparisonDecoding) -> str:
    """The settings of decoding that have an effect."""
    sampled = decoding.sampling.temperature > 0
    words = [] if sampled else ["greedy"]
    for name, value in dataclasses.asdict(decoding.sampling).items():
        if value and (sampled or name in PENALTIES):
            words.append(f"{name.replace('_', '-')} {value}")
    return ", ".join([*words, f"seed {decoding.seed}"] if sampled else words)


def settings(
    sides: Sequence[Contender], chosen: ComparisonPrompts, max_new_tokens: int, decoding: ComparisonDecoding
) -> dict[str, Any]:
    """The same for a program."""
    first = sides[0].run
    return {
        "base": shareable(first.base),
        "dtype": first.dtype,
        "quantize": first.quantize,
        "trained": {side.name: training_id(side.folder) for side in sides if side.folder is not None},
        "prompts": chosen.source,
        "prompts_sha256": content_hash(list(chosen.rows)),
        "max_new_tokens": max_new_tokens,
        "sampling": dataclasses.asdict(decoding.sampling),
        "seed": decoding.seed,
        "templates": {side.name: side.run.template for side in sides},
    }
