"""The pieces of a conversation in a model's own chat template, found in the text that the template writes.

    up to message 1, and an answer begins     <user>Hi.<assistant>
    up to message 3, and an answer begins     <user>Hi.<assistant>Hello.<end><user>Bye.<assistant>
    all messages                              <user>Hi.<assistant>Hello.<end><user>Bye.<assistant>Ciao.<end>
    loss                                                          ^^^^^^^^^^^                     ^^^^^^^^^^

What a model reads before it answers is the text up to where the answer begins. If each of these texts continues the one
before with its answer and the end of the turn, one example holds all answers, and each is predicted from what the model
will read. A template that rewrites earlier turns, such as one that leaves out their reasoning, has no such text: each
answer is then an example of its own.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from fgpt.data.conversations import Conversation, Message
from fgpt.data.pieces import Piece
from fgpt.errors import InputError
from fgpt.tokenizers.chat_template import ChatTemplate, Messages, Rendering, RenderingError
from fgpt.tokenizers.continuation import continuation_tokens
from fgpt.tokenizers.tokenizer_files import Tokenizer


def chat_pieces(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[list[list[Piece]]]:
    """The examples of each conversation: one, or one for each answer if the template rewrites earlier turns.

    Args:
        conversations: Messages, of which the last is an answer. Answers of weight 0 are context.
        tokenizer: The tokenizer, which has the chat template.

    Raises:
        InputError: if there is no chat template, or it refuses a conversation, which is named.
    """
    template = _template(tokenizer)
    requests: list[tuple[Messages, list[Rendering]]] = []
    for conversation in conversations:
        messages = conversation.messages
        renderings: list[Rendering] = [(i, True) for i in _answers(messages)]
        if messages[-1].content != messages[-1].content.strip() or not template.is_verbatim:
            renderings.append((len(messages), False))
        requests.append((_plain(messages), renderings))
    try:
        texts = template.render_all(requests)
    except RenderingError as err:
        where = conversations[err.number].where
        raise InputError(f"{where}: {err}" if where else str(err)) from None
    turns = _Turns(tokenizer)
    return [
        turns.examples(conversation.messages, renderings)
        for conversation, renderings in zip(conversations, texts, strict=True)
    ]


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> Piece:
    """The text before the assistant's next message. Raises InputError as `chat_pieces` does."""
    return Piece(_template(tokenizer).render(_plain(messages)), has_special=True)


def _template(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        tokenizer.render_chat_template([])  # raises the error that names the tokenizer
    assert tokenizer.chat_template is not None
    return tokenizer.chat_template


def _plain(messages: Sequence[Message]) -> Messages:
    return [{"role": message.role, "content": message.content} for message in messages]


def _answers(messages: Sequence[Message]) -> list[int]:
    """The positions of the messages that are trained on."""
    return [i for i, message in enumerate(messages) if message.role == "assistant" and message.weight > 0]


@dataclass(frozen=True)
class _Turns:
    """Finds the turns of conversations in their renderings."""

    tokenizer: Tokenizer

    @functools.cached_property
    def special(self) -> str:
        """The special token that ends a turn."""
        return self.tokenizer.decode(self.tokenizer.end_of_turn[-1:])

    @functools.cached_property
    def blanks(self) -> str:
        """What the template writes between an answer and that token, such as a space."""
        try:
            between, special, _ = _template(self.tokenizer).answer_suffix().partition(self.special)
        except InputError:
            return ""
        return between if special and not between.strip() else ""

    @functools.cached_property
    def adds_blank(self) -> bool:
        """Whether the tokenizer puts a blank before every text, as SentencePiece does: what continues a text is then
        encoded as its continuation.
        """
        encode = self.tokenizer.encode
        return encode("a") != continuation_tokens(encode, "\n", "a")

    def examples(self, messages: Sequence[Message], renderings: Sequence[str]) -> list[list[Piece]]:
        """The examples of a conversation.

        Args:
            messages: The conversation.
            renderings: Up to each answer that is trained on, and perhaps one of all messages.
        """
        answers = [messages[i] for i in _answers(messages)]
        befores, whole = renderings[: len(answers)], renderings[len(answers) :]
        pieces: list[Piece] = []
        position = 0
        for number, (before, answer) in enumerate(zip(befores, answers, strict=True), 1):
            if number < len(answers):
                turn = self._find(befores[-1], before, answer)
            else:
                turn = (self._find(whole[0], before, answer) if whole else None) or self._as_it_is(answer)
            if turn is None or not before.startswith(befores[-1][:position]):
                return [
                    [Piece(before, has_special=True), *self._as_it_is(answer)]
                    for before, answer in zip(befores, answers, strict=True)
                ]
            pieces += [self._context(before, position), *turn]
            position = len(before) + sum(len(piece.text) for piece in turn)
        return [pieces]

    def _find(self, text: str, before: str, answer: Message) -> list[Piece] | None:
        """An answer and its end as a rendering has them after `before`; None if it has something else there. The
        template may strip an answer, or write blanks around it.
        """
        if not text.startswith(before):
            return None
        content = answer.content.strip()
        start = _skip_blanks(text, len(before))
        special = _skip_blanks(text, start + len(content))
        end = special - len(self.blanks)
        is_found = text.startswith(content, start) and text.startswith(self.blanks + self.special, max(end, 0))
        if not is_found or end < start + len(content):
            return None
        return [
            self._answer(text[len(before) : end], answer.weight),
            Piece(self.blanks + self.special, answer.weight, tokens=self.tokenizer.end_of_turn),
        ]

    def _as_it_is(self, answer: Message) -> list[Piece]:
        end = self.tokenizer.end_of_turn
        return [
            self._answer(answer.content, answer.weight),
            Piece(self.blanks + self.special, answer.weight, tokens=end),
        ]

    def _answer(self, text: str, weight: float) -> Piece:
        """Special tokens in an answer are plain text."""
        if not self.adds_blank:
            return Piece(text, weight)
        return Piece(text, weight, tokens=tuple(continuation_tokens(self.tokenizer.encode, "\n", text)))

    def _context(self, before: str, position: int) -> Piece:
        text = before[position:]
        if position == 0 or not self.adds_blank:
            return Piece(text, has_special=True)

        def encode(part: str) -> list[int]:
            return self.tokenizer.encode_special(part, add_special_tokens=False)

        return Piece(text, tokens=tuple(continuation_tokens(encode, self.special, text)))


def _skip_blanks(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
