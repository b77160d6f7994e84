r"""A prompt template as the pieces that other programs put together: a head and a tail for each role.

    [system.head S system.tail] user.head U user.tail answer.head A answer.tail user.head ..

Those of a `Template` of text are its fields. Those of a model's chat template, which is a program, are found by what it
makes of words that no template has, and hold if it makes of further conversations what the pieces make.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fgpt.data.prompt_templates import Template
from fgpt.errors import InputError
from fgpt.tokenizers.chat_template import ChatTemplate, RenderingError


@dataclass(frozen=True)
class Piece:
    """What stands before and after a message."""

    head: str
    tail: str

    def around(self, text: str) -> str:
        return self.head + text + self.tail


@dataclass(frozen=True)
class TemplatePieces:
    """The pieces of a template."""

    user: Piece
    answer: Piece
    """Its head also ends a prompt."""
    system: Piece | None
    """None if there is no place for a system prompt."""
    default_system: str = ""
    """The system prompt of a conversation without one."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation that ends with a user's message, up to the answer.

        Consecutive messages of the user are one, with a blank line between, as in training.
        """
        roles = {"user": self.user, "assistant": self.answer, "system": self.system}
        text = ""
        if self.default_system and self.system and all(each["role"] != "system" for each in messages):
            text = self.system.around(self.default_system)
        for i, each in enumerate(messages):
            piece = roles[each["role"]]
            assert piece is not None
            joins = each["role"] == "user" and i + 1 < len(messages) and messages[i + 1]["role"] == "user"
            continues = each["role"] == "user" and i > 0 and messages[i - 1]["role"] == "user"
            text += ("\n\n" if continues else piece.head) + each["content"] + ("" if joins else piece.tail)
        return text + self.answer.head

    def jinja(self) -> str:
        """The pieces as a chat template of Hugging Face's form, which llama.cpp reads."""
        before, after = "messages[loop.index0 - 1]['role']", "messages[loop.index0 + 1]['role']"
        user = (
            f"{{% if loop.index0 > 0 and {before} == 'user' %}}{{{{ {_quote(chr(10) * 2)} }}}}{{% else %}}"
            f"{{{{ {_quote(self.user.head)} }}}}{{% endif %}}{{{{ m['content'] }}}}"
            f"{{% if loop.last or {after} != 'user' %}}{{{{ {_quote(self.user.tail)} }}}}{{% endif %}}"
        )
        system = "" if self.system is None else f"{{% elif m['role'] == 'system' %}}{_jinja_message(self.system)}"
        return (
            f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}"
            f"{{% elif m['role'] == 'assistant' %}}{_jinja_message(self.answer)}{system}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {_quote(self.answer.head)} }}}}{{% endif %}}"
        )


def _jinja_message(piece: Piece) -> str:
    return f"{{{{ {_quote(piece.head)} + m['content'] + {_quote(piece.tail)} }}}}"


def _quote(text: str) -> str:
    """A text as a string of Jinja, on one line."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def text_pieces(template: Template, eos_token: str) -> TemplatePieces:
    r"""The pieces of a template of text, whose answers end with `eos_token`.

    >>> from fgpt.data.prompt_templates import PLAIN
    >>> text_pieces(PLAIN, "<eos>").render([{"role": "user", "content": "Hi."}])
    'Instruction: Hi.\n\nResponse:\n'
    """
    head, tail = template.without_input.removesuffix(template.response).split("{instruction}")
    system = Piece(*template.system.split("{content}"))
    return TemplatePieces(Piece(head, tail), Piece(template.response, eos_token), system)


SYSTEM, USER, ANSWER, LAST = "SYSTEMWORDS", "USERWORDS", "ANSWERWORDS", "LASTWORDS"


def chat_pieces_of(template: ChatTemplate, bos_token: str = "") -> TemplatePieces:
    """The pieces of a model's chat template.

    Args:
        template: The chat template.
        bos_token: What every text begins with, if the tokenizer adds it: no piece has it.

    Raises:
        InputError: for a template that is not made of a piece for each role.
    """

    def render(*messages: tuple[str, str], prompt: bool = True) -> str:
        text = template.render([{"role": role, "content": content} for role, content in messages], prompt)
        return text.removeprefix(bos_token)

    user, answer, last = ("user", USER), ("assistant", ANSWER), ("user", LAST)
    try:
        alone = render(user, prompt=False)
        user_tail = alone.rpartition(USER)[2]
        answer_head = render(user).removeprefix(alone)
        answer_tail = render(user, answer, prompt=False).rpartition(ANSWER)[2]
        between = render(user, answer, last).partition(ANSWER)[2].partition(LAST)[0]
        user_piece = Piece(between.removeprefix(answer_tail), user_tail)
        answer_piece = Piece(answer_head, answer_tail)
        before = alone.partition(USER)[0].removesuffix(user_piece.head)
        system, default = _system_pieces(render, user_piece, before)
        pieces = TemplatePieces(user_piece, answer_piece, system, default)
        checks = [(user,), (user, answer, last), (user, answer, last, answer, user)]
        checks += [(("system", SYSTEM), *each) for each in checks] if system else []
        messages = [[{"role": role, "content": content} for role, content in each] for each in checks]
        if all(pieces.render(each) == render(*check) for each, check in zip(messages, checks, strict=True)):
            return pieces
    except RenderingError:
        pass
    raise InputError("the chat template is not made of a piece for each role, which is all that can be said here")


def _system_pieces(render: Callable[..., str], user: Piece, before: str) -> tuple[Piece | None, str]:
    """The piece of a system prompt, and the prompt that a conversation without one has, which begins with `before`."""
    try:
        text = render(("system", SYSTEM), ("user", USER), prompt=False)
    except RenderingError:  # it takes none
        text = ""
    if SYSTEM not in text:
        if before:
            raise RenderingError("a conversation begins with what is no system prompt")
        return None, ""
    head, _, rest = text.partition(SYSTEM)
    system = Piece(head, rest.partition(USER)[0].removesuffix(user.head))
    if not before:
        return system, ""
    if not before.startswith(system.head) or not before.endswith(system.tail):
        raise RenderingError("a conversation begins with what is no system prompt")
    return system, before.removeprefix(system.head).removesuffix(system.tail)
