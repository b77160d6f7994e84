"""Base and tuned side by side on the same prompts: the same decoding for each, scores on top.

compare.md, compare.html    for a reader
compare.json                scores, answers, and how they were written
compare-3-prompts.*         the same of other settings than the run's own, which the name says
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from fgpt.cli import results
from fgpt.cli.console import console, progress, working
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.evaluation.compare import prompts as compare_asked
from fgpt.cli.evaluation.compare.contenders import BASE, Contender
from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.markdown import markdown, show
from fgpt.cli.evaluation.compare.prompts import ComparisonPrompts, held_out
from fgpt.cli.evaluation.compare.results import Answer, Comparison, as_json
from fgpt.cli.evaluation.compare.scores import asked_scores, reference_scores, referenced, rouge_scores, text_scores
from fgpt.cli.inference.options import DEFAULT_DECODING, ComparisonDecoding
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.generation.loop import generate
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.io import models
from fgpt.io.files import write, write_json
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer

NAME, ENDINGS = "compare", (".json", ".md", ".html")

AT_ONCE = 32
"""Prompts answered in one batch."""


def compare_after_training(run: InstructionRecipe, out: Path, heldout: Sequence[InstructionRow]) -> None:
    """Answer held-out prompts with base and tuned; write compare.md, compare.html and compare.json into the run's
    folder, and print the scores with a few answers.
    """
    sides = compare_sides.from_runs([run], [out])
    save(compare_contenders(sides, held_out(sides, heldout, run.compare_prompts), DEFAULT_DECODING), out, NAME)


def compare_runs(
    names: Sequence[str],
    alike: ComparisonDecoding = DEFAULT_DECODING,
    prompts: str | None = None,
    count: int | None = None,
    out: Path | None = None,
) -> None:
    """Compare trained runs with their base and with each other: on the first run's held-out prompts, or those of a
    file; the first `count` of them. What is found goes into the run's folder; for several into compare-NAMES beside
    the first; or into `out`. Its name is that of its settings, and a comparison of others is not written over.

    Raises InputError, before anything slow begins, for what `compare_sides.find` and `prompt_file.read` refuse.
    """
    sides = compare_sides.find(names)
    if count is not None and count < 1:
        raise InputError(f"count is {count}: expected 1 or more prompts")
    first, own = sides[0].run, len(sides) == 2 and out is None
    out = out or _place(sides)
    _writable(out)
    if prompts is None:
        from fgpt.cli.training.instruction_tuning import split

        asked = held_out(sides, split(first)[1], count or first.compare_prompts or InstructionRecipe.compare_prompts)
    else:
        asked = compare_asked.from_file(sides, prompts, count)
    found, short = compare_contenders(sides, asked, alike), "-".join([NAME, *_of_file(prompts)])
    full = "-".join([short, *_others(first, prompts, count, alike)])
    names = [full] if own else [short, full]  # a folder of its own needs no long names while it holds one comparison
    save(found, out, results.free(out, names, found.settings, ENDINGS))


def _of_file(prompts: str | None) -> list[str]:
    return [] if prompts is None else [results.part(Path(prompts).stem)]


def _others(run: InstructionRecipe, prompts: str | None, count: int | None, alike: ComparisonDecoding) -> list[str]:
    """As parts of a name, the settings that are not those of a comparison after training."""
    usual = None if prompts is not None else run.compare_prompts or InstructionRecipe.compare_prompts
    parts = [f"{count}-prompts"] if count is not None and count != usual else []
    parts += [f"most-{alike.max_new_tokens}"] if alike.max_new_tokens not in (None, run.max_new_tokens) else []
    chosen = {name: x for name, x in dataclasses.asdict(alike.sampling).items() if x}
    parts += [f"{name.replace('_', '-')}-{x}" for name, x in chosen.items()]
    return parts + ([f"seed-{alike.seed}"] if alike.seed and alike.sampling.temperature else [])


def compare_contenders(sides: Sequence[Contender], asked: ComparisonPrompts, alike: ComparisonDecoding) -> Comparison:
    """Every side's answers and scores.

    Raises InputError for a prompt that is too long for the model, before anything slow begins.
    """
    first = sides[0].run
    most = first.max_new_tokens if alike.max_new_tokens is None else alike.max_new_tokens
    if most < 1:
        raise InputError(f"most is {most}: expected 1 or more new tokens")
    cfg, tokenizer = models.load_config_and_tokenizer(first.base)
    prompts = {side.name: compare_sides.prompts(side, asked.rows, tokenizer) for side in sides}
    compare_asked.check(prompts, cfg.n_ctx)
    references = referenced(cfg, tokenizer, sides, asked.rows)
    params = compare_sides.params(sides)
    order = sorted(range(len(asked.rows)), key=lambda i: len(asked.rows[i].instruction + asked.rows[i].input))
    found: dict[str, list[Answer]] = {}
    for name, model in params.items():
        console.print(f"{name}: answering {len(asked.rows)} {asked.source} ..")
        found[name] = answers(model, tokenizer, prompts[name], order, most, alike.sampling, alike.seed)
    scores = {
        side.name: asked_scores(asked.rows, found[side.name])
        | reference_scores(params[side.name], examples, "held-out " if asked.heldout else "")
        | rouge_scores(asked.rows, found[side.name])
        | text_scores(params[BASE], prompts[side.name], found[side.name], tokenizer.eos)
        for side, examples in progress([*zip(sides, references, strict=True)], "scoring the answers of each side")
    }
    about, settings = compare_asked.about(sides, asked, most, alike), compare_asked.settings(sides, asked, most, alike)
    return Comparison(compare_asked.title(sides), about, asked.rows, found, scores, settings)


def answers(
    params: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    order: Sequence[int],
    most: int,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
) -> list[Answer]:
    """Answers to the prompts, in their order. `order` is that in which they are written, `AT_ONCE` at a time: prompts
    of equal length as neighbors want little padding. Each draws by a key that its place in `order` gives.
    """
    found: dict[int, Answer] = {}
    with working("answering", len(order)) as advance:
        for i in range(0, len(order), AT_ONCE):
            some = order[i : i + AT_ONCE]
            rng = fold_in(key(seed), i) if sampling.temperature else None
            made = generate(
                params,
                [prompts[j] for j in some],
                eos_token_id=tokenizer.eos_token_ids,
                max_new_tokens=most,
                sampling=sampling,
                rng=rng,
            )
            for at, it in zip(some, made, strict=True):
                found[at] = Answer(tokenizer.decode(it.tokens).strip(), tuple(it.tokens), it.finished)
            advance(len(some))
    return [found[i] for i in range(len(prompts))]


def save(found: Comparison, out: Path, name: str) -> None:
    """Write what was found into `out`, and print it in short."""
    text, html = markdown(found), page(found)  # both, before the first file is there
    write_json(out / f"{name}.json", as_json(found))
    write(out / f"{name}.md", text)
    write(out / f"{name}.html", html)
    show(found)
    console.print(f"all {len(found.rows)} answers: {out / name}.md and .html")


def _place(sides: Sequence[Contender]) -> Path:
    """The run's folder, or for several runs a folder of their names beside the first."""
    tuned = [(side.name.replace("/", "-"), side.folder) for side in sides if side.folder is not None]
    first = tuned[0][1]
    return first if len(tuned) == 1 else first.parent / "-".join(["compare", *(name for name, _ in tuned)])


def _writable(out: Path) -> None:
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"cannot write into {out}: {there} is no folder that can be written; choose another --out")
