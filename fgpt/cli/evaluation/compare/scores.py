"""The scores of a comparison: what the rows ask for, how likely their reference answers are, and text statistics."""

from collections.abc import Sequence
from dataclasses import dataclass

from fgpt.cli.evaluation.compare.contenders import Contender
from fgpt.cli.evaluation.compare.intervals import Part
from fgpt.cli.evaluation.compare.results import COUNTS, Answer
from fgpt.cli.evaluation.metrics import constraints
from fgpt.cli.evaluation.metrics import finqa as finqa_score
from fgpt.cli.evaluation.metrics.nano import score
from fgpt.cli.evaluation.metrics.text import (
    RESPONSE_LOSS,
    distinct,
    mean,
    nats,
    perplexity,
    repeated_ngrams,
    requests,
    response_losses,
    rouge_l,
)
from fgpt.cli.training.nano_rows import PARTS, Task
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import encode, encode_to_score, template
from fgpt.data.rows import InstructionRow, turn_number
from fgpt.distributed import world
from fgpt.evaluation.likelihood import loglikelihood
from fgpt.model import GPT, Config
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer


def fitting(cfg: Config, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow]) -> list[Example]:
    """The rows that fit the run's max_seq_len, in its template."""
    width = min(run.max_seq_len, cfg.n_ctx)
    encoded = encode_to_score(rows, template(run.template), tokenizer, width)
    return list(packing.filter_by_length(encoded, width, drop=True)[0])


@dataclass(frozen=True)
class ReferenceAnswers:
    """The reference answers of rows as tokens, after their prompts."""

    by_side: list[list[Example]]
    """In the template of each side."""
    turns: list[int]
    """The number of each answer in its conversation."""


def reference_answers(
    cfg: Config, tokenizer: Tokenizer, sides: Sequence[Contender], rows: Sequence[InstructionRow]
) -> ReferenceAnswers:
    """Those of the rows that have a reference answer and fit the max_seq_len of every run, so that all sides are
    measured on the same answers.
    """
    width = min(cfg.n_ctx, *(side.run.max_seq_len for side in sides))
    references = ReferenceAnswers([[] for _ in sides], [])
    for row in rows:
        if not row.output.strip():
            continue
        examples = [encode(row, template(side.run.template), tokenizer) for side in sides]
        if max(len(example.tokens) for example in examples) <= width:
            references.turns.append(turn_number(row))
            for side_examples, example in zip(references.by_side, examples, strict=True):
                side_examples.append(example)
    return references


def task_scores(rows: Sequence[InstructionRow], answers: Sequence[Answer]) -> dict[str, float]:
    """Points for how far the answers do what the instructions ask, if every row says how to check it; else nothing."""
    tasks = [row for row in rows if isinstance(row, Task)]
    if not tasks or len(tasks) < len(rows):
        return {}
    scores = score(tasks, [answer.text for answer in answers], [answer.finished for answer in answers])
    kinds = {f"points: {kind}": points for kind, points in scores.by_kind.items()}
    parts = {f"stories with the {part} asked for (%)": x for part, x in scores.by_requirement.items() if part in PARTS}
    return {"points (0 to 100)": scores.points} | kinds | parts


def instruction_scores(rows: Sequence[InstructionRow], answers: Sequence[Answer]) -> dict[str, float]:
    """How far the answers do what the rows ask for, as far as a text shows it: points of nano tasks, FinQA's numbers,
    constraints on the form of the answer; of each nothing if the rows are not of that kind.
    """
    texts = [answer.text for answer in answers]
    return task_scores(rows, answers) | finqa_score.score(rows, texts) | constraints.score(rows, texts)


def reference_scores(
    params: GPT, examples: Sequence[Example], turns: Sequence[int], prefix: str
) -> tuple[dict[str, float], dict[str, list[Part]]]:
    """How likely the reference answers are, EOS included, and the part of each in the loss; nothing if there are none.
    The names begin with `prefix`.
    """
    if not examples:
        return {}, {}
    likelihoods = loglikelihood(params, requests(examples), world=world())
    losses = response_losses(likelihoods, turns)
    scores = losses | {"response perplexity": perplexity(losses[RESPONSE_LOSS])}
    parts = [Part(-likelihood.total, len(likelihood.logprobs)) for likelihood in likelihoods]
    return {prefix + name: value for name, value in scores.items()}, {prefix + RESPONSE_LOSS: parts}


def prompt_parts(rows: Sequence[InstructionRow], answers: Sequence[Answer]) -> dict[str, list[Part]]:
    """The part of each prompt in `instruction_scores` and `rouge_scores`."""
    parts: dict[str, list[Part]] = {}
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        scores = instruction_scores([row], [answer]) | rouge_scores([row], [answer])
        for name, value in scores.items():
            weight = scores.get(COUNTS.get(name, ""), 1)
            parts.setdefault(name, [Part(0, 0)] * len(rows))[i] = Part(weight * value, weight)
    return parts


def rouge_scores(rows: Sequence[InstructionRow], answers: Sequence[Answer]) -> dict[str, float]:
    """ROUGE-L of the answers against the reference answers; nothing if there are none."""
    pairs = [(row.output, answer.text) for row, answer in zip(rows, answers, strict=True) if row.output.strip()]
    return {"ROUGE-L F1 (0 to 100)": rouge_l(*zip(*pairs))} if pairs else {}


def text_scores(
    base: GPT, prompts: Sequence[Sequence[int]], answers: Sequence[Answer], eos_token_id: int
) -> dict[str, float]:
    """Statistics of the answers by themselves, and their perplexity under the base given the prompts: far above the
    base's own, a text it would hardly generate; far below, a repetitive one.
    """
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        eos = [eos_token_id] if answer.finished else []
        examples.append(Example.completion((*prompt, *answer.tokens, *eos), len(prompt)))
    return shape_scores(answers) | {"perplexity of the answers under the base": perplexity(nats(base, examples))}


def shape_scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Statistics that need no model: how the answers end, how long they are, how they repeat."""
    texts = [answer.text for answer in answers]
    return {
        "answers finished with EOS (%)": 100 * mean([answer.finished for answer in answers]),
        "mean answer length (tokens)": mean([len(answer.tokens) for answer in answers]),
        "repeated 4-grams (%)": mean([repeated_ngrams(text) for text in texts]),
        "distinct-1 (%)": distinct(texts, 1),
        "distinct-2 (%)": distinct(texts, 2),
    }
