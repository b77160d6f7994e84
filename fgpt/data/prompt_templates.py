"""From a row of text to tokens: one template serves training and generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fgpt.data.conversations import Message
from fgpt.errors import InputError
from fgpt.tokenizers.tokenizer_files import Tokenizer


@dataclass(frozen=True)
class InstructionRow:
    """An instruction, what it is to be applied to (may be empty), and its answer (empty when it is to be generated)."""

    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class Turn(InstructionRow):
    """An answer within a conversation: `output` is the answer; for people to read, `instruction` is the message before
    it, and `input` the conversation up to there. A prompt is made of `messages` alone.

    A row of one instruction is the turn whose only message is the user's.
    """

    messages: tuple[Message, ...] = ()
    """All that precedes the answer."""
    weight: float = 1.0
    """What each token of the answer counts in the loss."""
    conversation: str = ""
    """Where the conversation was read, the same for all its turns."""


@dataclass(frozen=True)
class Template:
    """What a prompt looks like. `with_input` holds {instruction} and {input}, `without_input` holds {instruction}."""

    name: str
    with_input: str
    without_input: str
    chat: bool = False
    """The text is what a user says in the model's own chat template."""
    response: str = ""
    """What ends every prompt, and is there once before an answer, whoever spoke last."""
    system: str = "{content}\n\n"
    """What a system prompt looks like, where it stands in the conversation: at its beginning."""
    tool: str = "Tool: {content}\n\n"
    """What the result of a tool looks like."""

    def prompt(self, row: InstructionRow) -> str:
        """All that precedes the answer. The row's text is never read as a format: braces are safe."""
        if row.input.strip():
            return self.with_input.format(instruction=row.instruction, input=row.input)
        return self.without_input.format(instruction=row.instruction)

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, str | None]]:
        """A conversation as (prompt, the answer to it) one after the other; the last prompt's answer is yet to come.

            [system] instruction response | answer, instruction response | answer, .., instruction response

        Every user's message has the form that it has in a row of its own; several without an answer between them are
        one, a blank line apart.
        """
        turns: list[tuple[str, str | None]] = []
        prompt = ""
        for role, group in groupby(messages, lambda message: message.role):
            contents = [message.content for message in group]
            if role == "assistant":
                for answer in contents:
                    turns.append((prompt + self.response, answer))
                    prompt = ""
            elif role == "user":
                prompt += self.prompt(InstructionRow("\n\n".join(contents))).removesuffix(self.response)
            else:
                look = self.system if role == "system" else self.tool
                prompt += "".join(look.format(content=content) for content in contents)
        return [*turns, (prompt + self.response, None)]


# The texts are Stanford Alpaca's (Taori et al. 2023). The newline that ends the prompt is ours: the answer then begins
# on its own line, and its first token is an ordinary line's first token.
ALPACA = Template(
    "alpaca",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    response="### Response:\n",
    tool="### Tool:\n{content}\n\n",
)

# For small vocabularies and contexts, where the preamble alone would cost some fifty tokens a row.
PLAIN = Template(
    "plain",
    "Instruction: {instruction}\n\nInput: {input}\n\nResponse:\n",
    "Instruction: {instruction}\n\nResponse:\n",
    response="Response:\n",
)

# Tulu's format (Wang et al. 2023, "How Far Can Camels Go?"). Its marks are plain text: GPT-2's tokenizer has no special
# tokens for them, and needs none. As there, the answer begins on a line of its own.
TULU = Template(
    "tulu",
    "<|user|>\n{instruction}\n\n{input}\n<|assistant|>\n",
    "<|user|>\n{instruction}\n<|assistant|>\n",
    response="<|assistant|>\n",
    system="<|system|>\n{content}\n",
    tool="<|tool|>\n{content}\n",
)

# For models that have learned to chat.
CHAT = Template("chat", "{instruction}\n\n{input}", "{instruction}", chat=True)

TEMPLATES = {template.name: template for template in (ALPACA, PLAIN, CHAT, TULU)}


@dataclass(frozen=True)
class Example:
    """A row as tokens: prompt, answer, end of text. The first `prompt` tokens are given and carry no loss."""

    tokens: tuple[int, ...]
    prompt_length: int
    label: int | None = None
    """What the last token predicts, where that is no token of the row: its class, or its class's one token."""
    weight: float = 1.0
    """What each token of the answer counts in the loss."""


def encode_prompt(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt's tokens, in training and in generation alike: after a BOS where the model's family has one before
    every text. Special tokens in the row's text are plain text, but in a chat, whose template writes its own BOS.
    Earlier answers of a conversation are each closed by the end token, as in training; a chat template closes them
    itself.

    Raises InputError for a chat with a model that has no template for it, or whose template refuses the messages.
    """
    if template.chat:
        return tuple(_chat(row, template, tokenizer))
    turns = template.turns(row.messages) if isinstance(row, Turn) else [(template.prompt(row), None)]
    tokens = [*tokenizer.prefix_tokens]
    for prompt, answer in turns:
        tokens += tokenizer.encode(prompt)
        tokens += [] if answer is None else [*tokenizer.encode(answer), tokenizer.eos]
    return tuple(tokens)


def _chat(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[int]:
    messages = row.messages if isinstance(row, Turn) else (Message("user", template.prompt(row)),)
    try:
        return tokenizer.chat([{"role": message.role, "content": message.content} for message in messages])
    except InputError as err:
        if isinstance(row, Turn) and row.conversation:
            raise InputError(f"{row.conversation}: {err}") from None
        raise


def encode(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> Example:
    """Prompt, answer and end, which carries loss: <|endoftext|>, or in a chat what the model's template ends a turn by.

    Prompt and answer are tokenized apart: no merge crosses the border, so the prompt reads as generation will write it.
    An answer of nothing but white space is no answer; `packing.fit` reports it.
    """
    prompt = encode_prompt(row, template, tokenizer)
    answer = tokenizer.encode(row.output) if row.output.strip() else []
    end = tokenizer.end_of_turn if template.chat else (tokenizer.eos,)
    weight = row.weight if isinstance(row, Turn) else 1.0
    return Example((*prompt, *answer, *(end if answer else end[-1:])), len(prompt), weight=weight)


def template(name: str) -> Template:
    """Raises InputError for a name that is no template."""
    if name not in TEMPLATES:
        raise InputError(f"no template named {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
