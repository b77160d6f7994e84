"""A value that is no number, or none of an option's: one line names the option, the value and what was expected."""

import pytest

from fgpt.cli.main import main


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--lr", "abc", "a number"),
        ("--steps", "1.5", "an integer"),
        ("--seed", "x", "an integer"),
        ("--adapter.dropout", "much", "a number"),
        ("--micro-batch-size", "most", "an integer or auto"),
    ],
)
def test_a_value_that_is_no_number(option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", option, value]) == 2
    line = f"error: {option} is {value!r}: expected {expected}; see fgpt train lora-nano --help\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--adapter.kind", "lor", "lora, dora, ia3, ln, bias, full (did you mean lora?)"),
        ("--optimizer", "sgd", "adamw, adamw8bit, muon, schedule_free_adamw"),
        ("--quantize", "nf5", "blockwise8, fp4, int8, nf4, rotated-int8, None (did you mean nf4?)"),
    ],
)
def test_a_value_that_is_none_of_the_options(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "lora-nano", option, value]) == 2
    line = f"error: {option} is {value!r}: expected one of {expected}; see fgpt train lora-nano --help\n"
    assert capsys.readouterr().err == line
