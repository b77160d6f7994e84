"""Chat templates are rendered as transformers does, wherever they come from."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders.tokenizers import CHATML, TALK
from transformers import AutoTokenizer

import fgpt
from fgpt.errors import InputError
from fgpt.tokenizers import chat_template, tiktoken_bpe
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.tokenizer_files import of_folder

NANO = Path(fgpt.__file__).parent / "nano"


TEMPLATES = {
    "ChatML": CHATML,
    "blocks": (
        "{% for m in messages %}\n    {%- if m.role == 'user' %}\n  [{{ m.content | trim }}]\n"
        "    {% endif %}\n{% endfor %}"
    ),
    "json": "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ bos_token }}",
    "special": "{{ bos_token }}{{ messages[-1]['content'] }}{{ eos_token }}{% if tools %}tools{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "space": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "date": "{{ strftime_now('%Y') }} {{ messages[0].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", [True, False])
def test_a_template_is_rendered_as_transformers_does(name: str, answer: bool, folder: Path):
    reference = AutoTokenizer.from_pretrained(folder)
    expected = reference.apply_chat_template(
        TALK, chat_template=TEMPLATES[name], add_generation_prompt=answer, tokenize=False
    )
    special = chat_template.named_tokens(json.loads((folder / "tokenizer_config.json").read_text()))
    assert special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert ChatTemplate(TEMPLATES[name], special).render(TALK, answer) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('only users speak') }}", "TemplateError: only users speak"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[9].content.x }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_that_fails_says_so(template: str, expected: str):
    with pytest.raises(InputError, match=expected) as caught:
        ChatTemplate(template, {}).render(TALK)
    assert "\n" not in str(caught.value)


def test_where_a_template_comes_from(folder: Path, tmp_path: Path):
    def put(config: dict[str, Any]) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | config))

    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    put({})
    with pytest.raises(InputError, match=r"has no chat template; expected one in tokenizer_config\.json"):
        of_folder(tmp_path, 600).apply_chat_template(TALK)
    with pytest.raises(InputError, match="has no chat template"):
        tiktoken_bpe.from_ranks(NANO / tiktoken_bpe.RANKS).apply_chat_template(TALK)
    put({"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "named"}]})
    assert of_folder(tmp_path, 600).apply_chat_template(TALK) == of_folder(tmp_path, 600).encode("named")
    (tmp_path / "chat_template.jinja").write_text("of its own")
    assert of_folder(tmp_path, 600).apply_chat_template(TALK) == of_folder(tmp_path, 600).encode("of its own")
