"""Nothing that is read can run: no pickle, no evaluated text, no remote code, no template outside its sandbox."""

import ast
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import ROOT

from fgpt.errors import InputError
from fgpt.io import models
from fgpt.tokenizers.chat_template import ChatTemplate
from fgpt.tokenizers.child_process import Child

# ------------------------------------------------------------------------------------------------ a finder in source

MODULES = {
    *("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp", "code"),
    *("codeop", "pickletools", "jsonpickle", "zipimport", "torch.package"),
}
"""Whoever imports one of these can run what a file says."""
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.export.load", "torch.serialization.load"),
    *("numpy.load", "numpy.fromregex", "pandas.read_pickle", "sklearn.externals", "importlib.util.exec_module"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("importlib.import_module", "jinja2.Template", "jinja2.Environment", "jinja2.environment.Environment"),
    *("jinja2.environment.Template", "jinja2.nativetypes.NativeEnvironment", "builtins.eval", "builtins.exec"),
    *("builtins.compile", "builtins.__import__"),
}
"""Names that load pickles, look names up as code, or render templates outside the sandbox: not to be used or called."""
KEYWORDS = {"trust_remote_code", "allow_pickle"}
SANDBOXES = {"jinja2.sandbox.ImmutableSandboxedEnvironment", "jinja2.sandbox.SandboxedEnvironment"}


def forbidden(source: str) -> Iterator[str]:
    """What `source` has of the above, each as `line: name`; a name is followed through its imports' aliases."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:  # `import a.b` binds a; `import a.b as c` binds c to a.b
                known[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
                yield from _module(node, name.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield from _module(node, f"{node.module}.{name.name}")
    own: set[ast.AST] = set(_arguments(tree))
    node: Any
    for node in ast.walk(tree):
        name = _name(node, known)
        if name in CALLS:
            yield f"{node.lineno}: {name}"
        elif isinstance(node, ast.Name) and node.id in BUILTINS and isinstance(node.ctx, ast.Load) and node not in own:
            yield f"{node.lineno}: {node.id}"
        elif isinstance(node, ast.ClassDef | ast.Call) and _renders(node, known):
            yield f"{node.lineno}: {_renders(node, known)}"
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS and not _is(node.value, False):
            yield f"{node.value.lineno}: {node.arg}"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values):
                if isinstance(key, ast.Constant) and key.value in KEYWORDS and not _is(value, False):
                    yield f"{key.lineno}: {key.value}"
        if isinstance(node, ast.Constant) and node.value in MODULES - {"code"}:  # import_module("pickle"), getattr(..)
            yield f"{node.lineno}: {node.value!r}"


def _module(node: ast.stmt, name: str) -> Iterator[str]:
    parts = name.split(".")
    if any(".".join(parts[:n]) in MODULES for n in (1, 2)):
        yield f"{node.lineno}: import {name}"
    if name in CALLS:
        yield f"{node.lineno}: import {name}"


def _arguments(tree: ast.AST) -> Iterator[ast.Name]:
    """Where a name of a builtin is a function's own argument: `def train(compile: bool)`."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            args = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}
            body = function.body if isinstance(function.body, list) else [function.body]
            yield from (x for part in body for x in ast.walk(part) if isinstance(x, ast.Name) and x.id in args)


