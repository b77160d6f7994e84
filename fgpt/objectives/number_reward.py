"""The reward of a worked answer to a sum: whether its last number is the right one, as GSM8K's answers end."""

import re
from fractions import Fraction

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*)?\.?\d+(?:/\d+)?")
"""A minus after a number or a word is a subtraction or a hyphen."""


def final_number(text: str) -> Fraction | None:
    """The number after the last "####", or else the last number of a text; None if there is none.

    >>> final_number("He pays 3 + 4 = 7 dollars. #### $1,234.50"), final_number("It is 3, no, 4."), final_number("No.")
    (Fraction(2469, 2), Fraction(4, 1), None)
    """
    _, mark, end = text.rpartition("####")
    if mark:
        first = NUMBER.search(end)
        return _value(first[0]) if first else None
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Fraction | None:
    try:
        return Fraction(number.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def number_reward(reference: str, answer: str) -> float:
    """1 if the final number of an answer is that of the reference, else 0.

    Source: Cobbe et al. 2021 (GSM8K), section 2: the number after "####" is the answer.

    >>> number_reward("48 / 2 = 24. 48 + 24 = 72. #### 72", "In all there are 72.00 clips.")
    1.0
    """
    expected = final_number(reference)
    return float(expected is not None and final_number(answer) == expected)
