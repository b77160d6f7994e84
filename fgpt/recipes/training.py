"""What every run has, whatever it trains: its name, where it runs and writes, and how it lasts."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fgpt.ranges import NonNegativeFloat, PositiveInt, Seed


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Training that leaves a folder, and can be taken up again."""

    name: str
    eval_every: PositiveInt | None = None
    """Held-out loss each so many steps; its best state is kept too."""
    take: Literal["last", "best"] = "last"
    """What the run leaves: its last state, or of those that `evaluate` looked at the one of least held-out loss."""
    checkpoint_every_minutes: NonNegativeFloat = 2.0
    """Minutes of training from one checkpoint to the next, for --resume to go on from; 0 writes one after each step."""
    keep_checkpoints: PositiveInt = 2
    """The last so many checkpoints are kept, besides the best."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Send the figures there too; a TensorBoard log is written always."""
    device: str = "auto"
    """cuda where there is one, else cpu."""
    seed: Seed = 0
    out: Path = Path("runs")

    def to_json(self) -> dict[str, Any]:
        """The run as run.json reads back: paths are text, tuples are lists."""
        return json.loads(json.dumps(asdict(self), default=os.fspath))
