"""A model's chat template: from messages to the single text that the model was trained to read."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fgpt.errors import InputError, one_line
from fgpt.tokenizers.child_process import Child

Messages = Sequence[Mapping[str, str]]
"""The messages of a conversation, each with a role ("system", "user", "assistant") and its content."""

Rendering: TypeAlias = tuple[int, bool]
"""How many messages of a conversation are rendered, and whether the beginning of an answer follows."""

SECONDS = 10
"""Time limit for rendering a conversation: thousands of times what the templates of models take."""
BATCH = 128
"""Conversations in one request to the process that renders them."""
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class RenderingError(InputError):
    """A template that fails. `number` is the position of the conversation among those that were to be rendered."""

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template in the form of Hugging Face's, and the special tokens that it may name: {"bos_token": "<s>"}."""

    template: str
    special_tokens: Mapping[str, str]

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """`messages` as the model reads them, special tokens written out.

        A template is a program by the model's publisher. It runs in Jinja's sandbox, in a process of its own, and has
        access to nothing but these values. Some templates insert the current date.

        Args:
            messages: The conversation.
            add_generation_prompt: End with the beginning of an answer.

        Raises:
            InputError: if the template does not compile, refuses the messages, or does not end.

        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {})
        >>> template.render([{"role": "user", "content": "Hi."}])
        '<user>Hi.'
        """
        ((text,),) = self.render_all([(messages, [(len(messages), add_generation_prompt)])])
        return text

    def render_all(self, conversations: Sequence[tuple[Messages, Sequence[Rendering]]]) -> list[list[str]]:
        """The texts of several conversations, each rendered once or several times, in few requests to the process.

        Args:
            conversations: The messages of each, and its renderings.

        Returns:
            The texts of each conversation.

        Raises:
            RenderingError: as `render` does, for the first conversation that fails.

        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {})
        >>> talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
        >>> template.render_all([(talk, [(1, True), (2, False)])])
        [['<user>Hi.', '<user>Hi.<assistant>Yes?']]
        """
        texts: list[list[str]] = []
        for start in range(0, len(conversations), BATCH):
            batch = conversations[start : start + BATCH]
            try:
                texts += self._render_batch(batch)
            except RenderingError as err:
                if len(batch) == 1:
                    raise RenderingError(str(err), start) from None
                for number, conversation in enumerate(batch, start):  # the limits are those of one conversation
                    try:
                        texts += self._render_batch([conversation])
                    except RenderingError as alone:
                        raise RenderingError(str(alone), number) from None
        return texts

    def _render_batch(self, conversations: Sequence[tuple[Messages, Sequence[Rendering]]]) -> list[list[str]]:
        values = {"tools": None, "documents": None, **self.special_tokens}
        plain = [([dict(message) for message in messages], renderings) for messages, renderings in conversations]
        response = _renderer.ask({"template": self.template, "values": values, "conversations": plain})
        if response is None:
            raise RenderingError("the model's chat template takes too long, or too much memory: expected one that ends")
        if "texts" not in response:
            raise RenderingError(f"the model's chat template fails on these messages: {one_line(response['error'])}")
        return response["texts"]

    @functools.cached_property
    def is_verbatim(self) -> bool:
        """Whether an answer without blanks around it is written as it is, directly after the text that asks for it."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}]
        try:
            ((before, whole),) = self.render_all([(messages, [(1, True), (2, False)])])
        except RenderingError:
            return False
        return whole.startswith(before + "ANSWER")

    def answer_suffix(self) -> str:
        """What the template writes after the content of the assistant's message, such as <|im_end|> and a newline.

        Raises:
            InputError: as `render` does, and if the template leaves out that content.
        """
        answer = "ANSWER"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        _, separator, suffix = self.render(messages, add_generation_prompt=False).rpartition(answer)
        if not separator:
            raise InputError("the model's chat template leaves out the assistant's messages")
        return suffix


_renderer = Child("chat_template_worker.py", SECONDS)


def of_folder(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a model folder, from chat_template.jinja or from the content of its tokenizer_config.json;
    None if there is none.
    """
    template = config.get("chat_template")
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        try:
            template = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"{path}: not UTF-8 text: {err}; save it as UTF-8, or remove it") from None
    if isinstance(template, list):  # several templates by name, an older form of tokenizer_config.json
        defaults = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = defaults[-1].get("template") if defaults else None
    return ChatTemplate(template, named_tokens(config)) if isinstance(template, str) else None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as strings or objects: bos_token, eos_token and so on.

    >>> named_tokens({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})
    {'bos_token': '<s>', 'eos_token': '</s>'}
    """
    tokens = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens
