"""The tables of docs/start/migration.md name what PEFT, TRL and fgpt have."""

import dataclasses
import re
from typing import Any

import peft
import pytest
import trl
from builders import ROOT

import fgpt

PAGE = (ROOT / "docs" / "start" / "migration.md").read_text(encoding="utf-8")


def first_column(head: str) -> list[str]:
    """The names in code in the first column of the table with this head."""
    (table,) = re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, flags=re.M)
    return [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        ("`LoraConfig`", ["LoraConfig"]),
        ("`SFTConfig`", ["SFTConfig"]),
        ("`DPOConfig`, `GRPOConfig`", ["DPOConfig", "GRPOConfig"]),
    ],
)
def test_every_field_exists(head: str, classes: list[str]):
    library: Any = trl if hasattr(trl, classes[0]) else peft
    fields = {field.name for name in classes for field in dataclasses.fields(getattr(library, name))}
    names = first_column(head)
    assert len(names) > 7
    assert set(names) <= fields


def test_every_call_of_peft_exists():
    calls = [re.findall(r"(?:^|\.)(\w+)\(", text)[0] for text in first_column("PEFT") if "(" in text]
    places = (peft, peft.PeftModel, peft.tuners.lora.LoraModel)
    assert len(calls) > 8
    assert [call for call in calls if not any(hasattr(place, call) for place in places)] == []


def test_every_trainer_exists():
    assert [name for name in first_column("TRL") if not hasattr(trl, name)] == []


def test_every_function_of_fgpt_exists():
    names = set(re.findall(r"\bfgpt\.(\w+)", PAGE))
    assert len(names) > 20
    assert names <= set(fgpt.__all__)


def test_the_default_target_and_the_named_ones_match():
    params = fgpt.load("nano")
    targets = [target.replace(r"\|", "|") for target in re.findall(r'`r"(blocks[^"]+)"`', PAGE)]
    assert len(targets) == 2
    for target in targets:
        assert fgpt.lora(params, fgpt.key(0), rank=2, target=target)
