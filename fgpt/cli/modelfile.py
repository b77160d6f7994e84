'''A Modelfile for Ollama: the file of the model, its prompt template in Go's syntax, where answers end.

    FROM ./model.gguf
    TEMPLATE """{{ if .System }}..{{ .System }}..{{ end }}..{{ .Prompt }}..{{ .Response }}.."""
    SYSTEM """.."""
    PARAMETER stop ".."

Ollama fills the template once for each turn, and cuts it after .Response in the last. Source: its docs/template.mdx and
template/template.go.
'''

import re
from collections.abc import Sequence

from fgpt.data.template_pieces import Piece, TemplatePieces
from fgpt.errors import InputError


def modelfile(model: str, pieces: TemplatePieces | None, stops: Sequence[str]) -> str:
    """The content of a Modelfile.

    Args:
        model: The file of the model, in the same folder.
        pieces: Of the prompt template; None leaves it to Ollama, which knows some chat templates by what the model's
            file says.
        stops: The texts that end an answer.

    Raises:
        InputError: for a default system prompt that a Modelfile cannot quote.
    """
    lines = [f"FROM ./{model}"]
    if pieces is not None:
        lines.append(f'TEMPLATE """{go_template(pieces)}"""')
    if pieces is not None and pieces.default_system:
        if '"""' in pieces.default_system:
            raise InputError('the system prompt of the chat template has """, which a Modelfile cannot quote')
        lines.append(f'SYSTEM """{pieces.default_system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(pieces: TemplatePieces) -> str:
    r"""The template of one turn.

    >>> go_template(TemplatePieces(Piece("Q: ", "\n"), Piece("A: ", "<eos>"), None))
    '{{ if .Prompt }}Q: {{ .Prompt }}\n{{ end }}A: {{ .Response }}<eos>'
    """
    system = "" if pieces.system is None else _if("System", pieces.system)
    answer = f"{literal(pieces.answer.head)}{{{{ .Response }}}}{literal(pieces.answer.tail)}"
    return system + _if("Prompt", pieces.user) + answer


def _if(name: str, piece: Piece) -> str:
    """A part that stands only if there is such a message."""
    message = f"{literal(piece.head)}{{{{ .{name} }}}}{literal(piece.tail)}"
    return f"{{{{ if .{name} }}}}{message}{{{{ end }}}}"


def literal(text: str) -> str:
    """A text that Go's template writes as it is, and that no quotes of the Modelfile end.

    >>> literal("a {{ b")
    'a {{ "{{" }} b'
    """
    return text.replace("{{", '{{ "{{" }}').replace('"""', '""{{ "\\"" }}')


def model_name(run_name: str) -> str:
    """A name that Ollama takes for a model.

    >>> model_name("My run, 2")
    'my-run-2'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", run_name.lower()).strip("-._") or "model"
