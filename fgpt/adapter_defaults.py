"""The defaults of adapters, for the library and for recipes: what PEFT, TRL and the measurements of LoRA agree on.

rank      8                  PEFT's r; TRL's lora_r is 16
alpha     2 · rank           s = 2, as TRL's lora_alpha 32 of rank 16; PEFT's lora_alpha is 8, s = 1
target    every matrix of    Schulman et al. 2025, "LoRA Without Regret": attention alone learns less than all matrices
          a block            at any rank; PEFT's "all-linear", which leaves out the head as well
dropout   0                  PEFT's lora_dropout; TRL's is 0.05
"""

RANK = 8
ALPHA_PER_RANK = 2.0
ATTENTION = r"blocks\..*\.(q|k|v|o)"
"""The matrices of attention, where q, k and v are matrices of their own."""
TARGET = r"blocks\..*\.(q|k|v|qkv|o|gate|up|down)"
"""Every matrix of a block, whatever its family."""


def default_alpha(rank: int) -> float:
    """The strength of an adapter of a rank, if none is given.

    >>> default_alpha(8)
    16.0
    """
    return ALPHA_PER_RANK * rank
