"""Conversations: messages of roles, each with a loss weight; and the formats in which they are written down.

    {"messages": [{"role": "user", "content": ..}, ..]}            OpenAI's, Tulu's; contents also as parts
    {"conversations": [{"from": "human", "value": ..}, ..]}        ShareGPT's, `system` and `tools` beside
    {"conversations": ["question", "answer", ..]}                  LIMA's
    {"prompt": .., "completion": ..}                               texts, or lists of messages
    {"instruction": .., "output": .., "history": [[.., ..], ..]}   Alpaca's, with the exchanges before

Each answer of the assistant is one training example, with all that precedes it as its prompt: see `answers`.
"""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fgpt.errors import InputError, shown

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "ai", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}
"""What each format calls the four roles. A call of a function is the assistant's, its result the tool's."""

WEIGHTS = ("weight", "loss_weight", "train", "training")
"""What formats call a message's loss weight: a number, or true and false."""


CONTENTS = ("content", "value", "text")


@dataclass(frozen=True)
class Message:
    """What one side says. `weight` counts where it is the assistant's: 0 is read, and not trained on."""

    role: Role
    content: str
    weight: float = 1.0
    explicit: bool = field(default=False, compare=False)
    """The weight was written down, rather than taken to be 1."""
    reasoned: bool = field(default=False, compare=False)
    """There is reasoning beside the content, which is not read."""


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and where they were read, for errors and to hold out conversations as wholes."""

    messages: tuple[Message, ...]
    where: str = ""


# ------------------------------------------------------------------------------------------------------------ answers

WITHOUT_ANSWER = "conversations without an answer of the assistant"
EMPTY_ANSWER = "empty answers of the assistant"
EMPTY = "empty messages of others"
UNPROMPTED = "messages of the assistant before the first of the user, read as context alone"
UNWEIGHTED = "answers of the assistant with loss weight 0, read as context alone"
UNANSWERED = "messages after the last answer"
REASONING = "texts of reasoning beside a message's content, which are not read"
IGNORED = "loss weights of messages that are not the assistant's, which carry no loss"


def answers(conversation: Conversation, left_out: Counter[str]) -> list[tuple[tuple[Message, ...], Message]]:
    """(all that precedes it, the answer) of each answer of the assistant that is to be trained on. What is not is added
    to `left_out`, by its reason.
    """
    context: list[Message] = []
    pairs: list[tuple[tuple[Message, ...], Message]] = []
    spoken = any(message.role == "assistant" for message in conversation.messages)
    left_out[WITHOUT_ANSWER] += not spoken
    for message in conversation.messages:
        left_out[REASONING] += message.reasoned
        answer = message.role == "assistant"
        if not message.content.strip():
            left_out[EMPTY_ANSWER if answer else EMPTY] += 1
            continue
        if not answer:
            left_out[IGNORED] += message.explicit and message.weight > 0
        elif not any(before.role in ("user", "tool") for before in context):
            left_out[UNPROMPTED] += 1
        elif message.weight == 0:
            left_out[UNWEIGHTED] += 1
        else:
            pairs.append((tuple(context), message))
        context.append(message)
    trailing = 0
    while spoken and trailing < len(context) and context[-1 - trailing].role != "assistant":
        trailing += 1
    left_out[UNANSWERED] += trailing
    return pairs


def summary(left_out: Mapping[str, int]) -> str:
    """What was left out, and why, in one line; empty where nothing was."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)


def as_text(messages: Sequence[Message]) -> str:
    """Messages for people to read, each with its role."""
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


# ------------------------------------------------------------------------------------------------------------ formats


def read(record: Mapping[str, Any], where: str, otherwise: bool = False) -> Conversation | None:
    """The conversation of a record, known by its columns; None where it holds none. `otherwise` says that the record
    has columns of another format too: a conversation, which holds more, is then read where there is one.

    Raises InputError for one that is malformed, and for preference data, which this training has no loss for.
    """
    refuse_preferences(record, where)
    turns = _messages(record, where, otherwise)
    if turns is None:
        return None
    return Conversation((*_system(record, where), *turns), where)


