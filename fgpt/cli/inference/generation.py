"""Generation with a trained run: one text as it is written, several texts, and a conversation."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fgpt.cli import run_dir
from fgpt.cli.inference.options import GenerationOptions
from fgpt.cli.training.build import load_base
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.conversations import Message
from fgpt.data.prompt_templates import InstructionRow, Turn, encode_prompt, template
from fgpt.errors import InputError
from fgpt.generation.beam import beam_search
from fgpt.generation.loop import generate, stop_on_strings, stream, stream_text, truncate_at_stop
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer


class LoadedRun(NamedTuple):
    """A trained run, ready to generate."""

    recipe: InstructionRecipe
    params: GPT
    tokenizer: Tokenizer


def load_run(name: str) -> LoadedRun:
    """Raises InputError for an unknown run."""
    folder = run_dir.find_finished(name)
    recipe = run_dir.instruction_run(folder)
    return LoadedRun(recipe, run_dir.load_tuned(folder, load_base(recipe)), load_tokenizer(recipe).tokenizer)


def answer(name: str, instruction: str, context: str, options: GenerationOptions) -> None:
    """Print the responses of run `name` to an instruction, in the template it was trained with. `context` is what the
    instruction applies to; it may be empty.

    Raises InputError for an unknown run, or an empty or overlong prompt.
    """
    if not instruction.strip():
        raise InputError("the prompt is empty: say what to write")
    run = load_run(name)
    prompt = encode_prompt(InstructionRow(instruction, context, ""), template(run.recipe.template), run.tokenizer)
    if options.num_beams == 1 and options.num_return_sequences == 1:
        print_stream(generate_text(run, prompt, options))
        return
    texts = _beam_texts(run, prompt, options) if options.num_beams > 1 else _sampled_texts(run, prompt, options)
    print("\n\n".join(truncate_at_stop(text, options.stop).strip() for text in texts))


def _beam_texts(run: LoadedRun, prompt: Sequence[int], options: GenerationOptions) -> list[str]:
    if options.sampling.temperature:
        raise InputError("--num-beams searches for the likeliest text, and samples none: leave --temperature out")
    if options.num_return_sequences > options.num_beams:
        raise InputError(
            f"--num-return-sequences is {options.num_return_sequences}: expected at most --num-beams "
            f"{options.num_beams}"
        )
    beams = beam_search(
        run.params,
        prompt,
        eos_token_id=run.tokenizer.eos_token_ids,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        sampling=options.sampling,
    )
    return [run.tokenizer.decode(beam.tokens) for beam in beams[: options.num_return_sequences]]


def _sampled_texts(run: LoadedRun, prompt: Sequence[int], options: GenerationOptions) -> list[str]:
    if not options.sampling.temperature:
        raise InputError("greedy decoding gives one text: give --temperature above 0 for several, or --num-beams")
    outputs = generate(
        run.params,
        [prompt] * options.num_return_sequences,
        eos_token_id=run.tokenizer.eos_token_ids,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        rng=key(options.seed),
        stopping_criterion=stop_on_strings(run.tokenizer.decode, options.stop),
        compile=options.compile,
    )
    return [run.tokenizer.decode(output.tokens) for output in outputs]


def generate_text(run: LoadedRun, prompt: Sequence[int], options: GenerationOptions) -> Iterator[str]:
    """One text, piece by piece."""
    steps = stream(
        run.params,
        [prompt],
        eos_token_id=run.tokenizer.eos_token_ids,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        rng=key(options.seed),
        stopping_criterion=stop_on_strings(run.tokenizer.decode, options.stop),
        compile=options.compile,
    )
    tokens = (token.token for step in steps for token in step if not token.is_eos)
    return stream_text(run.tokenizer.decode, tokens, options.stop)


def print_stream(pieces: Iterator[str]) -> str:
    """Print a text as it comes, without white space around it; returns it."""
    text = ""
    for piece in pieces:
        printed = text.strip()
        text += piece
        new = text.strip()[len(printed) :] if printed else piece.lstrip()
        print(new, end="", flush=True)
    print()
    return text.strip()


# ---------------------------------------------------------------------------------------------------------------- chat

HELP = "/reset forgets the conversation, /temp 0.8 sets the temperature, /quit ends"


def chat(name: str, options: GenerationOptions, read: Callable[[str], str] = input) -> None:
    """A conversation with run `name`, line by line.

    Raises InputError for an unknown run.
    """
    run = load_run(name)
    print(f"{run.recipe.name}: {run.recipe.base}. {HELP}.")
    turns: list[InstructionRow] = []
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
                turns = []
            elif command == "/temp":
                options = replace(options, sampling=replace(options.sampling, temperature=_parse_number(value)))
            elif line.startswith("/"):
                raise InputError(f"no command {command}: {HELP}")
            elif line:
                turns.append(InstructionRow(line))
                prompt, num_turns = conversation_prompt(run, turns, options.max_new_tokens)
                if num_turns < len(turns):
                    dropped = len(turns) - num_turns
                    print(f"(the first {dropped} of {len(turns)} turns no longer fit, and are left out)")
                turn_seed = fold_in(key(options.seed), len(turns)).initial_seed()
                text = print_stream(generate_text(run, prompt, replace(options, seed=turn_seed)))
                turns[-1] = replace(turns[-1], output=text)
        except InputError as err:
            turns = [turn for turn in turns if turn.output]
            print(f"error: {err}", file=sys.stderr)


def conversation_prompt(run: LoadedRun, turns: Sequence[InstructionRow], max_new_tokens: int) -> tuple[list[int], int]:
    """The prompt of as many of the last turns as leave room for `max_new_tokens` tokens, or for half the context if
    that is less; and their number. The newest turn stays complete.

    Raises InputError if it is too long by itself.
    """
    context = run.params.cfg.cached_context
    limit, length = context - min(max_new_tokens, context // 2), 0
    for start in range(len(turns)):
        prompt = encode_conversation(run, turns[start:])
        if (length := len(prompt)) <= limit:
            return prompt, len(turns) - start
    raise InputError(f"the message has {length} tokens: expected at most {limit}, which leaves room to answer")


def encode_conversation(run: LoadedRun, turns: Sequence[InstructionRow]) -> list[int]:
    """The tokens of a conversation up to where the model is to answer, as in training."""
    messages: list[Message] = []
    for turn in turns:
        messages.append(Message("user", turn.instruction))
        if turn.output:
            messages.append(Message("assistant", turn.output))
    row = Turn(turns[-1].instruction, messages=tuple(messages))
    return list(encode_prompt(row, template(run.recipe.template), run.tokenizer))


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"/temp: expected a number such as 0.8, got {text!r}") from None
