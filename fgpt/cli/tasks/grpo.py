"""GRPO, from its recipe to a comparison of base and tuned model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from fgpt.cli.console import announce, console, progress
from fgpt.cli.devices import describe_precision, resolve_precision
from fgpt.cli.evaluation.compare import BATCH_SIZE
from fgpt.cli.evaluation.rewards import reward_function
from fgpt.cli.tasks.instruction_tuning import InstructionTask
from fgpt.cli.training.build import (
    build_adapters,
    describe_sizes,
    load_base,
    row_length,
    warn_if_all_warmup,
)
from fgpt.cli.training.examples import encoding_of, load_rows_to_answer
from fgpt.cli.training.format_cost import print_format_cost
from fgpt.cli.training.objectives import refuse_instruction_options
from fgpt.cli.training.rollout_job import assemble_rollout_job
from fgpt.cli.training.row_reports import resolve_template
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import InstructionRow, encode_prompt, template
from fgpt.distributed import map_over_ranks
from fgpt.errors import InputError
from fgpt.generation.loop import GenerationOutput, generate
from fgpt.model import GPT
from fgpt.objectives.rollouts import RewardFunction
from fgpt.recipes import GRPORecipe, InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer


@dataclass(frozen=True, eq=False)
class GRPOTask(InstructionTask):
    """Learn from rewards of the model's own answers to instructions."""

    @classmethod
    def build(cls, recipe: InstructionRecipe) -> "GRPOTask":
        """Raises InputError for bad input."""
        assert isinstance(recipe, GRPORecipe)
        refuse_instruction_options(recipe)
        if recipe.cuda_graphs:
            raise InputError("--cuda-graphs needs batches of few shapes, and sampled answers have many: leave it out")
        if recipe.neftune_noise_alpha:
            raise InputError("--neftune-noise-alpha changes the policy that has sampled the answers: leave it out")
        recipe = resolve_precision(recipe)
        loaded = load_tokenizer(recipe)
        cfg, tokenizer, _ = loaded
        recipe = cast(GRPORecipe, resolve_template(recipe, tokenizer))
        rows, heldout = load_rows_to_answer(recipe, encoding_of(recipe, loaded))
        reward = reward_function(recipe.reward, [*rows, *heldout])
        rows, prompts = _encode_prompts(recipe, rows, tokenizer, row_length(recipe, cfg))
        searched = _describe_spans(recipe, rows)
        base = load_base(recipe)
        adapters = build_adapters(recipe, base)
        scored, scored_prompts = _encode_heldout(recipe, heldout, tokenizer, row_length(recipe, cfg))
        job = assemble_rollout_job(
            recipe,
            base,
            adapters=adapters,
            rows=rows,
            prompts=prompts,
            reward=reward,
            tokenizer=tokenizer,
            heldout_loss=(lambda params: _missing_reward(params, recipe, scored, scored_prompts, reward, tokenizer))
            if scored
            else None,
            heldout_rows=heldout,
            template=repr(template(recipe.template)),
        )
        announce(
            recipe.name,
            describe_sizes(recipe.base, base, adapters),
            describe_precision(recipe),
            f"{len(prompts):,} prompts, {recipe.prompts_per_update} of them with {recipe.num_generations} answers each "
            f"in a step, {job.steps} steps",
            *searched,
            *warn_if_all_warmup(recipe.peak_lr, job.steps, recipe.num_warmup_steps(job.steps)),
        )
        print_format_cost(recipe, base, (Example(tokens, ()) for tokens in prompts))
        return cls(cast(GRPORecipe, job.recipe), job, heldout)


def _describe_spans(recipe: GRPORecipe, rows: Sequence[InstructionRow]) -> list[str]:
    """What is searched for spans, in words; nothing if nothing is asked for."""
    if not recipe.span_words:
        return []
    count = sum(bool(row.input.strip()) for row in rows)
    if not count:
        return [f"no row has an input whose spans could be tried as answers (--span-words {recipe.span_words})"]
    return [f"spans of up to {recipe.span_words} words are tried as answers to the {count:,} rows with an input"]


def _encode_prompts(
    recipe: GRPORecipe, rows: Sequence[InstructionRow], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[InstructionRow], list[tuple[int, ...]]]:
    """The rows whose prompts leave room for an answer, and those prompts. How many were left out is printed.

    Raises InputError for a longer prompt if the recipe's `overlong` is "error", and if no row is left.
    """
    limit = max_seq_len - recipe.max_completion_length
    fitting_rows: list[InstructionRow] = []
    prompts: list[tuple[int, ...]] = []
    for i, row in enumerate(progress(list(rows), "tokenizing"), 1):
        prompt = encode_prompt(row, template(recipe.template), tokenizer)
        if len(prompt) <= limit:
            fitting_rows.append(row)
            prompts.append(prompt)
        elif recipe.overlong == "error":
            raise InputError(
                f"the prompt of row {i} has {len(prompt)} tokens, and --max-completion-length "
                f"{recipe.max_completion_length} leaves {limit} of {max_seq_len}: lower it, or give --overlong drop"
            )
    if not prompts:
        raise InputError(
            f"no prompt is left: all {len(rows)} are longer than {limit} tokens, what --max-completion-length "
            f"{recipe.max_completion_length} leaves of {max_seq_len}"
        )
    if len(fitting_rows) < len(rows):
        console.print(f"left out {len(rows) - len(fitting_rows)} rows whose prompts are longer than {limit} tokens")
    return fitting_rows, prompts


def _encode_heldout(
    recipe: GRPORecipe, heldout: Sequence[InstructionRow], tokenizer: Tokenizer, max_seq_len: int
) -> tuple[list[InstructionRow], list[tuple[int, ...]]]:
    """The rows of the comparison, or all held-out rows without one, whose prompts leave room for an answer."""
    rows = heldout[: recipe.compare_prompts or len(heldout)]
    encoded = [(row, encode_prompt(row, template(recipe.template), tokenizer)) for row in rows]
    fitting = [(row, prompt) for row, prompt in encoded if len(prompt) < max_seq_len]
    return [row for row, _ in fitting], [prompt for _, prompt in fitting]


def _missing_reward(
    params: GPT,
    recipe: GRPORecipe,
    rows: Sequence[InstructionRow],
    prompts: Sequence[Sequence[int]],
    reward: RewardFunction,
    tokenizer: Tokenizer,
) -> float:
    """1 - the mean reward of greedy answers to held-out prompts."""
    parts = [prompts[begin : begin + BATCH_SIZE] for begin in range(0, len(prompts), BATCH_SIZE)]

    def answer(part: Sequence[Sequence[int]]) -> list[GenerationOutput]:
        return generate(params, part, eos_token_id=tokenizer.eos_token_id, max_new_tokens=recipe.max_new_tokens)

    outputs = [output for part_outputs in map_over_ranks(answer, parts) for output in part_outputs]
    texts = [tokenizer.decode(output.tokens) for output in outputs]
    rewards = [reward(row, text, output.finished) for row, text, output in zip(rows, texts, outputs, strict=True)]
    return 1 - sum(rewards) / len(rewards)
