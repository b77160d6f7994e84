"""The GPT: a tree of nodes (`params`), what its shapes do not say (`config`), pure functions of it (`forward`),
functions of its activations (`taps`), and the keys and values that generation keeps (`cache`).
"""

from fgpt.model.cache import KVCache, LayerKV, StaticLayerCache
from fgpt.model.config import Config
from fgpt.model.forward import (
    BlockFunction,
    apply,
    block_functions,
    final_norm,
    forward_with_cache,
    hidden,
    hidden_after,
    hidden_at,
    lm_head,
    logits,
    trace,
    transformer_layers,
)
from fgpt.model.params import (
    GPT,
    MLP,
    Attention,
    Block,
    Embedding,
    EmbeddingNoise,
    FusedAttention,
    Linear,
    Norm,
    RMSNorm,
    abstract_params,
    fuse_qkv,
    fused_qkv,
    init,
)
from fgpt.model.shared_prompts import SharedPrompts, pad_prompts
from fgpt.model.taps import Tap

__all__ = [
    "GPT",
    "MLP",
    "Attention",
    "Block",
    "BlockFunction",
    "Config",
    "Embedding",
    "EmbeddingNoise",
    "FusedAttention",
    "KVCache",
    "LayerKV",
    "Linear",
    "Norm",
    "RMSNorm",
    "SharedPrompts",
    "StaticLayerCache",
    "Tap",
    "abstract_params",
    "apply",
    "block_functions",
    "final_norm",
    "forward_with_cache",
    "fuse_qkv",
    "fused_qkv",
    "hidden",
    "hidden_after",
    "hidden_at",
    "init",
    "lm_head",
    "logits",
    "pad_prompts",
    "trace",
    "transformer_layers",
]
