"""What every recipe has, whatever it trains: a name, where it runs and writes, and how it is checkpointed."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fgpt.ranges import NonNegativeFloat, PositiveInt, Seed


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Training that leaves a run directory and can be resumed."""

    kind: ClassVar[str]
    """What run.json calls recipes of this class."""

    name: str
    """Of the run directory; -2, -3, .. is added if it exists."""
    eval_every: PositiveInt | Literal["auto"] | None = None
    """Steps from one evaluation (held-out loss) to the next; the best state is checkpointed too. auto evaluates ten
    times if there are held-out examples and 20 steps or more. None computes none."""
    keep_best: bool = False
    """Leave the state of the lowest held-out loss as the result, not the last one; needs eval_every."""
    early_stopping_patience: PositiveInt | None = None
    """End the training after so many evaluations without a lower held-out loss; needs eval_every. None trains to the
    end."""
    checkpoint_every_minutes: NonNegativeFloat = 2.0
    """Minutes of training from one checkpoint to the next, for --resume; 0 writes one after each step."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints to keep, besides the best one."""
    tracker: Literal["wandb", "trackio"] | None = None
    """Log the metrics there too; a TensorBoard log is always written."""
    device: str = "auto"
    """auto takes cuda if there is one, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the activations and of a frozen base; what is trained and the optimizer's state are float32. auto takes
    bfloat16 on a GPU that multiplies it, else float32, and the run records which it took. float32 is never TF32."""
    deterministic: bool = False
    """Give equal bits for equal steps on a GPU too, where sums are otherwise added in any order; it costs speed. On a
    CPU it changes nothing: equal steps give equal bits there."""
    seed: Seed = 0
    """Of initialization, the order of examples and dropout."""
    out: Path = Path("runs")
    """The folder of run directories."""

    def suggest_use(self, folder: Path) -> str:
        """What a run of this recipe can be used for, in errors about a run of another kind.

        Args:
            folder: The run directory.
        """
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON: a path is a string, a tuple a list.

        >>> from fgpt.recipes import find
        >>> find("lora-nano").to_json()["adapter"]["rank"]
        16
        """
        return json.loads(json.dumps(asdict(self), default=os.fspath))
