"""What the shapes of a GPT's leaves do not say."""

from dataclasses import dataclass
from typing import Literal

from fgpt.kernels.rotary import DynamicScaling, RopeScaling, YarnScaling


@dataclass(frozen=True)
class Config:
    """What the shapes do not say, and what `init` needs. Lives in the tree's structure as `params.cfg`."""

    n_layer: int
    n_head: int
    d_model: int
    n_ctx: int
    """Most positions a row may have."""
    vocab_size: int
    d_mlp: int
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    tie_word_embeddings: bool = True
    """The head is the embedding table."""
    n_kv: int | None = None
    """Heads of k and v, each shared by n_head / n_kv heads of q; None has one for each."""
    d_head: int | None = None
    """None divides d_model among the heads."""
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"] = "gelu_tanh"
    norm_type: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    """q and k are normed, head by head."""
    gated_mlp: bool = False
    parallel_residual: bool = False
    """Attention and MLP read the same x, and are added to it together."""
    n_norms: Literal[1, 2] = 2
    """Norms of a block: where there is one, both branches read it."""
    biases: str = "q k v o up down norm"
    """Layers that have a bias."""
    rotary_dim: int = 0
    """Components of a head that are rotated by position; 0 adds learned positions instead."""
    interleaved: bool = False
    """Rotated pairs are neighbors, and not one of each half."""
    rope_theta: float = 10000.0
    """Of the rotation's angles."""
    rope_scaling: RopeScaling | YarnScaling | DynamicScaling | None = None
    """How the angles are slowed for a longer context."""
    sliding_window: int | None = None
    """Most tokens that a token attends to, itself and those before it; None is all of them."""
    full_layers: tuple[int, ...] = ()
    """Layers without the window."""
    scale_attn_weights: bool = True
    """Scores are divided by the square root of a head's size."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Scores of layer i, counted from 0, are divided by i + 1."""

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv or self.n_head

    @property
    def cached_context(self) -> int:
        """Most positions that a row may have whose keys are kept for later tokens."""
        return self.rope_scaling.context if isinstance(self.rope_scaling, DynamicScaling) else self.n_ctx

    def score_scale(self, layer: int) -> float:
        """What a layer's scores are multiplied by, beside 1 / sqrt(d_head)."""
        scale = 1.0 if self.scale_attn_weights else self.head_size**0.5
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