def _name(node: ast.AST, known: dict[str, str]) -> str | None:
    """The full name of `a.b.c`, its first part as it was imported."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in known:
        return None
    return ".".join([known[node.id], *reversed(parts)])


def _renders(node: ast.ClassDef | ast.Call, known: dict[str, str]) -> str | None:
    """A Jinja environment that is made, or built upon, and is none of the sandboxes."""
    for part in node.bases if isinstance(node, ast.ClassDef) else [node.func]:
        name = _name(part, known)
        if name and name.startswith("jinja2.") and name.endswith("Environment") and name not in SANDBOXES:
            return name
    return None


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


OUGHT = {
    "import pickle": "1: import pickle",
    "import pickle as p": "1: import pickle",
    "import _pickle": "1: import _pickle",
    "from pickle import loads as read": "1: import pickle.loads",
    "import marshal, json": "1: import marshal",
    "import shelve": "1: import shelve",
    "import dill": "1: import dill",
    "from cloudpickle import load": "1: import cloudpickle.load",
    "import joblib": "1: import joblib",
    "import runpy": "1: import runpy",
    "import imp": "1: import imp",
    "import torch.package": "1: import torch.package",
    "from torch import package": "1: import torch.package",
    "def f():\n    import pickle": "2: import pickle",
    "import importlib\nimportlib.import_module(name)": "2: importlib.import_module",
    "from importlib import import_module as m\nm(name)": "1: import importlib.import_module",
    "getattr(x, 'pickle')": "1: 'pickle'",
    "eval(text)": "1: eval",
    "run = exec": "1: exec",
    "compile(text, '', 'exec')": "1: compile",
    "__import__('os')": "1: __import__",
    "import builtins as b\nb.eval(text)": "2: builtins.eval",
    "def f(eval=eval):\n    pass": "1: eval",
    "def f(exec):\n    pass\nexec(text)": "3: exec",
    "import torch\ntorch.load(path)": "2: torch.load",
    "import torch as t\nt.load(path)": "2: torch.load",
    "from torch import load": "1: import torch.load",
    "from torch import load as read\nread(path)": "1: import torch.load",
    "import torch.nn\ntorch.load(path)": "2: torch.load",
    "import torch\ntorch.save(x, path)": "2: torch.save",
    "import torch\ntorch.jit.load(path)": "2: torch.jit.load",
    "from torch import jit\njit.load(path)": "2: torch.jit.load",
    "import torch\ntorch.hub.load(repo)": "2: torch.hub.load",
    "import torch\nread = torch.load\nread(path)": "2: torch.load",
    "import numpy as np\nnp.load(path)": "2: numpy.load",
    "from numpy import load": "1: import numpy.load",
    "import yaml\nyaml.load(text)": "2: yaml.load",
    "from yaml import load": "1: import yaml.load",
    "AutoModel.from_pretrained(name, trust_remote_code=True)": "1: trust_remote_code",
    "datasets.load_dataset(name, trust_remote_code=trust)": "1: trust_remote_code",
    "f(**{'trust_remote_code': True})": "1: trust_remote_code",
    "np.asarray(x, allow_pickle=True)": "1: allow_pickle",
    "import jinja2\njinja2.Template(text)": "2: jinja2.Template",
    "from jinja2 import Template": "1: import jinja2.Template",
    "import jinja2\njinja2.Environment()": "2: jinja2.Environment",
    "from jinja2 import Environment as E\nE()": "1: import jinja2.Environment",
    "from jinja2 import nativetypes\nnativetypes.NativeEnvironment()": "2: jinja2.nativetypes.NativeEnvironment",
    "import jinja2.environment as e\nclass E(e.Environment): pass": "2: jinja2.environment.Environment",
}
HARMLESS = (
    "import json, re\nre.compile(json.loads(text))",
    "import torch\ntorch.compile(f)",
    "model.eval()",
    "def train(compile=True):\n    return torch.compile(f) if compile else f",
    "class Run:\n    compile: bool = True",
    "from safetensors.torch import load_file, save\nload_file(path)",
    "from jinja2.sandbox import ImmutableSandboxedEnvironment\nImmutableSandboxedEnvironment()",
    "from jinja2.sandbox import SandboxedEnvironment as S\nclass E(S): pass",
    "load(path, trust_remote_code=False)",
    "from fgpt.io import hub\nhub.load(name)",
)


@pytest.mark.parametrize("source", OUGHT)
def test_each_form_is_found(source: str):
    assert OUGHT[source] in list(forbidden(source))


@pytest.mark.parametrize("source", HARMLESS)
def test_others_are_not(source: str):
    assert list(forbidden(source)) == []


def test_no_file_of_ours_can_run_what_it_reads():
    found, files = [], [path for folder in ("fgpt", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in files:
        found += [f"{path.relative_to(ROOT)}:{each}" for each in forbidden(path.read_text(encoding="utf-8"))]
    assert found == []
    assert len(files) > 80  # and they were found


def test_nor_do_the_tests_but_where_they_say_so():
    """Ours read the README as a program, and write the pickle below; nothing else, and no file of another's."""
    allowed = {"test_readme.py": {"exec", "compile"}, "test_no_code.py": {"import pickle", "'pickle'"}}
    for path in sorted((ROOT / "tests").glob("*.py")):
        found = {each.partition(": ")[2] for each in forbidden(path.read_text(encoding="utf-8"))}
        found -= {"importlib.import_module"}  # by tests of ours alone, of names that they write
        if path.name == "test_no_code.py":
            found = {each for each in found if not each.startswith("'")}  # its own tables
        assert found <= allowed.get(path.name, set()), path.name


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
    ) as it:
        load_peft(tmp_path, tiny())
    assert "\n" not in str(it.value)
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
    said = ""
    try:
        said = ChatTemplate(template.replace("RAN", str(tmp_path / "ran")), {}).render(TALK)
    except InputError as err:
        failed = str(err)
    else:
        failed = "chat template fails"  # what is not there may also be empty text
    assert "chat template fails" in failed
    assert "\n" not in failed
    assert said.strip() in ("", "{}")
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
