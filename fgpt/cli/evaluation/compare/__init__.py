"""Base and tuned runs side by side on the same prompts: the same decoding for each, scores on top.

compare.md, compare.html    for a reader
compare.json                scores, answers, and the settings they were generated with
compare-3-prompts.*         the same with other settings than the run's own, named by those
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from fgpt.cli import results as result_files
from fgpt.cli.console import console, progress, show_progress
from fgpt.cli.evaluation.compare import contenders, prompts
from fgpt.cli.evaluation.compare.contenders import BASE, Contender
from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.intervals import Parts, best_sides, half_widths
from fgpt.cli.evaluation.compare.markdown import show, to_markdown
from fgpt.cli.evaluation.compare.prompts import ComparisonPrompts, held_out
from fgpt.cli.evaluation.compare.results import Answer, Comparison, as_json
from fgpt.cli.evaluation.compare.scores import (
    instruction_scores,
    prompt_parts,
    reference_answers,
    reference_scores,
    rouge_scores,
    text_scores,
)
from fgpt.cli.inference.options import DEFAULT_DECODING, ComparisonDecoding
from fgpt.cli.output_options import is_json, print_json
from fgpt.cli.training.examples import load_heldout_rows
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.prompt_templates import InstructionRow
from fgpt.distributed import map_over_ranks
from fgpt.errors import InputError
from fgpt.generation.loop import GenerationOutput, generate
from fgpt.generation.sampling import GREEDY, SamplingParams
from fgpt.io.files import write, write_json
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer

NAME, SUFFIXES = "compare", (".json", ".md", ".html")

BATCH_SIZE = 32
"""Prompts answered in one batch."""


def compare_after_training(run: InstructionRecipe, out: Path, heldout: Sequence[InstructionRow]) -> Comparison:
    """The answers of base and tuned model to held-out prompts, and their scores."""
    sides = contenders.from_runs([run], [out])
    return compare_contenders(sides, held_out(sides, heldout, run.compare_prompts), DEFAULT_DECODING)


def compare_runs(
    names: Sequence[str],
    decoding: ComparisonDecoding = DEFAULT_DECODING,
    prompt_source: str | None = None,
    num_prompts: int | None = None,
    out: Path | None = None,
) -> None:
    """Compare trained runs with their base and with each other, and write the comparison. Its file name is that of its
    settings, and a comparison with other settings is not overwritten.

    Args:
        names: Names of runs, or their directories.
        decoding: How every side generates.
        prompt_source: A file of prompts; None takes what the first run held out.
        num_prompts: Only the first prompts; None takes all of a file, and of held-out ones as many as after training.
        out: None takes the run directory, and for several runs compare-NAMES beside the first.

    Raises InputError, before anything slow begins, for what `contenders.find` and `prompt_file.read` refuse.
    """
    sides = contenders.find(names)
    if num_prompts is not None and num_prompts < 1:
        raise InputError(f"num_prompts is {num_prompts}: expected 1 or more")
    first, in_run_dir = sides[0].run, len(sides) == 2 and out is None
    out = out or _default_out(sides)
    _check_writable(out)
    if prompt_source is None:
        count = num_prompts or first.compare_prompts or InstructionRecipe.compare_prompts
        chosen = held_out(sides, load_heldout_rows(first), count)
    else:
        chosen = prompts.from_file(sides, prompt_source, num_prompts)
    comparison = compare_contenders(sides, chosen, decoding)
    short = NAME if prompt_source is None else f"{NAME}-{result_files.name_part(Path(prompt_source).stem)}"
    full = "-".join([short, *_other_settings(first, prompt_source, num_prompts, decoding)])
    stems = [full] if in_run_dir else [short, full]  # in a directory of its own the first comparison has a short name
    save(comparison, out, result_files.free_name(out, stems, comparison.settings, SUFFIXES))


def _other_settings(
    run: InstructionRecipe, prompt_source: str | None, num_prompts: int | None, decoding: ComparisonDecoding
) -> list[str]:
    """The settings that differ from those of a comparison after training, as parts of a file name."""
    usual = None if prompt_source is not None else run.compare_prompts or InstructionRecipe.compare_prompts
    parts = []
    if num_prompts is not None and num_prompts != usual:
        parts.append(f"{num_prompts}-prompts")
    if decoding.max_new_tokens not in (None, run.max_new_tokens):
        parts.append(f"max-new-tokens-{decoding.max_new_tokens}")
    for name, value in dataclasses.asdict(decoding.sampling).items():
        if value:
            parts.append(f"{name.replace('_', '-')}-{value}")
    if decoding.seed and decoding.sampling.temperature:
        parts.append(f"seed-{decoding.seed}")
    return parts


def compare_contenders(
    sides: Sequence[Contender], chosen: ComparisonPrompts, decoding: ComparisonDecoding
) -> Comparison:
    """Every side's answers and scores.

    Raises InputError for a prompt that is too long for the model, before anything slow begins.
    """
    first, rows = sides[0].run, chosen.rows
    max_new_tokens = first.max_new_tokens if decoding.max_new_tokens is None else decoding.max_new_tokens
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: expected 1 or more")
    cfg, tokenizer, _ = load_tokenizer(first)
    encoded = {side.name: contenders.encode_prompts(side, rows, tokenizer) for side in sides}
    prompts.check(encoded, cfg.n_ctx)
    references = reference_answers(cfg, tokenizer, sides, rows)
    params = contenders.load_params(sides)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].instruction + rows[i].input))
    answers: dict[str, list[Answer]] = {}
    for name, model in params.items():
        console.print(f"{name}: answering {len(rows)} {chosen.source} ..")
        answers[name] = generate_answers(
            model, tokenizer, encoded[name], order, max_new_tokens, decoding.sampling, decoding.seed
        )
    scores: dict[str, dict[str, float]] = {}
    parts: dict[str, Parts] = {}
    for side, examples in progress([*zip(sides, references.by_side, strict=True)], "scoring the answers of each side"):
        prefix = "held-out " if chosen.heldout else ""
        of_references, loss_parts = reference_scores(params[side.name], examples, references.turns, prefix)
        scores[side.name] = (
            instruction_scores(rows, answers[side.name])
            | of_references
            | rouge_scores(rows, answers[side.name])
            | text_scores(params[BASE], encoded[side.name], answers[side.name], tokenizer.eos_token_id)
        )
        by_prompt = prompt_parts(rows, answers[side.name]) | loss_parts
        parts[side.name] = {name: by_prompt[name] for name in scores[side.name] if name in by_prompt}
    about = prompts.about(sides, chosen, max_new_tokens, decoding)
    settings = prompts.settings(sides, chosen, max_new_tokens, decoding)
    return Comparison(
        prompts.title(sides),
        about,
        rows,
        answers,
        scores,
        settings,
        steps=contenders.steps(sides),
        intervals={side: half_widths(of_side) for side, of_side in parts.items()},
        best=best_sides(parts),
    )


def generate_answers(
    params: GPT,
    tokenizer: Tokenizer,
    encoded: Sequence[Sequence[int]],
    order: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
) -> list[Answer]:
    """Answers to the prompts, in the order of the prompts.

    Args:
        encoded: The tokens of each prompt.
        order: The order in which they are generated, `BATCH_SIZE` at a time: prompts of equal length in one batch need
            little padding. An answer samples with a key that its position in `order` gives. Several processes share the
            batches.
    """
    starts = range(0, len(order), BATCH_SIZE)

    def generate_batch(start: int) -> list[GenerationOutput]:
        return generate(
            params,
            [encoded[i] for i in order[start : start + BATCH_SIZE]],
            eos_token_id=tokenizer.eos_token_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            rng=fold_in(key(seed), start) if sampling.temperature else None,
        )

    answers: dict[int, Answer] = {}
    with show_progress("answering", len(order)) as advance:
        for start, outputs in zip(starts, map_over_ranks(generate_batch, starts), strict=True):
            for i, output in zip(order[start : start + BATCH_SIZE], outputs, strict=True):
                text = tokenizer.decode(output.tokens).strip()
                answers[i] = Answer(text, tuple(output.tokens), output.finished)
            advance(len(outputs))
    return [answers[i] for i in range(len(encoded))]


def save(comparison: Comparison, out: Path, stem: str) -> None:
    """Write a comparison into `out`, and print it in short."""
    text, html = to_markdown(comparison), page(comparison)  # both, before the first file is written
    write_json(out / f"{stem}.json", as_json(comparison))
    write(out / f"{stem}.md", text)
    write(out / f"{stem}.html", html)
    show(comparison)
    if is_json():
        print_json(as_json(comparison) | {"file": out / f"{stem}.json"})
    console.print(f"all {len(comparison.rows)} answers: {out / stem}.md and .html")


def _default_out(sides: Sequence[Contender]) -> Path:
    """The run directory, or for several runs a directory of their names beside the first."""
    tuned = [(side.name.replace("/", "-"), side.folder) for side in sides if side.folder is not None]
    first = tuned[0][1]
    return first if len(tuned) == 1 else first.parent / "-".join(["compare", *(name for name, _ in tuned)])


def _check_writable(out: Path) -> None:
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"cannot write into {out}: {existing} is not a writable directory; choose another --out")
