"""From a row of text to tokens: training and generation use the same template."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fgpt.data.conversations import Message
from fgpt.data.examples import Example
from fgpt.data.pieces import Piece, encode_pieces
from fgpt.errors import InputError
from fgpt.tokenizers.tokenizer_files import Tokenizer


@dataclass(frozen=True)
class InstructionRow:
    """An instruction, the input to apply it to (may be empty), and its answer (empty if it is to be generated)."""

    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class TextRow(InstructionRow):
    """Raw text, in `output`: there is no prompt, and every token is trained on, whatever the template."""

    instruction: str = ""


@dataclass(frozen=True)
class Turn(InstructionRow):
    """An answer in a conversation. The prompt is built from `messages` alone; `instruction`, the message before the
    answer, and `input`, the conversation before that, are for people to read. `output` is the answer.

    A row of a single instruction is the turn whose only message is the user's.
    """

    messages: tuple[Message, ...] = ()
    """All messages before the answer."""
    weight: float = 1.0
    """The weight of each token of the answer in the loss."""
    conversation: str = ""
    """Position of the conversation in its source, the same for all its turns."""


@dataclass(frozen=True)
class Template:
    """The form of a prompt. `with_input` contains {instruction} and {input}, `without_input` contains {instruction}."""

    name: str
    with_input: str
    without_input: str
    chat: bool = False
    """The text is the user's message in the model's own chat template."""
    response: str = ""
    """The end of every prompt; it precedes each answer once, whoever spoke last."""
    system: str = "{content}\n\n"
    """The form of a system prompt, which begins the conversation."""
    tool: str = "Tool: {content}\n\n"
    """The form of a tool's result."""

    def prompt(self, row: InstructionRow) -> str:
        r"""The text before the answer. The row's own text is never used as a format string, so it may contain braces.

        >>> PLAIN.prompt(InstructionRow("Add.", "1 2"))
        'Instruction: Add.\n\nInput: 1 2\n\nResponse:\n'
        """
        if row.input.strip():
            return self.with_input.format(instruction=row.instruction, input=row.input)
        return self.without_input.format(instruction=row.instruction)

    def turns(self, messages: Sequence[Message]) -> list[tuple[str, str | None]]:
        """A conversation as pairs of a prompt and its answer; the answer to the last prompt is None.

            [system] instruction response | answer, instruction response | answer, .., instruction response

        A user's message has the same form as in a row of a single instruction. Consecutive messages of the user are
        joined by a blank line.
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
                form = self.system if role == "system" else self.tool
                prompt += "".join(form.format(content=content) for content in contents)
        return [*turns, (prompt + self.response, None)]


# Stanford Alpaca's texts (Taori et al. 2023), plus a newline at the end of the prompt: the answer then begins on a line
# of its own, and its first token is that of an ordinary line.
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

# For small vocabularies and contexts, in which Alpaca's preamble alone would take some fifty tokens per row.
PLAIN = Template(
    "plain",
    "Instruction: {instruction}\n\nInput: {input}\n\nResponse:\n",
    "Instruction: {instruction}\n\nResponse:\n",
    response="Response:\n",
)

# Tulu's format (Wang et al. 2023, "How Far Can Camels Go?"). Its role markers are plain text: they need no special
# tokens. As in the paper, the answer begins on a line of its own.
TULU = Template(
    "tulu",
    "<|user|>\n{instruction}\n\n{input}\n<|assistant|>\n",
    "<|user|>\n{instruction}\n<|assistant|>\n",
    response="<|assistant|>\n",
    system="<|system|>\n{content}\n",
    tool="<|tool|>\n{content}\n",
)

# For models that are trained to chat.
CHAT = Template("chat", "{instruction}\n\n{input}", "{instruction}", chat=True)

TEMPLATES = {template.name: template for template in (ALPACA, PLAIN, CHAT, TULU)}


def prompt_pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """The prompt, the same in training and in generation.

    It begins with a BOS token if the tokenizer puts one before every text. Each earlier answer of a conversation ends
    with the end-of-sequence token, as in training. A chat template writes both itself. Special tokens in the row's text
    are encoded as plain text, except by a chat template.

    Raises:
        InputError: for a chat with a model that has no chat template, or whose template refuses the messages.
    """
    if isinstance(row, TextRow):
        return [_special(tokenizer.prefix_tokens, tokenizer, 1.0)] if tokenizer.prefix_tokens else []
    if template.chat:
        return [Piece(_render_chat(row, template, tokenizer), has_special=True)]
    pieces = [_special(tokenizer.prefix_tokens, tokenizer)] if tokenizer.prefix_tokens else []
    for prompt, answer in template.turns(row.messages) if isinstance(row, Turn) else [(template.prompt(row), None)]:
        pieces.append(Piece(prompt))
        if answer is not None:
            pieces += [Piece(answer), _special((tokenizer.eos_token_id,), tokenizer)]
    return pieces


def _special(tokens: tuple[int, ...], tokenizer: Tokenizer, weight: float = 0.0) -> Piece:
    return Piece(tokenizer.decode(tokens), weight, tokens=tokens)


def _render_chat(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> str:
    messages = row.messages if isinstance(row, Turn) else (Message("user", template.prompt(row)),)
    try:
        return tokenizer.render_chat_template(
            [{"role": message.role, "content": message.content} for message in messages]
        )
    except InputError as err:
        if isinstance(row, Turn) and row.conversation:
            raise InputError(f"{row.conversation}: {err}") from None
        raise


def pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """Prompt, answer and end of sequence, which carries loss: <|endoftext|>, or in a chat what ends a turn there.

    Prompt and answer are tokenized separately: no merge crosses the boundary, so the prompt's tokens are those of
    generation. A blank answer counts as none, which `packing.filter_by_length` reports.
    """
    weight = row.weight if isinstance(row, Turn) else 1.0
    end = tokenizer.end_of_turn if template.chat and not isinstance(row, TextRow) else (tokenizer.eos_token_id,)
    prompt = prompt_pieces(row, template, tokenizer)
    if not row.output.strip():
        return [*prompt, _special(end[-1:], tokenizer, weight)]
    return [*prompt, Piece(row.output, weight), _special(end, tokenizer, weight)]


def encode_prompt(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of `prompt_pieces`. Raises InputError as it does."""
    (example,) = encode_pieces([prompt_pieces(row, template, tokenizer)], tokenizer)
    return tuple(example.tokens)


def encode(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> Example:
    """The example of `pieces`. Raises InputError as it does."""
    (example,) = encode_pieces([pieces(row, template, tokenizer)], tokenizer)
    return example


def template(name: str) -> Template:
    r"""The template of that name.

    Raises:
        InputError: for an unknown name.

    >>> template("plain").response
    'Response:\n'
    """
    if name not in TEMPLATES:
        raise InputError(f"no template named {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
