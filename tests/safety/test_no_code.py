"""No file of ours can run what it reads: no pickle, no evaluated text, no free template."""

import ast
from collections.abc import Iterator
from typing import Any

import pytest
from builders import ROOT

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
    arguments: set[ast.AST] = set(_arguments(tree))
    node: Any
    for node in ast.walk(tree):
        name = _name(node, known)
        if name in CALLS:
            yield f"{node.lineno}: {name}"
        elif (
            isinstance(node, ast.Name)
            and node.id in BUILTINS
            and isinstance(node.ctx, ast.Load)
            and node not in arguments
        ):
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


PIPES = {"fgpt/data/tokenization_pool.py", "fgpt/data/tokenization_worker.py"}
"""The two ends of pipes between a process and its own children, which nobody else writes."""


def test_no_file_of_ours_can_run_what_it_reads():
    found, files = [], [path for folder in ("fgpt", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        allowed = "import pickle" if name in PIPES else None
        found += [f"{name}:{x}" for x in forbidden(path.read_text(encoding="utf-8")) if x.partition(": ")[2] != allowed]
    assert found == []
    assert len(files) > 80  # and they were found


@pytest.mark.slow
def test_nor_do_the_tests_but_where_they_say_so():
    """Ours run the README and model cards, and write the pickle below; nothing else, and no file of another's."""
    allowed = {
        "test_model_cards.py": {"exec"},
        "test_pages_by_themselves.py": {"exec", "compile"},
        "test_readme.py": {"exec", "compile"},
        "test_page_of_peft_errors.py": {"exec", "compile"},
        "test_pickles_and_templates.py": {"import pickle"},
    }
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        found = {each.partition(": ")[2] for each in forbidden(path.read_text(encoding="utf-8"))}
        found -= {"importlib.import_module"}  # by tests of ours alone, of names that they write
        if path.name == "test_no_code.py":
            found = {each for each in found if not each.startswith("'")}  # its own tables
        assert found <= allowed.get(path.name, set()), path.name
