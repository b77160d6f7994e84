"""A program that renders chat templates; see `fgpt.tokenizers.child_process`.

A template is a program by the model's publisher. Jinja's sandbox gives it access only to its values, but does not keep
it from running forever, or from filling the memory, for which a single power of an integer or a repeated text is
enough. So it runs in this process, which has limits of time and memory.
"""

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY, MAX_CHARACTERS = 1 << 30, 1 << 24
"""Bytes that the process may map, and characters of a text: thousands of times what a model's template needs."""


class Generation(ext.Extension):
    """{% generation %} marks the assistant's messages for training on them alone; here its content is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:  # Jinja's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(16)
def compile_template(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"texts": ..}, a list for each conversation, or {"error": ..} if the template fails for one of them.

    A request has the template, its values, and conversations: each is its messages, and a list of renderings as pairs
    of how many of the messages are rendered and whether the beginning of an answer follows.
    """
    texts: list[list[str]] = []
    left = MAX_CHARACTERS
    for messages, renderings in request["conversations"]:
        texts.append([])
        for count, add_generation_prompt in renderings:
            try:
                template = compile_template(request["template"])
                text = template.render(
                    **request["values"], messages=messages[:count], add_generation_prompt=add_generation_prompt
                )
            except Exception as err:  # a template may raise anything
                return {"error": f"{type(err).__name__}: {str(err)[:300]}"}
            left -= len(text)
            if left < 0:
                return {"error": f"its text is longer than {MAX_CHARACTERS:,} characters"}
            texts[-1].append(text)
    return {"texts": texts}
