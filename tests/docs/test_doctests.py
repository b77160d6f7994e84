"""The examples in the docstrings of fgpt print what they say."""

import ast
import doctest
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fgpt

PACKAGE = Path(fgpt.__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def examples(source: str, name: str) -> Iterator[doctest.DocTest]:
    """The docstrings of a module that hold examples. They are read from its source: a type-checked function is wrapped,
    and doctest's own finder passes over what seems to come from another module.
    """
    parser = doctest.DocTestParser()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, DOCUMENTED):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        line = node.body[0].lineno - 1
        place = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
        test = parser.get_doctest(docstring, {}, place, name, line)
        if test.examples:
            yield test


def failures(test: doctest.DocTest, names: dict) -> str:
    """What the examples printed instead of what they say, or nothing."""
    test.globs = dict(names)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


MODULES = {
    module_name(path): tests
    for path in sorted(PACKAGE.rglob("*.py"))
    if (tests := list(examples(path.read_text(encoding="utf-8"), module_name(path))))
}


NEEDED = {
    "fgpt.cli.evaluation.metrics.reference_scores": "sacrebleu",
    "fgpt.cli.evaluation.metrics.reference_tokens": "sacrebleu",
    "fgpt.transforms.privacy_accounting": "dp_accounting",
}
"""The packages of extras without which examples of a module fail: it imports them when it is called."""


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fgpt"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    report = "".join(failures(test, vars(module)) for test in MODULES[name])
    assert not report, report


def test_each_public_name_has_an_example():
    """But `Adapters`, which is an alias of dict."""
    exports = set(fgpt.__all__) - {"Adapters"}
    documented = {test.name.rpartition(".")[2] for tests in MODULES.values() for test in tests}
    assert exports <= documented, f"without an example: {sorted(exports - documented)}"


def test_a_wrong_output_is_a_failure():
    (test,) = examples('"""\n>>> 1 + 1\n3\n"""', "wrong")
    assert "Expected:\n    3\nGot:\n    2" in failures(test, {})
