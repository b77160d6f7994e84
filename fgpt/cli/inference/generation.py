"""Answers from a trained run: one, as it is written, or several; and a conversation."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fgpt.cli import run_dir
from fgpt.cli.inference.options import GenerationOptions
from fgpt.cli.training.instruction_tuning import load_base
from fgpt.data.conversations import Message
from fgpt.data.prompt_templates import InstructionRow, Turn, encode_prompt, template
from fgpt.errors import InputError
from fgpt.generation.beam import beam_search
from fgpt.generation.loop import generate, stop_on_strings, stream, stream_text, truncate_at_stop
from fgpt.io import models
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer


class LoadedRun(NamedTuple):
    """A trained run, ready to write."""

    run: InstructionRecipe
    params: GPT
    tokenizer: Tokenizer


def load_run(name: str) -> LoadedRun:
    """Raises InputError for an unknown run."""
    out = run_dir.find_finished(name)
    run = run_dir.instruction_run(out)
    return LoadedRun(run, run_dir.load_tuned(out, load_base(run)), models.tokenizer(run.base))


def answer(name: str, instruction: str, given: str, how: GenerationOptions) -> None:
    """Print what run `name` answers to an instruction, in the template it was trained with.

    Raises InputError for an unknown run, or an empty or overlong prompt.
    """
    if not instruction.strip():
        raise InputError("the prompt is empty: say what to write")
    it = load_run(name)
    prompt = encode_prompt(InstructionRow(instruction, given, ""), template(it.run.template), it.tokenizer)
    ends = it.tokenizer.eos_token_ids
    if how.num_beams > 1:
        sampling = replace(how.sampling, temperature=0.0)
        found = beam_search(
            it.params,
            prompt,
            eos_token_id=ends,
            max_new_tokens=how.max_new_tokens,
            num_beams=how.num_beams,
            length_penalty=how.length_penalty,
            sampling=sampling,
        )
        texts = [it.tokenizer.decode(beam.tokens) for beam in found[: how.num_return_sequences]]
    elif how.num_return_sequences == 1:
        print_sampling(generate_texts(it, prompt, how))
        return
    else:
        if not how.sampling.temperature:
            raise InputError("the likeliest text is one: give --temperature above 0 for several, or --num-beams")
        many, stop = [prompt] * how.num_return_sequences, stop_on_strings(it.tokenizer.decode, how.stop)
        rng = key(how.seed)
        made = generate(
            it.params,
            many,
            eos_token_id=ends,
            max_new_tokens=how.max_new_tokens,
            sampling=how.sampling,
            rng=rng,
            stopping_criterion=stop,
            compile=how.compile,
        )
        texts = [it.tokenizer.decode(x.tokens) for x in made]
    print("\n\n".join(truncate_at_stop(text, how.stop).strip() for text in texts))


def generate_texts(it: LoadedRun, prompt: Sequence[int], how: GenerationOptions) -> Iterator[str]:
    """One text, piece by piece."""
    stop, rng = stop_on_strings(it.tokenizer.decode, how.stop), key(how.seed)
    end, compiled = it.tokenizer.eos_token_ids, how.compile
    steps = stream(
        it.params,
        [prompt],
        eos_token_id=end,
        max_new_tokens=how.max_new_tokens,
        sampling=how.sampling,
        rng=rng,
        stopping_criterion=stop,
        compile=compiled,
    )
    return stream_text(it.tokenizer.decode, (x.token for step in steps for x in step if not x.is_eos), how.stop)


def print_sampling(text: Iterator[str]) -> str:
    """Print a text as it comes, without white space about it; returns it."""
    told = ""
    for piece in text:
        new = (told + piece).strip()[len(told.strip()) :] if told.strip() else piece.lstrip()
        told += piece
        print(new, end="", flush=True)
    print()
    return told.strip()


# ---------------------------------------------------------------------------------------------------------------- chat

HELP = "/reset forgets what was said, /temp 0.8 sets the temperature, /quit ends"


def chat(name: str, how: GenerationOptions, read: Callable[[str], str] = input) -> None:
    """A conversation with run `name`, line by line.

    Raises InputError for an unknown run.
    """
    it = load_run(name)
    print(f"{it.run.name}: {it.run.base}. {HELP}.")
    said: list[InstructionRow] = []
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        command, _, value = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/reset":
                said = []
            elif command == "/temp":
                how = replace(how, sampling=replace(how.sampling, temperature=_number(value)))
            elif line.startswith("/"):
                raise InputError(f"no command {command}: {HELP}")
            elif line:
                said.append(InstructionRow(line))
                prompt, kept = fitting(it, said, how.max_new_tokens)
                if kept < len(said):
                    print(f"(the first {len(said) - kept} of {len(said)} turns no longer fit, and are left out)")
                text = print_sampling(
                    generate_texts(it, prompt, replace(how, seed=fold_in(key(how.seed), len(said)).initial_seed()))
                )
                said[-1] = replace(said[-1], output=text)
        except InputError as err:
            said = [row for row in said if row.output]
            print(f"error: {err}", file=sys.stderr)


def fitting(it: LoadedRun, said: Sequence[InstructionRow], most: int) -> tuple[list[int], int]:
    """The prompt of as many of the last turns as leave room for `most` tokens, or for half the context if that is less;
    and their number. The newest turn stays whole.

    Raises InputError where it alone is too long.
    """
    context = it.params.cfg.cached_context
    limit, length = context - min(most, context // 2), 0
    for start in range(len(said)):
        prompt = conversation(it, said[start:])
        if (length := len(prompt)) <= limit:
            return prompt, len(said) - start
    raise InputError(f"that is {length} tokens; the model takes {limit} and an answer: say it in fewer words")


def conversation(it: LoadedRun, said: Sequence[InstructionRow]) -> list[int]:
    """The tokens of a conversation up to where the model is to answer: those that training has there."""
    messages: list[Message] = []
    for row in said:
        messages.append(Message("user", row.instruction))
        messages += [Message("assistant", row.output)] if row.output else []
    turn = Turn(said[-1].instruction, messages=tuple(messages))
    return list(encode_prompt(turn, template(it.run.template), it.tokenizer))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"/temp wants a number such as 0.8, got {text!r}") from None
