"""The results of an evaluation by name, and as a table."""

import math
from collections.abc import Mapping
from typing import TypeAlias

from rich.table import Table

from fgpt.cli.console import result_console

Metrics: TypeAlias = dict[str, float | int | None]
"""By name; None is infinity."""


def print_metrics(title: str, counts: Mapping[str, int], values: Mapping[str, float]) -> Metrics:
    """Print both, and return them as one."""
    table = Table("", title, title_justify="left")
    table.columns[1].justify = "right"
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    table.add_section()
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}" if value < 1e6 else f"{value:.4g}")
    result_console.print(table)
    return {**counts, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
