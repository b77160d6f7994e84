"""A model's chat template: from messages to the one text that it was trained to read."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fgpt.errors import InputError

Messages = Sequence[Mapping[str, str]]
"""What was said, in turn: each a role ("system", "user", "assistant") and its content."""

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class Chat:
    """A Jinja template as the hub's are, and the special tokens that it may name: {"bos_token": "<s>", ..}."""

    template: str
    special: Mapping[str, str]

    def text(self, messages: Messages, answer: bool = True) -> str:
        """`messages` as the model reads them, special tokens written out; with `answer`, up to where it is to answer.

        A template is a program from the model's publisher. It runs in Jinja's sandbox and sees nothing but this. Some
        ask for today's date, so that their text is another tomorrow.

        Raises InputError where the template does not compile, or refuses the messages.
        """
        try:
            return _compiled(self.template).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                **self.special,
            )
        except Exception as err:  # whatever a template does wrong, it is not ours
            said = " ".join(f"{type(err).__name__}: {err}".split())
            raise InputError(f"the model's chat template fails on these messages: {said}") from None


def of_folder(folder: Path, config: Mapping[str, Any]) -> Chat | None:
    """The chat template of a model folder, from a file of its own or from its tokenizer_config.json, if it has one."""
    template = config.get("chat_template")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(template, list):  # several by name; the first release of this format called the usual one so
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    return Chat(template, special(config)) if isinstance(template, str) else None


def special(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names: bos_token, eos_token and the like."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


@functools.cache
def _compiled(template: str) -> Any:
    import jinja2  # here, because most users of fgpt do not chat
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks what the assistant says, for those who train on that alone; its text is as any."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
