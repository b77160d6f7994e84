"""The package's source as the API pages show it: examples as code, nodes with their fields, axes of tensors.

>>> ..                       a block of code; Markdown would read it as a quotation
@node class LoRA: ..         LoRA(a, b, alpha, ..), as it is a frozen dataclass
Float[Tensor, " out"]        Float[Tensor, 'out']
"""

import re
from collections.abc import Iterator
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", flags=re.M)
STATIC = re.compile(r"static\((?:default=)?(.*)\)")


def fence_doctests(text: str) -> str:
    """`text` with each example in a fence."""
    return DOCTEST.sub(lambda example: f"```pycon\n{example.group()}\n```", text)


def tuples(annotation: Any) -> Iterator[griffe.ExprTuple]:
    """The tuples in an annotation: what stands in brackets with a comma."""
    if isinstance(annotation, griffe.ExprTuple):
        yield annotation
    if isinstance(annotation, griffe.Expr):
        for part in annotation.iterate(flat=False):
            if part is not annotation:  # a name yields itself
                yield from tuples(part)


def strip_axes(annotation: Any) -> None:
    """jaxtyping's `" out"`, whose space tells linters that it is no name, becomes `"out"`."""
    for inner in tuples(annotation):
        inner.elements = [re.sub(r"^(['\"]) +", r"\1", x) if isinstance(x, str) else x for x in inner.elements]


class Docstrings(griffe.Extension):
    """Changes what is read of the source before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Fences the examples."""
        if obj.docstring is not None:
            obj.docstring.value = fence_doctests(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Strips the axes of a signature."""
        for annotation in (func.returns, *(parameter.annotation for parameter in func.parameters)):
            strip_axes(annotation)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Strips the axes of a field."""
        strip_axes(attr.annotation)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Gives a node, and a named tuple, the signature of its fields."""
        is_node = any(str(decorator.value) == "node" for decorator in cls.decorators)
        if not is_node and "NamedTuple" not in map(str, cls.bases):
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        for name, field in cls.attributes.items():
            if field.annotation is None or "property" in field.labels:
                continue
            default = None if field.value is None else STATIC.sub(r"\1", str(field.value)) or None
            parameters.append(griffe.Parameter(name, annotation=field.annotation, kind=kind, default=default))
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))
