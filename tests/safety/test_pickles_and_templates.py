"""Pickles are not opened; a template does not leave its sandbox and comes to an end."""

import pickle
import time
from pathlib import Path

import pytest

from fgpt.errors import InputError
from fgpt.io import models
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.child_process import Child

# ------------------------------------------------------------------------------------------------------ pickled weights


class Payload:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path: Path) -> tuple[bytes, Path]:
    """The bytes of such a pickle, and the file that it would create."""
    data = pickle.dumps(Payload(tmp_path / "ran"))
    pickle.loads(data)
    assert (tmp_path / "ran").exists()  # the trap is a trap
    (tmp_path / "ran").unlink()
    return data, tmp_path / "ran"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "fgpt.safetensors"])
def test_a_pickled_model_is_not_opened(name: str, trap: tuple[bytes, Path], tmp_path: Path):
    data, ran = trap
    (tmp_path / "config.json").write_text((models.EMBEDDED["nano"] / "config.json").read_text())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=r"pickled weights .* are not read|not a whole safetensors file") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickled_adapter_is_not_opened(name: str, trap: tuple[bytes, Path], tmp_path: Path):
    from builders import tiny

    from fgpt.io.peft.adapter_files import load_peft

    data, ran = trap
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / name).write_bytes(data)
    with pytest.raises(
        InputError, match=r"adapter_model\.safetensors: .*expected a safetensors file|not a whole"
    ) as caught:
        load_peft(tmp_path, tiny())
    assert "\n" not in str(caught.value)
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------------------ templates


TALK = [{"role": "user", "content": "Hello"}]
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] [1] }}",
    "{{ (''|attr('__class__')).__mro__[1] }}",
    "{{ messages.__class__.__init__.__globals__['os'].popen('touch RAN').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('RAN', 'w') }}",
    "{{ strftime_now.__globals__.json.__builtins__.open('RAN', 'w') }}",
    "{{ self.__init__.__globals__.__builtins__.open('RAN', 'w') }}",
    "{{ self._TemplateReference__context.environment.from_string('x').render() }}",
    "{{ lipsum.__globals__['os'].system('touch RAN') }}",
    "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "{{ namespace.__init__.__globals__.os.system('touch RAN') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ (range|attr('__self__')).open('RAN', 'w') }}",
)
ENDLESS = {
    "a loop": "{% for i in range(10**12) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
    "a power, when it is compiled": "{{ 10**(10**10) }}",
    "a power": "{% set x = messages|length + 9 %}{{ x ** (x ** x) }}",
    "a long text": "{{ 'a' * 10**11 }}",
    "a long list": "{{ ([0] * 10**11)|length }}",
    "a wide field": "{{ 'a'.ljust(10**11) }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a wide filter": "{{ 'a'|center(10**11) }}",
    "text that doubles": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "text that doubles, joined": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "a list that doubles": "{% set ns = namespace(x=[0]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "huge output": "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
    "filler": "{{ lipsum(n=10**8) }}",
    "a deep nest": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
}


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_does_not_leave_its_sandbox(template: str, tmp_path: Path):
    text = ""
    try:
        text = ChatTemplate(template.replace("RAN", str(tmp_path / "ran")), {}).render(TALK)
    except InputError as err:
        failed = str(err)
    else:
        failed = "chat template fails"  # what is not there may also be empty text
    assert "chat template fails" in failed
    assert "\n" not in failed
    assert text.strip() in ("", "{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_comes_to_an_end(name: str, monkeypatch: pytest.MonkeyPatch):
    """In a bounded time and memory, and what is asked of the next one is answered."""
    monkeypatch.setattr("fgpt.tokenizers.chat_template._renderer", Child("chat_template_worker.py", seconds=1))
    begin = time.monotonic()
    with pytest.raises(InputError, match="the model's chat template") as caught:
        ChatTemplate(ENDLESS[name], {}).render(TALK)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - begin < 20
    assert ChatTemplate("{{ messages[0].content }}", {}).render(TALK) == "Hello"
