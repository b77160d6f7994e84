"""A model's chat template: from messages to the one text that it was trained to read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import InputError, one_line
from fgpt.tokenizers.child_process import Child

Messages = Sequence[Mapping[str, str]]
"""What was said, in turn: each a role ("system", "user", "assistant") and its content."""

SECONDS = 10
"""What a template may take for one text: thousands of times what those of models do."""
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as the hub's are, and the special tokens that it may name: {"bos_token": "<s>", ..}."""

    template: str
    special: Mapping[str, str]

    def text(self, messages: Messages, answer: bool = True) -> str:
        """`messages` as the model reads them, special tokens written out; with `answer`, up to where it is to answer.

        A template is a program from the model's publisher. It runs in Jinja's sandbox, in a process of its own, and
        sees nothing but this. Some ask for today's date, so that their text is another tomorrow.

        Raises InputError where the template does not compile, refuses the messages, or does not come to an end.
        """
        values = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        values |= {"add_generation_prompt": answer, **self.special}
        said = _renderer.ask({"template": self.template, "values": values})
        if said is None:
            raise InputError("the model's chat template takes too long, or too much memory: expected one that ends")
        if "text" not in said:
            raise InputError(f"the model's chat template fails on these messages: {one_line(said['error'])}")
        return said["text"]

    def after_answer(self) -> str:
        """What the template writes after the text of an assistant's turn, such as <|im_end|> and a newline.

        Raises InputError as `text` does, and where the template leaves that text out.
        """
        answer = "ANSWER"
        text = self.text([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], False)
        _, found, after = text.rpartition(answer)
        if not found:
            raise InputError("the model's chat template leaves out what the assistant says")
        return after


_renderer = Child("chat_template_worker.py", SECONDS)


def of_folder(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a model folder, from a file of its own or from its tokenizer_config.json, if it has one."""
    template = config.get("chat_template")
    if (folder / TEMPLATE).is_file():
        try:
            template = (folder / TEMPLATE).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(f"{folder / TEMPLATE}: not UTF-8 text: {err}; save it as UTF-8, or take it away") from None
    if isinstance(template, list):  # several by name; the first release of this format called the usual one so
        usual = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = usual[-1].get("template") if usual else None
    return ChatTemplate(template, special(config)) if isinstance(template, str) else None


def special(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, strings or objects: bos_token, eos_token and so on."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
