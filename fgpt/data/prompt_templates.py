"""From a row of text to tokens: training and generation use the same template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from fgpt.data.chat_pieces import chat_pieces, chat_prompt
from fgpt.data.conversations import Conversation, Message
from fgpt.data.examples import Example, split_text
from fgpt.data.pieces import Piece, encode_pieces
from fgpt.data.rows import ConversationRow, InstructionRow, TextRow, Turn
from fgpt.errors import InputError
from fgpt.tokenizers.tokenizer_files import Tokenizer


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

# For texts that hold their template already.
NONE = Template("none", "{instruction}\n\n{input}", "{instruction}", system="{content}", tool="{content}")

# For inputs that are no sentences, such as meaning representations: the text begins on the next line.
DATA_TO_TEXT = Template("data-to-text", "{instruction}\n\n{input}\n", "{instruction}\n", response="\n")

TEMPLATES = {template.name: template for template in (ALPACA, PLAIN, CHAT, TULU, NONE, DATA_TO_TEXT)}


def prompt_pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """The prompt, the same in training and in generation; of a conversation that of its last answer.

    It begins with a BOS token if the tokenizer puts one before every text. Each earlier answer of a conversation ends
    with the end-of-sequence token, as in training. A chat template writes both itself. Special tokens in the row's text
    are encoded as plain text, except by a chat template.

    Raises:
        InputError: for a chat with a model that has no chat template, or whose template refuses the messages.
    """
    if isinstance(row, TextRow):
        return [_special(tokenizer.prefix_tokens, tokenizer, 1.0)] if tokenizer.prefix_tokens else []
    if isinstance(row, ConversationRow):
        row = row.turns()[-1]
    if template.chat:
        return [_chat_prompt(row, template, tokenizer)]
    return _text_pieces(row, template, tokenizer)


def _chat_prompt(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> Piece:
    try:
        return chat_prompt(row.messages if isinstance(row, Turn) else _question(row, template), tokenizer)
    except InputError as err:
        if isinstance(row, Turn) and row.conversation:
            raise InputError(f"{row.conversation}: {err}") from None
        raise


def _question(row: InstructionRow, template: Template) -> tuple[Message, ...]:
    return (Message("user", template.prompt(row)),)


def _text_pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """A prompt in a template of text, or a conversation up to and with its last answer. Answers carry their loss weight
    in a conversation, and none in a prompt.
    """
    pieces = [_special(tokenizer.prefix_tokens, tokenizer)] if tokenizer.prefix_tokens else []
    if not isinstance(row, Turn | ConversationRow):
        return [*pieces, Piece(template.prompt(row))]
    turns = template.turns(row.messages)
    answers = [message for message in row.messages if message.role == "assistant"]
    for (prompt, _), answer in zip(turns, answers, strict=False):
        weight = answer.weight if isinstance(row, ConversationRow) else 0.0
        pieces += [Piece(prompt), *_answer(answer.content, weight, tokenizer)]
    return pieces if isinstance(row, ConversationRow) else [*pieces, Piece(turns[-1][0])]


def _answer(text: str, weight: float, tokenizer: Tokenizer) -> list[Piece]:
    return [Piece(text, weight), _special((tokenizer.eos_token_id,), tokenizer, weight)]


def _special(tokens: tuple[int, ...], tokenizer: Tokenizer, weight: float = 0.0) -> Piece:
    return Piece(tokenizer.decode(tokens), weight, tokens=tokens)


def batch_pieces(rows: Sequence[InstructionRow], template: Template, tokenizer: Tokenizer) -> list[list[list[Piece]]]:
    """For each row the pieces of its examples: one, or one for each answer of a conversation whose earlier turns the
    model's chat template rewrites.

    Prompts and answers are tokenized separately: no merge crosses the boundary, so the prompt's tokens are those of
    generation. Each answer is followed by the end of sequence, which carries loss: <|endoftext|>, or in a chat what
    ends a turn there. A blank answer counts as none, which `packing.filter_by_length` reports.

    Raises:
        InputError: as `prompt_pieces` does.
    """
    if not template.chat:
        return [[_row_pieces(row, template, tokenizer)] for row in rows]
    is_chat = [bool(row.output.strip()) and not isinstance(row, TextRow) for row in rows]
    conversations = [_conversation(row, template) for row, chat in zip(rows, is_chat, strict=True) if chat]
    examples = iter(chat_pieces(conversations, tokenizer) if conversations else [])
    return [
        next(examples) if chat else [_row_pieces(row, template, tokenizer)]
        for row, chat in zip(rows, is_chat, strict=True)
    ]


def _row_pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    if isinstance(row, ConversationRow):
        return _text_pieces(row, template, tokenizer)
    if not row.output.strip():
        return _prompt_and_end(row, template, tokenizer)
    weight = row.weight if isinstance(row, Turn) else 1.0
    return [*prompt_pieces(row, template, tokenizer), *_answer(row.output, weight, tokenizer)]


def _prompt_and_end(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    is_chat = template.chat and not isinstance(row, TextRow)
    end = tokenizer.end_of_turn if is_chat else (tokenizer.eos_token_id,)
    weight = row.weight if isinstance(row, Turn) else 1.0
    return [*prompt_pieces(row, template, tokenizer), _special(end[-1:], tokenizer, weight)]


def _conversation(row: InstructionRow, template: Template) -> Conversation:
    """A row as a conversation that ends with its answer."""
    if isinstance(row, ConversationRow):
        return Conversation(row.messages, row.conversation)
    if not isinstance(row, Turn):
        return Conversation((*_question(row, template), Message("assistant", row.output)))
    context = [replace(each, weight=0.0) if each.role == "assistant" else each for each in row.messages]
    return Conversation((*context, Message("assistant", row.output, row.weight)), row.conversation)


def pieces(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> list[Piece]:
    """The pieces of a row that is one example.

    Raises:
        InputError: as `prompt_pieces` does, and for a conversation whose earlier turns the chat template rewrites.
    """
    (examples,) = batch_pieces([row], template, tokenizer)
    if len(examples) > 1:
        where = row.conversation if isinstance(row, ConversationRow) else ""
        raise InputError(f"{where}: the chat template rewrites earlier turns: expected one turn of the conversation")
    return examples[0]


def encode_prompt(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of `prompt_pieces`. Raises InputError as it does."""
    (example,) = encode_pieces([prompt_pieces(row, template, tokenizer)], tokenizer)
    return tuple(example.tokens)


def encode(row: InstructionRow, template: Template, tokenizer: Tokenizer) -> Example:
    """The example of `pieces`. Raises InputError as it does."""
    (example,) = encode_pieces([pieces(row, template, tokenizer)], tokenizer)
    return example


def encode_to_score(
    rows: Sequence[InstructionRow], template: Template, tokenizer: Tokenizer, max_seq_len: int
) -> list[Example]:
    """The examples whose loss is measured: one for each row, of a raw text as many as in training.

    Raises InputError as `encode` does.
    """
    return [part for row in rows for part in split_text(encode(row, template, tokenizer), max_seq_len)]


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
