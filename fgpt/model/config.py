"""What the shapes of a GPT's leaves do not say."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fgpt.kernels.rotary import DynamicScaling, RopeScaling, YarnScaling

BIASES = frozenset({"q", "k", "v", "o", "up", "down", "gate", "norm", "head"})
"""The layers that may have a bias."""

Activation: TypeAlias = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
NormType: TypeAlias = Literal["layer", "rms"]
NumNorms: TypeAlias = Literal[1, 2]


@dataclass(frozen=True)
class Config:
    """What the shapes do not say, and what `init` needs. It lives in the treespec, as `params.cfg`.

    >>> import fgpt
    >>> fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=10, d_mlp=32).head_size
    4
    """

    n_layer: int
    n_head: int
    d_model: int
    n_ctx: int
    """The maximum number of positions in a row."""
    vocab_size: int
    d_mlp: int
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding table."""
    n_kv: int | None = None
    """Heads of k and v, each shared by n_head / n_kv heads of q; None means n_head."""
    d_head: int | None = None
    """The size of a head; None means d_model / n_head."""
    activation: Activation = "gelu_tanh"
    norm_type: NormType = "layer"
    qk_norm: bool = False
    """Whether q and k are normalized, head by head."""
    gated_mlp: bool = False
    parallel_residual: bool = False
    """Whether attention and MLP read the same x and are added to it together."""
    n_norms: NumNorms = 2
    """Norms of a block; if there is one, both branches read it."""
    biases: frozenset[str] = frozenset({"q", "k", "v", "o", "up", "down", "norm"})
    """Layers that have a bias: names of BIASES."""
    rotary_dim: int = 0
    """Components of a head that are rotated by position; 0 means learned positions instead."""
    interleaved: bool = False
    """Whether rotated pairs are neighbors, as in GPT-J, instead of one component of each half."""
    rope_theta: float = 10000.0
    """The base of the rotation's angles."""
    rope_scaling: RopeScaling | YarnScaling | DynamicScaling | None = None
    """How the angles are scaled for a longer context."""
    sliding_window: int | None = None
    """How many tokens a token attends to at most, itself and those before it; None means all of them."""
    full_layers: tuple[int, ...] = ()
    """Indices of the layers without the sliding window."""
    scale_attn_weights: bool = True
    """Whether scores are divided by the square root of the size of a head."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Whether scores of layer i, counted from 0, are divided by i + 1."""

    @property
    def head_size(self) -> int:
        return self.d_head or self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv or self.n_head

    @property
    def cached_context(self) -> int:
        """The maximum number of positions in a row whose keys are cached."""
        return self.rope_scaling.context if isinstance(self.rope_scaling, DynamicScaling) else self.n_ctx

    def score_scale(self, layer: int) -> float:
        """The factor of a layer's scores besides 1 / sqrt(d_head)."""
        scale = 1.0 if self.scale_attn_weights else self.head_size**0.5
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale
