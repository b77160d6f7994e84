"""What a run can train: kinds of adapters, and what each does when it is not told otherwise."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["lora", "dora", "ia3", "ln", "bias", "full"]


@dataclass(frozen=True)
class Method:
    """What a kind of adapter does when it is not told otherwise."""

    target: str
    """Regular expression that must match the whole path of a layer (lora, dora, ia3), or of a leaf (the others)."""
    lr: float


METHODS: dict[Kind, Method] = {
    "lora": Method(r"blocks\..*\.(q|k|v|o)", 3e-4),
    "dora": Method(r"blocks\..*\.(q|k|v|o)", 3e-4),
    "ia3": Method(r"blocks\..*\.(k|v)", 3e-2),
    "ln": Method(r".*ln_.*", 2e-2),
    "bias": Method(r".*\.b", 2e-2),
    "full": Method(".*", 5e-5),
}


@dataclass(frozen=True)
class Adapter:
    """What is trained, and from where."""

    kind: Kind = "lora"
    """lora: a low-rank product beside each target layer. dora: that, and each row's magnitude apart. ia3: a scale for
    each key and value, and for each input of the MLP's second product. ln, bias, full: norms, biases, all leaves."""
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    """Of the input of each LoRA, while training."""
    target: str | None = None
    """Regular expression for the whole path of what is adapted or tuned; None takes the kind's own. For ia3, of the
    layers whose outputs are scaled."""

    @property
    def where(self) -> str:
        return METHODS[self.kind].target if self.target is None else self.target
