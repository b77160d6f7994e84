"""A program that renders chat templates; see `fgpt.tokenizers.child_process`.

A template is a program from the model's publisher. Jinja's sandbox keeps it from all that is not given to it, but not
from running for ever, or from filling the memory, for which one power or one product of a text is enough. So it runs
here, in a process that ends when it takes too long, and may not grow.
"""

import functools
import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY, LONGEST = 1 << 30, 1 << 24
"""Bytes that the process may map, and characters of a text: thousands of times what a model's template needs."""


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


@functools.lru_cache(16)
def compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def answer(asked: dict[str, Any]) -> dict[str, str]:
    """{"text": ..}, or what went wrong, {"error": ..}."""
    try:
        text = compiled(asked["template"]).render(**asked["values"])
    except Exception as err:  # whatever a template does wrong, it is not ours
        return {"error": f"{type(err).__name__}: {str(err)[:300]}"}
    return {"text": text} if len(text) <= LONGEST else {"error": f"its text is longer than {LONGEST:,} characters"}
