"""Conversations: messages with roles, each with a loss weight; and the file formats of conversations.

    {"messages": [{"role": "user", "content": ..}, ..]}            OpenAI's, Tulu's; contents may be lists of parts
    {"conversations": [{"from": "human", "value": ..}, ..]}        ShareGPT's, with columns `system` and `tools`
    {"conversations": ["question", "answer", ..]}                  LIMA's
    {"prompt": .., "completion": ..}                               texts, or lists of messages
    {"instruction": .., "output": .., "history": [[.., ..], ..]}   Alpaca's, with earlier exchanges

A conversation is one training example, with loss on the answers of the assistant: see `training_messages`.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from fgpt.data.records import is_missing
from fgpt.errors import InputError, short_repr

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}
"""The names of the four roles in each format. A function call belongs to the assistant, its result to the tool."""

WEIGHTS = ("weight", "loss_weight", "train", "training")
"""The names of a message's loss weight in each format: a number, or true and false."""
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1_000_000
"""Of a message that is trained on: losses are sums in fp32."""

CONTENTS = ("content", "value", "text")
"""The names of a message's content."""


@dataclass(frozen=True)
class Message:
    """A message. `weight` applies to the assistant's: a message of weight 0 is context, and not trained on."""

    role: Role
    content: str
    weight: float = 1.0
    has_weight: bool = field(default=False, compare=False)
    """The weight comes from the file; otherwise it is the default."""
    has_reasoning: bool = field(default=False, compare=False)
    """The file has reasoning in addition to the content, which is not read."""


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and their position in the source, for errors and to hold out entire conversations."""

    messages: tuple[Message, ...]
    where: str = ""


# ------------------------------------------------------------------------------------------------------------ answers

# Reasons for which a part of a conversation is not trained on.
WITHOUT_ANSWER = "conversations without an answer of the assistant"
EMPTY_ANSWER = "empty answers of the assistant"
EMPTY = "empty messages of others"
UNPROMPTED = "messages of the assistant before the user's first, used as context only"
UNWEIGHTED = "answers of the assistant with loss weight 0, used as context only"
UNANSWERED = "messages after the last answer"
REASONING = "reasoning texts of messages, which are not read"
IGNORED = "loss weights of messages that are not the assistant's, which are ignored"


def training_messages(conversation: Conversation, left_out: Counter[str]) -> tuple[Message, ...]:
    """The messages up to the last answer that is trained on; none if there is no such answer. An answer that is context
    only has weight 0.

    Args:
        conversation: The conversation.
        left_out: Counts by reason, to which what is not trained on is added in place.

    >>> chat = Conversation((Message("user", "Hi."), Message("assistant", "Hello."), Message("user", "Bye.")))
    >>> [message.content for message in training_messages(chat, Counter())]
    ['Hi.', 'Hello.']
    """
    messages: list[Message] = []
    length = 0  # up to the last answer that is trained on
    has_question = False
    has_answer = any(message.role == "assistant" for message in conversation.messages)
    left_out[WITHOUT_ANSWER] += not has_answer
    for message in conversation.messages:
        left_out[REASONING] += message.has_reasoning
        is_answer = message.role == "assistant"
        if not message.content.strip():
            left_out[EMPTY_ANSWER if is_answer else EMPTY] += 1
            continue
        if not is_answer:
            left_out[IGNORED] += message.has_weight and message.weight > 0
            has_question = has_question or message.role in ("user", "tool")
        elif not has_question:
            left_out[UNPROMPTED] += 1
            message = replace(message, weight=0.0)
        elif message.weight == 0:
            left_out[UNWEIGHTED] += 1
        messages.append(message)
        if is_answer and message.weight > 0:
            length = len(messages)
    trailing = 0
    while has_answer and trailing < len(messages) and messages[-1 - trailing].role != "assistant":
        trailing += 1
    left_out[UNANSWERED] += trailing
    return tuple(messages[:length])


def summary(left_out: Mapping[str, int]) -> str:
    """The counts of what was left out, by reason, in one line; empty if there is nothing."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)


