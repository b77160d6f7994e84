"""An instruction-tuned run on rows that it was not trained on: the loss of their answers, and the scores of its own."""

import math
from collections.abc import Sequence

from fgpt.cli.evaluation.compare import contenders, generate_answers
from fgpt.cli.evaluation.compare.scores import instruction_scores, rouge_scores, shape_scores
from fgpt.cli.evaluation.metrics.text import RESPONSE_LOSS, requests, response_losses
from fgpt.cli.evaluation.tables import Metrics, print_metrics
from fgpt.cli.evaluation.text import loglikelihoods
from fgpt.data import packing
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import encode_to_score, template
from fgpt.data.rows import InstructionRow, turn_number
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer


def response_metrics(
    params: GPT,
    tokenizer: Tokenizer,
    recipe: InstructionRecipe,
    *,
    rows: Sequence[InstructionRow],
    batch_size: int,
    title: str,
) -> Metrics:
    """Loss and perplexity of the reference answers, EOS included, of the rows that fit the recipe's max_seq_len.
    A raw text counts as many rows as it is split into for training.
    """
    width = min(recipe.max_seq_len, params.cfg.n_ctx)
    examples: list[Example] = []
    turns: list[int] = []
    for row in rows:
        parts = encode_to_score([row], template(recipe.template), tokenizer, width)
        examples += parts
        turns += len(parts) * [turn_number(row)]
    usable, dropped = packing.usable_indices(examples, width, drop=True)
    likelihoods = loglikelihoods(params, requests([examples[i] for i in usable]), batch_size)
    losses = response_losses(likelihoods, [turns[i] for i in usable])
    num_tokens = sum(len(likelihood.logprobs) for likelihood in likelihoods)
    counts = {"rows": len(usable), "rows left out": dropped.long + dropped.empty, "response tokens": num_tokens}
    values = losses | {"response perplexity": math.exp(min(losses[RESPONSE_LOSS], 700))}
    return print_metrics(title, counts, values)


def answer_metrics(
    params: GPT, tokenizer: Tokenizer, recipe: InstructionRecipe, rows: Sequence[InstructionRow]
) -> Metrics:
    """The scores of greedy answers to the rows, as `fgpt compare` computes them, but for those that need the base."""
    prompts = contenders.encode_prompts(contenders.Contender("", recipe), rows, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = generate_answers(params, tokenizer, prompts, order, recipe.max_new_tokens)
    scores = instruction_scores(rows, answers) | rouge_scores(rows, answers) | shape_scores(answers)
    counts = {"rows": len(rows), "max new tokens": recipe.max_new_tokens}
    return print_metrics("answers to held-out rows", counts, scores)
