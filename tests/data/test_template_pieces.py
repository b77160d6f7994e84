"""Templates as pieces: they make what the templates make, also as Jinja and as Ollama fills them."""

from typing import Any

import pytest
from builders.ollama import modelfile_parts, ollama_prompt
from builders.tokenizers import CHATML
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.modelfile import go_template, literal, modelfile
from fgpt.data.conversations import Message
from fgpt.data.prompt_templates import TEMPLATES
from fgpt.data.template_pieces import Piece, TemplatePieces, chat_pieces_of, text_pieces
from fgpt.tokenizers.chat_template import ChatTemplate

TEXT = [template for template in TEMPLATES.values() if not template.chat]
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content|trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '</s>' }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind. {{x}}<|im_end|>\n' }}{% endif %}" + CHATML
)
CHATS = {"chatml": (CHATML, ""), "llama3": (LLAMA3, "<s>"), "mistral": (MISTRAL, "<s>"), "smollm": (SMOLLM, "")}
WORDS = st.text("ab {}%'\"\\\n", min_size=1, max_size=6).map(lambda text: f"x{text}x")


def conversations(system: bool) -> st.SearchStrategy[list[dict[str, str]]]:
    """A user's message, or several with answers between, with a system prompt before."""
    user, answer = (st.fixed_dictionaries({"role": st.just(x), "content": WORDS}) for x in ("user", "assistant"))
    turns = st.lists(st.tuples(user, answer), max_size=2).map(lambda pairs: [x for pair in pairs for x in pair])
    first = st.fixed_dictionaries({"role": st.just("system"), "content": WORDS})
    begin = st.one_of(st.just([]), first.map(lambda x: [x])) if system else st.just([])
    return st.tuples(begin, turns, user.map(lambda x: [x])).map(lambda parts: [x for part in parts for x in part])


@pytest.mark.parametrize("template", TEXT, ids=lambda template: template.name)
@given(talk=conversations(system=True), more=st.lists(WORDS, max_size=1))
def test_a_template_of_text(template: Any, talk: list[dict[str, str]], more: list[str]):
    talk = [*talk, *({"role": "user", "content": x} for x in more)]
    messages = [Message(each["role"], each["content"]) for each in talk]  # pyright: ignore[reportArgumentType]
    turns = template.turns(messages)
    expected = "".join(prompt + ("" if answer is None else answer + "<eos>") for prompt, answer in turns)
    pieces = text_pieces(template, "<eos>")
    assert pieces.render(talk) == expected
    assert ChatTemplate(pieces.jinja(), {}).render(talk) == expected
    assert ollama_prompt(go_template(pieces), talk) == expected


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_template(name: str):
    jinja, bos = CHATS[name]
    template = ChatTemplate(jinja, {"bos_token": bos})
    pieces = chat_pieces_of(template, bos)
    assert (pieces.system is None) == (name == "mistral")
    assert (pieces.default_system == "") == (name != "smollm")
    content = modelfile_parts(modelfile("m.gguf", pieces, ["<|im_end|>"]))
    (go,), (system,) = content["TEMPLATE"], content.get("SYSTEM", [""])
    assert (content["FROM"], content["PARAMETER stop"]) == (["./m.gguf"], ["<|im_end|>"])

    @given(talk=conversations(system=pieces.system is not None))
    def check(talk: list[dict[str, str]]):
        expected = template.render(talk)
        assert bos + pieces.render(talk) == expected
        assert bos + ollama_prompt(go, talk, system) == expected

    check()


NO_PIECES = {
    "writes a space before earlier answers": MISTRAL.replace("m.content + '</s>'", "' ' + m.content + '</s>'"),
    "numbers the turns": "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}:",
    "leaves the answers out": "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% endif %}{% endfor %}",
    "begins with a text": "Hello. {% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[assistant]' }}",
}


@pytest.mark.parametrize("name", NO_PIECES)
def test_a_chat_template_without_pieces(name: str):
    with pytest.raises(fgpt.InputError, match="not made of a piece for each role"):
        chat_pieces_of(ChatTemplate(NO_PIECES[name], {}))


def test_texts_that_quotes_and_actions_would_end():
    pieces = TemplatePieces(Piece('{{ """ }}', ""), Piece("", '""""'), None)
    (go,) = modelfile_parts(modelfile("m", pieces, []))["TEMPLATE"]
    assert '"""' not in go
    assert ollama_prompt(go, [{"role": "user", "content": "a"}]) == '{{ """ }}a'
    assert literal("plain {x}") == "plain {x}"
    odd = TemplatePieces(Piece("", ""), Piece("", ""), Piece("", ""), default_system='say """')
    with pytest.raises(fgpt.InputError, match="cannot quote"):
        modelfile("m", odd, [])
