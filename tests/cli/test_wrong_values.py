"""A value that is no number: one line names the option, the value and what was expected."""

import pytest

from fgpt.cli.main import main


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--lr", "abc", "a number"),
        ("--steps", "1.5", "an integer"),
        ("--seed", "x", "an integer"),
        ("--adapter.dropout", "much", "a number"),
    ],
)
def test_a_value_that_is_no_number(option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", option, value]) == 2
    line = f"error: {option} is {value!r}: expected {expected}; see fgpt train lora-nano --help\n"
    assert capsys.readouterr().err == line
