"""A bad option of sampling is one line."""

import math
from typing import Any

import pytest
import torch
from builders.sampling import FILTERS, keys_of_rows

from fgpt.errors import InputError
from fgpt.generation import sampling as S

BAD = {
    "temperature": [-0.1, math.inf, math.nan],
    "top_k": [0, -3],
    "top_p": [0.0, 1.01, math.nan],
    "min_p": [0.0, -0.5, 1.01, math.nan],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan],
    "no_repeat_ngram": [0, -1],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD.items() for v in values], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bad_value_is_told_in_one_line(name: str, value: float, temperature: float):
    values: dict[str, Any] = {"temperature": temperature, name: value}
    with pytest.raises(InputError) as caught:
        S.SamplingParams(**values)
    assert str(caught.value).startswith(f"{name} is {value}: expected a ")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"{name} is {value}: expected a "):
        FILTERS[name][0](value)


def test_a_filter_has_no_temperature_zero():
    with pytest.raises(InputError, match=r"temperature is 0\.0: expected a number above 0$"):
        S.temperature(0.0)
    with pytest.raises(InputError, match=r"temperature is -1\.0: expected a number above 0, or 0 for greedy$"):
        S.SamplingParams(-1.0)


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_with_nothing_to_draw_is_an_error(bad: float, drawn: bool):
    logits = torch.zeros(3, 4)
    logits[1] = bad
    with pytest.raises(InputError, match=f"row 1 has a largest logit of {bad}: expected a finite number") as caught:
        S.sample(logits, keys_of_rows(3) if drawn else None)
    assert "\n" not in str(caught.value)


def test_keys_are_one_a_row():
    with pytest.raises(InputError, match="2 keys for 3 rows: expected one for each row"):
        S.sample(torch.zeros(3, 4), keys_of_rows(2))
