"""The tests that docs/reference/algebra.md names hold the laws: they exist."""

import ast
import re

from builders import ROOT

PAGE = (ROOT / "docs" / "reference" / "algebra.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_row_of_a_law_names_a_test():
    rows = [
        row for table in PAGE.split("| law | test |\n|---|---|\n")[1:] for row in table.split("\n\n")[0].splitlines()
    ]
    assert len(rows) == len(NAMED) > 20


def test_every_named_test_exists():
    for path, name in NAMED:
        functions = {x.name for x in ast.parse((ROOT / path).read_text()).body if isinstance(x, ast.FunctionDef)}
        assert name in functions, f"{path} has no {name}"