def as_text(messages: Sequence[Message]) -> str:
    """Messages as text for people to read, each with its role."""
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


# ------------------------------------------------------------------------------------------------------------ formats


def read_conversation(record: Mapping[str, Any], where: str, has_other_format: bool = False) -> Conversation | None:
    """The conversation of a record, recognized by its columns; None if it holds none.

    Args:
        record: The columns.
        where: The record's position in the source, for error messages.
        has_other_format: The record has the columns of another format too. A conversation, which holds more, is
            preferred to it only if its column is filled.

    Raises:
        InputError: for a malformed conversation, and for preference data, for which there is no loss here.

    >>> read_conversation({"prompt": "Hi.", "completion": "Hello."}, "row 1").messages[1].content
    'Hello.'
    """
    refuse_preferences(record, where)
    messages = _messages(record, where, has_other_format)
    if messages is None:
        return None
    return Conversation((*_system_message(record, where), *messages), where)


def refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a row in the format of DPO or KTO."""
    has_messages = any(name in record for name in ("messages", "conversations", "completion"))
    if {"chosen", "rejected"} <= record.keys():
        name = "a row of preference data (chosen, rejected: DPO's format)"
    elif has_messages and (_is_judgment(record.get("label")) or not is_missing(record.get("kto_tag"))):
        name = "a row of preference data (an answer and a label true or false: KTO's format)"
    else:
        return
    raise InputError(f"{where}: {name}: expected answers to train on; give the good ones as `messages`")


def _is_judgment(value: Any) -> bool:
    """Whether a label is true or false, also as a table writes them."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def read_history(record: Mapping[str, Any], prompt: str, answer: str, where: str) -> Conversation | None:
    """The conversation of an Alpaca row with a system prompt or earlier exchanges; None if it has neither."""
    history = record.get("history")
    if isinstance(history, str):  # of a table: JSON, or a column with another meaning
        history = _parse_json(history, "history", where) if history.lstrip().startswith("[") else None
    system = _system_message(record, where)
    if not history and not system:
        return None
    messages = [*system]
    for exchange in _require_list(history or [], "history", where):
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise InputError(f"{where}: history should hold pairs of question and answer, got {short_repr(exchange)}")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            messages.append(_message(role, text, 1.0, where))
    return Conversation((*messages, Message("user", prompt), Message("assistant", answer)), where)


COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a list of messages."""


def _messages(record: Mapping[str, Any], where: str, has_other_format: bool) -> list[Message] | None:
    """The messages in a record's columns; None if it has no such columns.

    In a dataset of several formats each row has the columns of all, with null in those of the others.
    """
    present = [name for name in COLUMNS if name in record]
    filled = [name for name in present if _holds_messages(record[name])]
    if filled:
        first, *others = [list(_list_of_messages(record[name], name, where)) for name in filled]
        if any(other != first for other in others):
            names = " and ".join(map(repr, filled))
            raise InputError(f"{where}: columns {names} differ: leave out all but one of them")
        return first
    if "prompt" in record and "completion" in record and not (has_other_format and _is_unfilled(record)):
        prompt = _prompt_or_completion(record["prompt"], "prompt", "user", where)
        return prompt + _prompt_or_completion(record["completion"], "completion", "assistant", where)
    if present and not has_other_format:
        return list(_list_of_messages(record[present[0]], present[0], where))
    return None


def _is_unfilled(record: Mapping[str, Any]) -> bool:
    """Whether prompt and completion are columns of other rows' format."""
    return all(is_missing(record[name]) for name in ("prompt", "completion"))


def _holds_messages(value: Any) -> bool:
    """Whether a column holds a list that is not empty, or the JSON of a list."""
    if isinstance(value, list):
        return bool(value)
    return isinstance(value, str) and value.lstrip().startswith("[")


