"""The API pages name what exists: each public name of `fgpt` once, and modules and functions that can be imported."""

import importlib
import pkgutil
import re
from collections import Counter

from builders import ROOT

import fgpt

ENTRIES = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (fgpt\.[\w.]+)$", page.read_text(encoding="utf-8"), flags=re.M)
]


def test_each_public_name_is_there_once():
    public = [name.removeprefix("fgpt.") for name in ENTRIES if name.count(".") == 1]
    public = [name for name in public if name not in {module.name for module in pkgutil.iter_modules(fgpt.__path__)}]
    assert Counter(public) == Counter(fgpt.__all__)


def test_no_entry_is_there_twice():
    assert [name for name, count in Counter(ENTRIES).items() if count > 1] == []


def test_each_entry_exists():
    for name in ENTRIES:
        assert pkgutil.resolve_name(name) is not None


def test_each_objective_and_transform_has_its_entry():
    for package in ("fgpt.objectives", "fgpt.transforms"):
        modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
        assert {f"{package}.{module.name}" for module in modules} <= set(ENTRIES)
