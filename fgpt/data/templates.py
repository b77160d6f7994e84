"""From a row of text to tokens: one template serves training and generation."""

from dataclasses import dataclass

from fgpt.data.tokenizers import Tokenizer
from fgpt.errors import InputError


@dataclass(frozen=True)
class Row:
    """An instruction, what it is to be applied to (may be empty), and its answer (empty when it is to be generated)."""

    instruction: str
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class Template:
    """What a prompt looks like. `with_input` holds {instruction} and {input}, `without_input` holds {instruction}."""

    name: str
    with_input: str
    without_input: str
    chat: bool = False
    """The text is what a user says in the model's own chat template."""

    def prompt(self, row: Row) -> str:
        """All that precedes the answer. The row's text is never read as a format: braces are safe."""
        if row.input.strip():
            return self.with_input.format(instruction=row.instruction, input=row.input)
        return self.without_input.format(instruction=row.instruction)


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
)

# For small vocabularies and contexts, where the preamble alone would cost some fifty tokens a row.
PLAIN = Template(
    "plain",
    "Instruction: {instruction}\n\nInput: {input}\n\nResponse:\n",
    "Instruction: {instruction}\n\nResponse:\n",
)

# Tulu's format (Wang et al. 2023, "How Far Can Camels Go?"). Its marks are plain text: GPT-2's tokenizer has no special
# tokens for them, and needs none. As there, the answer begins on a line of its own.
TULU = Template(
    "tulu",
    "<|user|>\n{instruction}\n\n{input}\n<|assistant|>\n",
    "<|user|>\n{instruction}\n<|assistant|>\n",
)

# For models that have learned to chat.
CHAT = Template("chat", "{instruction}\n\n{input}", "{instruction}", chat=True)

TEMPLATES = {template.name: template for template in (ALPACA, PLAIN, CHAT, TULU)}


@dataclass(frozen=True)
class Example:
    """A row as tokens: prompt, answer, end of text. The first `prompt` tokens are given and carry no loss."""

    tokens: tuple[int, ...]
    prompt: int
    label: int | None = None
    """What the last token predicts, where that is no token of the row: its class, or its class's one token."""


def encode_prompt(row: Row, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt's tokens, in training and in generation alike: after a BOS where the model's family has one before
    every text. Special tokens in the row's text are plain text, but in a chat, whose template writes its own BOS.

    Raises InputError for a chat with a model that has no template for it.
    """
    if template.chat:
        return tuple(tokenizer.chat([{"role": "user", "content": template.prompt(row)}]))
    return (*tokenizer.prefix_tokens, *tokenizer.encode(template.prompt(row)))


def encode(row: Row, template: Template, tokenizer: Tokenizer) -> Example:
    """Prompt, answer and end, which carries loss: <|endoftext|>, or in a chat what the model's template ends a turn by.

    Prompt and answer are tokenised apart: no merge crosses the border, so the prompt reads as generation will write it.
    An answer of nothing but white space is no answer; `packing.fit` reports it.
    """
    prompt = encode_prompt(row, template, tokenizer)
    answer = tokenizer.encode(row.output) if row.output.strip() else []
    end = tokenizer.end_of_turn if template.chat else (tokenizer.eos,)
    return Example((*prompt, *answer, *(end if answer else end[-1:])), len(prompt))


def template(name: str) -> Template:
    """Raises InputError for a name that is no template."""
    if name not in TEMPLATES:
        raise InputError(f"no template named {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
