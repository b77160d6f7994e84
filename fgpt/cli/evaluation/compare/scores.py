"""The scores of a comparison: what the rows ask for, how near their own answers are, and what the texts show."""

from collections.abc import Sequence

from fgpt.cli.evaluation.compare.contenders import Contender
from fgpt.cli.evaluation.compare.results import Answer
from fgpt.cli.evaluation.metrics import constraints
from fgpt.cli.evaluation.metrics import finqa as finqa_score
from fgpt.cli.evaluation.metrics.nano import PARTS, Task, score
from fgpt.cli.evaluation.metrics.text import distinct, mean, nats, perplexity, repeated, rouge_l
from fgpt.data import packing
from fgpt.data.prompt_templates import Example, InstructionRow, encode, template
from fgpt.model import GPT, Config
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer


def fitting(cfg: Config, tokenizer: Tokenizer, run: InstructionRecipe, rows: Sequence[InstructionRow]) -> list[Example]:
    """The rows that fit the run's width, in its template."""
    encoded = [encode(row, template(run.template), tokenizer) for row in rows]
    return packing.filter_by_length(encoded, min(run.max_seq_len, cfg.n_ctx), drop=True)[0]


def referenced(
    cfg: Config, tokenizer: Tokenizer, sides: Sequence[Contender], rows: Sequence[InstructionRow]
) -> list[list[Example]]:
    """For each side the rows that have an answer, in its template: those alone that fit every run's width, so that all
    are measured on the same answers.
    """
    width = min(cfg.n_ctx, *(side.run.max_seq_len for side in sides))
    answered = [row for row in rows if row.output.strip()]
    encoded = [[encode(row, template(side.run.template), tokenizer) for row in answered] for side in sides]
    whole = [i for i in range(len(answered)) if all(len(some[i].tokens) <= width for some in encoded)]
    return [[some[i] for i in whole] for some in encoded]


def task_scores(rows: Sequence[InstructionRow], found: Sequence[Answer]) -> dict[str, float]:
    """Points by which the answers do what the instructions ask, where the rows say how to tell; else nothing."""
    tasks = [row for row in rows if isinstance(row, Task)]
    if not tasks or len(tasks) < len(rows):
        return {}
    got = score(tasks, [a.text for a in found], [a.finished for a in found])
    kinds = {f"points: {kind}": points for kind, points in got.by_kind.items()}
    parts = {f"stories with the {part} asked for (%)": x for part, x in got.by_requirement.items() if part in PARTS}
    return {"points (0 to 100)": got.points} | kinds | parts


def asked_scores(rows: Sequence[InstructionRow], found: Sequence[Answer]) -> dict[str, float]:
    """How far the answers do what the rows ask for, as far as a text shows it: points, FinQA's numbers, demands on the
    answers' form; of each nothing where the rows are not such.
    """
    said = [a.text for a in found]
    return task_scores(rows, found) | finqa_score.score(rows, said) | constraints.score(rows, said)


def reference_scores(params: GPT, examples: Sequence[Example], what: str) -> dict[str, float]:
    """How likely the rows' own answers are, end of text included; nothing where there are none. `what` they are goes
    before the names.
    """
    if not examples:
        return {}
    loss = nats(params, examples)
    return {f"{what}response loss (nats per token)": loss, f"{what}response perplexity": perplexity(loss)}


def rouge_scores(rows: Sequence[InstructionRow], found: Sequence[Answer]) -> dict[str, float]:
    """How many words answers share with the rows' own, in their order, where there are such."""
    pairs = [(row.output, answer.text) for row, answer in zip(rows, found, strict=True) if row.output.strip()]
    return {"ROUGE-L F1 (0 to 100)": rouge_l(*zip(*pairs))} if pairs else {}


def text_scores(base: GPT, prompts: Sequence[Sequence[int]], found: Sequence[Answer], end: int) -> dict[str, float]:
    """What the answers show by themselves. Perplexity is that of all their tokens under the base, given the prompts
    they answer: far above the base's own, a text it would hardly write; far below, one that goes in circles.
    """
    written = [
        Example((*prompt, *a.tokens, *([end] if a.finished else [])), len(prompt))
        for prompt, a in zip(prompts, found, strict=True)
    ]
    return shape_scores(found) | {"perplexity of the answers under the base": perplexity(nats(base, written))}


def shape_scores(found: Sequence[Answer]) -> dict[str, float]:
    """What the answers show without a model: how they end, how long they are, how they repeat."""
    texts = [a.text for a in found]
    return {
        "answers ended by the model (%)": 100 * mean([a.finished for a in found]),
        "mean answer length (tokens)": mean([len(a.tokens) for a in found]),
        "repeated 4-grams (%)": mean([repeated(text) for text in texts]),
        "distinct-1 (%)": distinct(texts, 1),
        "distinct-2 (%)": distinct(texts, 2),
    }
