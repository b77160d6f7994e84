"""Generation with a trained run, or a model as it is: one text as it is written, several texts, and a conversation."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fgpt.classification_head import num_classes
from fgpt.cli import run_dir
from fgpt.cli.console import console, show_progress
from fgpt.cli.devices import resolve_device, resolve_dtype
from fgpt.cli.inference.options import DEFAULT_DOCUMENTS, DocumentOptions, GenerationOptions
from fgpt.cli.output_options import is_json, print_json
from fgpt.cli.paths import shareable
from fgpt.cli.training.build import load_base
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.conversations import Message
from fgpt.data.prompt_templates import NONE, InstructionRow, Turn, encode_prompt, template
from fgpt.errors import InputError
from fgpt.extras import require_extra
from fgpt.generation.beam import beam_search
from fgpt.generation.loop import generate, stop_on_strings, stream, stream_text, truncate_at_stop
from fgpt.io import models
from fgpt.io.files import read_text
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe, PretrainingRecipe
from fgpt.retrieval.passages import AugmentedRow, augment_to_fit, question_of
from fgpt.retrieval.retriever import Retriever, open_retriever
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tokenizer_files import Tokenizer


class LoadedRun(NamedTuple):
    """A trained run, or a model as it is, ready to generate."""

    recipe: InstructionRecipe
    """Of a model as it is, one of its name and prompt template."""
    params: GPT
    tokenizer: Tokenizer


def find_retriever(documents: DocumentOptions) -> Retriever | None:
    """What finds passages; None without documents. Raises InputError as `open_retriever` does."""
    if documents.documents is None:
        if documents != DEFAULT_DOCUMENTS:
            raise InputError("--num-passages is of --documents: give both, or leave it out")
        return None
    require_extra("retrieval", "indexes of documents", "lancedb")
    return open_retriever(documents.documents, documents.num_passages)


def load_run(name: str, prompt_template: str | None = None) -> LoadedRun:
    """A run by its name or folder; or a model: nano, smollm2, a folder, a GGUF file, a name on the Hub.

    Args:
        name: Of a run or a model. A run comes first.
        prompt_template: None takes that of the training; of a model, its chat template if it has one.

    Raises:
        InputError: if there is neither, and for a run that generates no text.
    """
    if run_dir.is_model(name):
        return _load_model(name, name, prompt_template)
    try:
        folder = run_dir.find_finished(name)
    except InputError as err:
        raise InputError(f"{err}; a model is nano, smollm2, a folder, a GGUF file or a name on the Hub") from None
    recipe = run_dir.read_run(folder)
    if isinstance(recipe, PretrainingRecipe):
        return _load_model(recipe.name, str(folder / run_dir.MODEL), prompt_template)
    recipe = run_dir.instruction_run(folder)
    tokenizer = load_tokenizer(recipe).tokenizer
    recipe = replace(recipe, template=prompt_template or recipe.template)
    template(recipe.template)  # an unknown one is refused before the model is loaded
    return LoadedRun(recipe, run_dir.load_tuned(folder, load_base(recipe)), tokenizer)


def _load_model(name: str, source: str, prompt_template: str | None) -> LoadedRun:
    tokenizer = models.tokenizer(source)
    prompt_template = prompt_template or _template_of_model(source, tokenizer)
    template(prompt_template)
    target = resolve_device("auto")
    with show_progress(f"loading {name}"):
        params = models.load(source, resolve_dtype("auto", target), device=target)
    if (classes := num_classes(params)) is not None:
        raise InputError(f"{name} is a classifier of {classes} classes: expected a language model")
    return LoadedRun(InstructionRecipe(name=name, base=source, data=(), template=prompt_template), params, tokenizer)


def _template_of_model(source: str, tokenizer: Tokenizer) -> str:
    """That of the run whose merged model this is; else chat, if its tokenizer has a chat template, or none."""
    folder = Path(source).parent
    if (folder / run_dir.RUN).is_file():
        recipe = run_dir.read_run(folder)
        return recipe.template if isinstance(recipe, InstructionRecipe) else NONE.name
    return "chat" if tokenizer.chat_template is not None else NONE.name


def answer(
    name: str,
    instruction: str,
    context: str,
    options: GenerationOptions,
    prompt_template: str | None = None,
    documents: DocumentOptions = DEFAULT_DOCUMENTS,
) -> None:
    """Print the responses of a run or a model to an instruction, and the sources of the passages in its prompt.

    Args:
        name: As `load_run` takes it.
        instruction: The prompt; `-` reads standard input.
        context: What the instruction applies to; it may be empty.
        options: How to generate.
        prompt_template: As `load_run` takes it.
        documents: Where passages come from.

    Raises:
        InputError: as `load_run` does, for an unknown index, and for an empty or overlong prompt.
    """
    check_decoding(options)
    if instruction == "-":
        instruction = read_text(Path("-")).strip()
    if not instruction.strip():
        raise InputError("the prompt is empty: say what to write")
    retriever = find_retriever(documents)
    run = load_run(name, prompt_template)
    row, limit = InstructionRow(instruction, context, ""), prompt_limit(run, options.max_new_tokens)
    augmented = _augment(retriever, row, lambda row: len(encode_row(run, row)), limit)
    prompt = encode_row(run, augmented.row)
    if options.num_beams == 1 and options.num_return_sequences == 1:
        pieces = generate_text(run, prompt, options)
        if not is_json():
            print_stream(pieces)
            _print_sources(augmented)
            return
        texts = ["".join(pieces)]
    elif options.num_beams > 1:
        texts = _beam_texts(run, prompt, options)
    else:
        texts = _sampled_texts(run, prompt, options)
    texts = [truncate_at_stop(text, options.stop).strip() for text in texts]
    if is_json():
        about = {"run": name, "base": shareable(run.recipe.base), "template": run.recipe.template}
        about |= {"prompt": instruction, "input": context, "responses": texts}
        print_json(about | {"sources": [passage.where for passage in augmented.passages]})
        _print_dropped(augmented)
        return
    print("\n\n".join(texts))
    _print_sources(augmented)


def check_decoding(options: GenerationOptions) -> None:
    """Raises InputError for an option that would have no effect."""
    for name in ("top_k", "top_p", "min_p"):
        if not options.sampling.temperature and getattr(options.sampling, name) is not None:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is of samples, and temperature 0 takes none: give --temperature 1 as well")
    if options.num_beams == 1 and options.length_penalty != GenerationOptions.length_penalty:
        raise InputError("--length-penalty is of beam search: give --num-beams 4 as well, or leave it out")


def prompt_limit(run: LoadedRun, max_new_tokens: int) -> int:
    """Tokens of a prompt that leaves room for `max_new_tokens`, or for half the context if that is less."""
    context = run.params.cfg.cached_context
    return context - min(max_new_tokens, context // 2)


def _augment(
    retriever: Retriever | None, row: InstructionRow, length: Callable[[InstructionRow], int], max_length: int
) -> AugmentedRow:
    """The row with the passages for its question, as many as have room."""
    question = None if retriever is None else question_of(row)
    if retriever is None or question is None:
        return AugmentedRow(row, [], 0)
    (passages,) = retriever.find([question])
    return augment_to_fit(row, passages, length=length, max_length=max_length)


def _print_sources(augmented: AugmentedRow) -> None:
    """Print where the passages of a prompt come from, and how many had no room."""
    if augmented.passages:
        print("sources:", "; ".join(f"[{i}] {passage.where}" for i, passage in enumerate(augmented.passages, 1)))
    _print_dropped(augmented)


def _print_dropped(augmented: AugmentedRow) -> None:
    if augmented.num_dropped:
        count = len(augmented.passages) + augmented.num_dropped
        console.print(
            f"dropped {augmented.num_dropped} of {count} passages, for which the context has no room: lower "
            "--max-new-tokens, or index with a smaller --chunk-size",
            soft_wrap=True,
        )


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


def chat(
    name: str,
    options: GenerationOptions,
    prompt_template: str | None = None,
    documents: DocumentOptions = DEFAULT_DOCUMENTS,
    read: Callable[[str], str] = input,
) -> None:
    """A conversation with a run or a model, line by line. Passages stand in the prompt of their question.

    Raises InputError as `load_run` does, and for an unknown index.
    """
    retriever = find_retriever(documents)
    run = load_run(name, prompt_template)
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
                prompt, num_turns, augmented = conversation_prompt(run, turns, options.max_new_tokens, retriever)
                if num_turns < len(turns):
                    dropped = len(turns) - num_turns
                    print(f"(the first {dropped} of {len(turns)} turns no longer fit, and are left out)")
                turn_seed = fold_in(key(options.seed), len(turns)).initial_seed()
                text = print_stream(generate_text(run, prompt, replace(options, seed=turn_seed)))
                _print_sources(augmented)
                turns[-1] = replace(turns[-1], output=text)
        except InputError as err:
            turns = [turn for turn in turns if turn.output]
            print(f"error: {err}", file=sys.stderr)


class ConversationPrompt(NamedTuple):
    """The tokens of a prompt, the number of turns in it, and its last turn with the passages that it has."""

    tokens: list[int]
    num_turns: int
    last: AugmentedRow


def conversation_prompt(
    run: LoadedRun, turns: Sequence[InstructionRow], max_new_tokens: int, retriever: Retriever | None = None
) -> ConversationPrompt:
    """The prompt of as many of the last turns as leave room for an answer, with the passages for the newest turn, which
    have less right to the room than the turns do.

    Raises InputError if the newest turn is too long by itself.
    """
    limit, length = prompt_limit(run, max_new_tokens), 0
    for start in range(len(turns)):
        length = len(encode_conversation(run, turns[start:]))
        if length <= limit:
            last = _augment(
                retriever, conversation_row(turns[start:]), lambda row: len(encode_row(run, row)), max_length=limit
            )
            return ConversationPrompt(encode_row(run, last.row), len(turns) - start, last)
    raise InputError(f"the message has {length} tokens: expected at most {limit}, which leaves room to answer")


def encode_conversation(run: LoadedRun, turns: Sequence[InstructionRow]) -> list[int]:
    """The tokens of a conversation up to where the model is to answer, as in training."""
    return encode_row(run, conversation_row(turns))


def conversation_row(turns: Sequence[InstructionRow]) -> InstructionRow:
    """The newest turn after those before it. One by itself is an instruction, whose prompt is that of `answer`."""
    if len(turns) == 1:
        return turns[0]
    messages: list[Message] = []
    for turn in turns:
        messages.append(Message("user", turn.instruction))
        if turn.output:
            messages.append(Message("assistant", turn.output))
    return Turn(turns[-1].instruction, messages=tuple(messages))


def encode_row(run: LoadedRun, row: InstructionRow) -> list[int]:
    """The tokens of a row's prompt."""
    return list(encode_prompt(row, template(run.recipe.template), run.tokenizer))


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"/temp: expected a number such as 0.8, got {text!r}") from None
