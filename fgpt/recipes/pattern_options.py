"""Options that give values by regular expressions: REGEX=VALUE .., as rank_pattern and lr_multipliers are written."""

import math
from collections.abc import Sequence

from fgpt.errors import InputError, short_repr
from fgpt.patterns import matching


def parse_patterns(texts: Sequence[str], option: str, example: str) -> dict[str, float]:
    """The values by their regular expressions; the value is what follows the last equals sign.

    Args:
        texts: Each as REGEX=VALUE.
        option: The name of the option, for errors.
        example: One of its values, for errors.

    Raises:
        InputError: for a text without a number above 0, or a regular expression that is none.

    >>> parse_patterns([r".*[.]q=16"], "rank_pattern", ".*q=16")
    {'.*[.]q': 16.0}
    """
    values: dict[str, float] = {}
    for text in texts:
        pattern, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not pattern or not 0 < value < math.inf:
            raise InputError(f"{option} {short_repr(text)}: expected REGEX=NUMBER, a number above 0, such as {example}")
        matching(pattern, [], option)
        values[pattern] = value
    return values