def _prompt_or_completion(value: Any, name: str, role: Role, where: str) -> list[Message]:
    """The messages of a column "prompt" or "completion", which holds a text of `role`, or messages."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return list(_list_of_messages(value, name, where))
    return [_message(role, value, 1.0, where)]


def _list_of_messages(value: Any, name: str, where: str) -> Iterator[Message]:
    messages = _require_list(_parse_json(value, name, where) if isinstance(value, str) else value, name, where)
    if messages and all(isinstance(message, str) for message in messages):  # LIMA: question and answer alternate
        for number, text in enumerate(messages):
            yield _message("assistant" if number % 2 else "user", text, 1.0, where)
        return
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            actual = type(message).__name__
            raise InputError(f"{where}: message {number} of {name!r} should be an object, got {actual}")
        yield _message_of_object(message, f"{where}, message {number}")


def _message_of_object(columns: Mapping[str, Any], where: str) -> Message:
    columns = {name: value for name, value in columns.items() if value is not None or name in CONTENTS}
    role_names = {"role", "from"} & columns.keys()
    if len(role_names) != 1:
        names = ", ".join(map(repr, columns)) or "none"
        raise InputError(f"{where}: expected a role and content, or from and value; there are {names}: fix the row")
    speaker = columns[role_names.pop()]
    role = ROLES.get(speaker.lower().strip()) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{where}: unknown role {short_repr(speaker)}: expected one of {', '.join(ROLES)}")
    content = next((columns[name] for name in CONTENTS if columns.get(name) is not None), None)
    calls = columns.get("tool_calls") or columns.get("function_call")
    if not calls and not set(CONTENTS) & columns.keys():
        raise InputError(f"{where}: no content: expected a text with the role {short_repr(speaker)}: fix the row")
    weight, has_weight = _weight(columns, where)
    text = "\n".join(part for part in (_content_text(content, where), *_tool_calls(calls, where)) if part)
    has_reasoning = any(columns.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return Message(role, text, weight, has_weight, has_reasoning)


def _message(role: Any, text: Any, weight: float, where: str) -> Message:
    return Message(role, _content_text(text, where), weight)


def _content_text(value: Any, where: str) -> str:
    """A message's content as text: a text, a number, nothing, or the concatenation of a list of texts."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: content should be text, or parts of it, got {type(value).__name__}: fix the row")
    return "".join(_part_text(part, where) for part in value)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where}: a part of the content is {short_repr(kind)}, expected text: leave the message out")


def _tool_calls(calls: Any, where: str) -> list[str]:
    """The function calls of a message as ShareGPT writes them, a line of {"name": .., "arguments": ..} each."""
    lines = []
    for call in [calls] if isinstance(calls, Mapping) else _require_list(calls or [], "tool_calls", where):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a tool call should name a function and its arguments, got {short_repr(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # what is not JSON stays text
                arguments = json.loads(arguments)
        lines.append(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False))
    return lines


def _weight(columns: Mapping[str, Any], where: str) -> tuple[float, bool]:
    """A message's loss weight, and whether the file has one."""
    weight, has_weight = 1.0, False
    for name in WEIGHTS:
        value = columns.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not (value == 0 or LEAST_WEIGHT <= value <= MOST_WEIGHT):
            raise InputError(
                f"{where}: {name} is {short_repr(value)}, expected 0, a number from {LEAST_WEIGHT:g} to "
                f"{MOST_WEIGHT:,}, or true or false"
            )
        weight, has_weight = weight * float(value), True
    return weight, has_weight


def _system_message(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The system prompt and the tools in a record's own columns, as one message to begin the conversation with."""
    systems = dict.fromkeys(_content_text(record.get(name), where) for name in ("system", "system_prompt"))
    tools = next((record[x] for x in ("tools", "functions") if isinstance(record.get(x), str | list | dict)), "")
    tools = tools.strip() if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    parts = [*systems, f"Tools:\n{tools}" if tools not in ("", "[]", "{}") else ""]
    text = "\n\n".join(part for part in parts if part.strip())
    return (Message("system", text),) if text else ()


def _require_list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        actual = "null" if value is None else type(value).__name__
        raise InputError(f"{where}: column {name!r} should hold a list of messages, got {actual}: fix the row")
    return value


def _parse_json(text: str, name: str, where: str) -> Any:
    """Messages that a table holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(
            f"{where}: column {name!r} should hold a list of messages, got text that is not JSON: fix the row"
        ) from None
