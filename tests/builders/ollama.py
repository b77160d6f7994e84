"""What Ollama makes of a Modelfile and a conversation: its template/template.go, for templates with .Prompt."""

import json
import re
from collections.abc import Mapping, Sequence

Turn = dict[str, str]
TOKEN = re.compile(r'\{\{ (?P<action>if \.\w+|end|\.\w+|"(?:[^"\\]|\\.)*") \}\}')


def modelfile_parts(content: str) -> dict[str, list[str]]:
    """The values of each instruction of a Modelfile."""
    parts: dict[str, list[str]] = {}
    for match in re.finditer(r'^(FROM|TEMPLATE|SYSTEM|PARAMETER stop) (?:"""(.*?)"""|(.*?))$', content, re.M | re.S):
        value = match[2] if match[2] is not None else match[3]
        parts.setdefault(match[1], []).append(json.loads(value) if value.startswith('"') and match[3] else value)
    return parts


def fill(template: str, values: Mapping[str, str], cut: str | None = None) -> str:
    """A template of Go's: text, {{ .Name }}, {{ if .Name }}, {{ end }}, {{ "text" }}. What follows the field `cut` is
    left out.
    """
    output, at, shown = "", 0, [True]
    for match in TOKEN.finditer(template):
        action = match["action"]
        output += template[at : match.start()] if all(shown) else ""
        at = match.end()
        if action == "end":
            shown.pop()
        elif action.startswith("if"):
            shown.append(bool(values[action.removeprefix("if .")]))
        elif all(shown):
            output += json.loads(action) if action.startswith('"') else values[action[1:]]
            if action == f".{cut}":
                return output
    assert shown == [True]
    return output + template[at:]


def ollama_prompt(template: str, messages: Sequence[Mapping[str, str]], system: str = "") -> str:
    """The prompt of a conversation; `system` is the Modelfile's, of a conversation that has none."""
    conversation = [dict(each) for each in messages]
    if system and all(each["role"] != "system" for each in conversation):
        conversation.insert(0, {"role": "system", "content": system})
    collated: list[Turn] = []
    for each in conversation:
        if collated and collated[-1]["role"] == each["role"]:
            collated[-1]["content"] += "\n\n" + each["content"]
        else:
            collated.append(each)
    output, turn = "", {"System": "", "Prompt": "", "Response": ""}
    for each in collated:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[each["role"]]
        if (name == "System" and (turn["Prompt"] or turn["Response"])) or (name == "Prompt" and turn["Response"]):
            output += fill(template, turn)
            turn = dict.fromkeys(turn, "")
        turn[name] = each["content"]
        if name == "Response":
            output += fill(template, turn)
            turn = dict.fromkeys(turn, "")
    return output + fill(template, turn, cut="Response")