def refuse_preferences(record: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a row of DPO's or KTO's."""
    spoken = any(name in record for name in ("messages", "conversations", "completion"))
    if {"chosen", "rejected"} <= record.keys():
        name = "a row of preference data (chosen, rejected: DPO's format)"
    elif spoken and any(_is_judgment(record.get(label)) for label in ("label", "kto_tag")):
        name = "a row of preference data (an answer and a label true or false: KTO's format)"
    else:
        return
    raise InputError(f"{where}: {name}: expected answers to train on; give the good ones as `messages`")


def _is_judgment(value: Any) -> bool:
    """True or false, also as tables write them."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def history(record: Mapping[str, Any], prompt: str, answer: str, where: str) -> Conversation | None:
    """The conversation of a row of Alpaca's that has a system prompt or exchanges before it; None where it has none."""
    before = record.get("history")
    if isinstance(before, str):  # of a table: JSON, or a column of another meaning
        before = _parsed(before, "history", where) if before.lstrip().startswith("[") else None
    system = _system(record, where)
    if not before and not system:
        return None
    messages = [*system]
    for exchange in _list(before or [], "history", where):
        if not isinstance(exchange, Sequence) or isinstance(exchange, str) or len(exchange) != 2:
            raise InputError(f"{where}: history should hold pairs of question and answer, got {shown(exchange)}")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            messages.append(_message(role, text, 1.0, where))
    return Conversation((*messages, Message("user", prompt), Message("assistant", answer)), where)


COLUMNS = ("messages", "conversations", "conversation")


def _messages(record: Mapping[str, Any], where: str, otherwise: bool) -> list[Message] | None:
    """The messages that a record's own columns hold; None where it has no such columns.

    Where rows of several formats were put together, each has the columns of all, and null in those of the others.
    """
    there = [name for name in COLUMNS if name in record]
    full = [name for name in there if _holds_messages(record[name])]
    pair = "prompt" in record and "completion" in record
    if full:
        first, *others = [list(_list_of_messages(record[name], name, where)) for name in full]
        if any(other != first for other in others):
            raise InputError(f"{where}: columns {' and '.join(map(repr, full))} differ: leave all but one of them out")
        return first
    if otherwise:
        return None
    if there and not pair:
        return list(_list_of_messages(record[there[0]], there[0], where))
    if pair:
        return [
            *_side(record["prompt"], "prompt", "user", where),
            *_side(record["completion"], "completion", "assistant", where),
        ]
    return None


def _holds_messages(value: Any) -> bool:
    """Whether a column has a list in it, or the JSON of one."""
    return bool(value) if isinstance(value, list) else isinstance(value, str) and value.lstrip().startswith("[")


def _side(value: Any, name: str, role: Role, where: str) -> list[Message]:
    """One column of prompt and completion: a text of `role`, or messages."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return list(_list_of_messages(value, name, where))
    return [_message(role, value, 1.0, where)]


def _list_of_messages(value: Any, name: str, where: str) -> Iterator[Message]:
    turns = _list(_parsed(value, name, where) if isinstance(value, str) else value, name, where)
    plain = [isinstance(turn, str) for turn in turns]
    if turns and all(plain):  # LIMA's: question and answer in turn
        for number, turn in enumerate(turns):
            yield _message("assistant" if number % 2 else "user", turn, 1.0, where)
        return
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise InputError(f"{where}: message {number} of {name!r} should be an object, got {type(turn).__name__}")
        yield _of_object(turn, f"{where}, message {number}")


def _of_object(turn: Mapping[str, Any], where: str) -> Message:
    turn = {name: value for name, value in turn.items() if value is not None or name in CONTENTS}
    names = {"role", "from"} & turn.keys()
    if len(names) != 1:
        have = ", ".join(map(repr, turn)) or "none"
        raise InputError(f"{where}: expected a role and content, or from and value; there are {have}: mend the row")
    speaker = turn[names.pop()]
    role = ROLES.get(speaker.lower().strip()) if isinstance(speaker, str) else None
    if role is None:
        raise InputError(f"{where}: unknown role {shown(speaker)}: expected one of {', '.join(ROLES)}")
    content = next((turn[name] for name in CONTENTS if turn.get(name) is not None), None)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if not calls and not set(CONTENTS) & turn.keys():
        raise InputError(f"{where}: no content: expected a text beside {shown(speaker)}: mend the row")
    weight, explicit = _weight(turn, where)
    text = "\n".join(part for part in (_content(content, where), *_calls(calls, where)) if part)
    reasoned = any(turn.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return Message(role, text, weight, explicit, reasoned)


def _message(role: Any, text: Any, weight: float, where: str) -> Message:
    return Message(role, _content(text, where), weight)


def _content(value: Any, where: str) -> str:
    """A message's text: a text, a number, nothing, or a list of parts that are texts, put together."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{where}: content should be text, or parts of it, got {type(value).__name__}: mend the row")
    return "".join(_part(part, where) for part in value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where}: a part of the content is {shown(kind)}, expected text: leave the message out")


def _calls(calls: Any, where: str) -> list[str]:
    """The functions that a message calls, as ShareGPT writes them: {"name": .., "arguments": ..}, a line to each."""
    lines = []
    for call in [calls] if isinstance(calls, Mapping) else _list(calls or [], "tool_calls", where):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a tool call should name a function and its arguments, got {shown(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # a text that is no JSON stays a text
                arguments = json.loads(arguments)
        lines.append(json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False))
    return lines


def _weight(turn: Mapping[str, Any], where: str) -> tuple[float, bool]:
    """A message's loss weight, and whether it is written down."""
    weight, explicit = 1.0, False
    for name in WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InputError(f"{where}: {name} is {shown(value)}, expected a number from 0, or true or false")
        weight, explicit = weight * float(value), True
    return weight, explicit


def _system(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The system prompt and the tools that stand beside a conversation, as one message at its beginning."""
    systems = dict.fromkeys(_content(record.get(name), where) for name in ("system", "system_prompt"))
    tools = next((record[x] for x in ("tools", "functions") if isinstance(record.get(x), str | list | dict)), "")
    tools = tools.strip() if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
    parts = [*systems, f"Tools:\n{tools}" if tools not in ("", "[]", "{}") else ""]
    text = "\n\n".join(part for part in parts if part.strip())
    return (Message("system", text),) if text else ()


def _list(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        came = "null" if value is None else type(value).__name__
        raise InputError(f"{where}: column {name!r} should hold a list of messages, got {came}: mend the row")
    return value


def _parsed(text: str, name: str, where: str) -> Any:
    """Messages that a table holds as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(
            f"{where}: column {name!r} should hold a list of messages, got text that is no JSON: mend the row"
        ) from None
