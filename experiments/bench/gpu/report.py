"""What the sections measure: printed line by line, kept for the table at the end, and written as JSON."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpt.io.files import write_json


@dataclass
class Report:
    """Measurements by section, and how much of the time limit is left."""

    minutes: float
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.perf_counter() - self.start)

    def add(self, section: str, what: str, value: Any) -> None:
        self.values.setdefault(section, {})[what] = value
        print(f"{section}  {what}: {value}", flush=True)

    def write(self, folder: str | None) -> None:
        """Into gpu.json in `folder`, after each section: a run that is cut off leaves what it has."""
        if folder:
            write_json(Path(folder) / "gpu.json", self.values)

    def table(self) -> str:
        """All measurements as a Markdown table."""
        rows = [f"| {section} | {what} | {value} |" for section in self.values for what, value in self.of(section)]
        return "\n".join(["| section | what | measured |", "|---|---|---|", *rows])

    def of(self, section: str) -> list[tuple[str, Any]]:
        return list(self.values[section].items())


def out_folder() -> str | None:
    """Where gpu.json goes: $OUT, if it is set."""
    return os.environ.get("OUT")
