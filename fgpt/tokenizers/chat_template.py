"""A model's chat template: from messages to the single text that the model was trained to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import InputError, one_line
from fgpt.tokenizers.child_process import Child

Messages = Sequence[Mapping[str, str]]
"""The messages of a conversation, each with a role ("system", "user", "assistant") and its content."""

SECONDS = 10
"""Time limit for rendering a text: thousands of times what the templates of models take."""
TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


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
        values = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        values |= {"add_generation_prompt": add_generation_prompt, **self.special_tokens}
        response = _renderer.ask({"template": self.template, "values": values})
        if response is None:
            raise InputError("the model's chat template takes too long, or too much memory: expected one that ends")
        if "text" not in response:
            raise InputError(f"the model's chat template fails on these messages: {one_line(response['error'])}")
        return response["text"]

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
