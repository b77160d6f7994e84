"""GPT-2's tensors on the hub, and our tree.

The hub keeps OpenAI's layout: every block matrix is a Conv1D, [in, out], and q, k and v are one matrix, c_attn. Here
weights are [out, in] and split. A matrix that was quantised on the way to the hub was transposed before, and is
[out, in] there too. This is the one place that knows.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fgpt.errors import InputError
from fgpt.kernels.quantised import BLOCK, QUANTISED, Blockwise8, FourBit, Quantised
from fgpt.model import GPT, MLP, Attention, Block, Config, Embedding, FusedAttention, Linear, Norm, fused
from fgpt.tree import walk
from fgpt.weights import Adapted, shape

BUFFER_ENDINGS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old checkpoints carry; no parameters."""


def config_from_hf(config: Mapping[str, Any]) -> Config:
    """Our config of a hub `config.json`.

    Raises InputError where a field is missing or asks for an architecture that GPT-2 proper does not have.
    """
    missing = [
        k for k in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size") if not isinstance(config.get(k), int)
    ]
    if missing:
        raise InputError(f"config.json: expected whole numbers for {', '.join(missing)}")
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise InputError(f"config.json: {name}={config[name]} is not supported, expected {value}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise InputError(f"config.json: activation_function={activation!r} is not supported, expected 'gelu_new'")
    return Config(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        d_model=config["n_embd"],
        context=config["n_positions"],
        vocab=config["vocab_size"],
        d_mlp=config.get("n_inner") or 4 * config["n_embd"],
        eps=config.get("layer_norm_epsilon", 1e-5),
        tied=config.get("tie_word_embeddings", True),
    )


def config_to_hf(cfg: Config) -> dict[str, Any]:
    """The hub's `config.json` of our config."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": cfg.vocab,
        "n_positions": cfg.context,
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": None if cfg.d_mlp == 4 * cfg.d_model else cfg.d_mlp,
        "layer_norm_epsilon": cfg.eps,
        "tie_word_embeddings": cfg.tied,
        "bos_token_id": cfg.vocab - 1,
        "eos_token_id": cfg.vocab - 1,
    }


def shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the hub's layout, with its shape: what a file is held against before it is read."""
    d, m = cfg.d_model, cfg.d_mlp
    block = {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, m),
        "mlp.c_fc.bias": (m,),
        "mlp.c_proj.weight": (m, d),
        "mlp.c_proj.bias": (d,),
    }
    return {
        "wte.weight": (cfg.vocab, d),
        "wpe.weight": (cfg.context, d),
        **{f"h.{i}.{name}": shape for i in range(cfg.n_layer) for name, shape in block.items()},
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
        **({} if cfg.tied else {"lm_head.weight": (cfg.vocab, d)}),
    }


def plain_name(name: str) -> str | None:
    """A tensor's name without the `transformer.` that GPT2LMHeadModel's files have and GPT2Model's have not; None for a
    tensor that is no parameter.
    """
    return None if name.endswith(BUFFER_ENDINGS) else name.removeprefix("transformer.")


def from_hf(tensors: Mapping[str, Tensor | Quantised], cfg: Config) -> GPT:
    """Our tree of the hub's tensors (plain names). Transposed weights are views: no copy is made.

    A quantised c_attn is split where its blocks, and the blocks of quantised scales, end between q, k and v (for NF4
    with double quantisation, where d_model is a multiple of 128); else q, k and v stay one, as `fuse` makes them.

    Raises InputError where a tensor is missing, surplus, or of another shape.
    """
    expected = shapes(cfg)
    surplus = set(tensors) - set(expected) - ({"lm_head.weight"} if cfg.tied else set())
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"tensor {missing[0]} is missing ({len(missing)} in all): not a whole GPT-2 of this config")
    if surplus:
        raise InputError(f"tensor {min(surplus)} has no place in a GPT-2 of this config ({len(surplus)} in all)")
    for name, size in expected.items():
        x = tensors[name]
        want = size[::-1] if name.startswith("h.") and isinstance(x, QUANTISED) else size
        if tuple(x.shape) != want:
            raise InputError(f"tensor {name}: expected shape {list(want)}, got {list(x.shape)}")

    def plain(name: str) -> Tensor:
        x = tensors[name]
        if not isinstance(x, Tensor):
            raise InputError(f"tensor {name} is quantised; expected plain numbers")
        return x

    def norm(name: str) -> Norm:
        return Norm(plain(f"{name}.weight"), plain(f"{name}.bias"))

    def conv(name: str) -> Linear:
        w = tensors[f"{name}.weight"]
        return Linear(w.T if isinstance(w, Tensor) else w, plain(f"{name}.bias"))

    def attention(name: str) -> Attention | FusedAttention:
        c_attn, o = conv(f"{name}.c_attn"), conv(f"{name}.c_proj")
        w, b = c_attn.w, plain(f"{name}.c_attn.bias")
        parts = w.chunk(3) if isinstance(w, Tensor) else thirds(w) if isinstance(w, QUANTISED) else None
        if parts is None:
            return FusedAttention(c_attn, o)
        q, k, v = (Linear(p, bias) for p, bias in zip(parts, b.chunk(3), strict=True))
        return Attention(q, k, v, o)

    def block(h: str) -> Block:
        mlp = MLP(conv(f"{h}.mlp.c_fc"), conv(f"{h}.mlp.c_proj"))
        return Block(norm(f"{h}.ln_1"), attention(f"{h}.attn"), norm(f"{h}.ln_2"), mlp)

    return GPT(
        Embedding(tensors["wte.weight"]),
        Embedding(plain("wpe.weight")),
        tuple(block(f"h.{i}") for i in range(cfg.n_layer)),
        norm("ln_f"),
        None if cfg.tied else Linear(tensors["lm_head.weight"]),
        cfg,
    )


def thirds(w: Quantised) -> list[Any] | None:
    """The rows of `w` in three equal parts, still quantised as they are; None where a block lies across two parts."""
    per = w.block if isinstance(w, Blockwise8) else BLOCK if isinstance(w, FourBit) else w.shape[1]
    if w.shape.numel() % (3 * per):
        return None
    scales = list(w.absmax.chunk(3)) if isinstance(w.absmax, Tensor) else thirds(w.absmax)
    return scales and [replace(w, codes=c, absmax=a) for c, a in zip(w.codes.chunk(3), scales, strict=True)]


def check(params: GPT) -> None:
    """Raises InputError where a part of `params` has not the size that its config gives it."""
    cfg = params.cfg
    d, m = cfg.d_model, cfg.d_mlp
    sizes = {"wte": (cfg.vocab, d), "wpe": (cfg.context, d), "head": (cfg.vocab, d)}
    sizes |= {"q": (d, d), "k": (d, d), "v": (d, d), "qkv": (3 * d, d), "o": (d, d), "up": (m, d), "down": (d, m)}
    if len(params.blocks) != cfg.n_layer or (params.head is None) != cfg.tied or d % cfg.n_head:
        raise InputError(f"{len(params.blocks)} blocks, head {params.head is not None}: not a model of {cfg}")
    for path, x in walk(params):
        if isinstance(x, Linear | Embedding | Norm):
            want = sizes.get(path.rpartition(".")[2], (d,))
            got, bias = tuple(x.w.shape) if isinstance(x, Norm) else shape(x.w), getattr(x, "b", None)
            if got != want:
                raise InputError(f"{path}.w: expected shape {list(want)}, got {list(got)}")
            if bias is not None and tuple(bias.shape) != want[:1]:
                raise InputError(f"{path}.b: expected shape {list(want[:1])}, got {list(bias.shape)}")
            if isinstance(x.w, Tensor) and not x.w.is_floating_point():
                raise InputError(f"{path}.w: expected a floating dtype, got {x.w.dtype}")


def to_hf(params: GPT) -> dict[str, Tensor]:
    """The hub's tensors of our tree, plain names. Raises InputError for a tree that still carries adapters."""
    tensors: dict[str, Tensor] = {}
    if adapted := [path for path, x in walk(params) if isinstance(x, Adapted)]:
        raise InputError(f"{adapted[0]} still carries an adapter: merge(params) first")

    def put(name: str, p: Linear | Norm | Embedding, transposed: bool = False) -> None:
        assert isinstance(p.w, Tensor)
        tensors[f"{name}.weight"] = p.w.T if transposed else p.w
        if not isinstance(p, Embedding) and p.b is not None:
            tensors[f"{name}.bias"] = p.b

    put("wte", params.wte)
    put("wpe", params.wpe)
    for i, p in enumerate(params.blocks):
        h = f"h.{i}"
        put(f"{h}.ln_1", p.ln_1)
        put(f"{h}.attn.c_attn", fused(p.attn), transposed=True)
        put(f"{h}.attn.c_proj", p.attn.o, transposed=True)
        put(f"{h}.ln_2", p.ln_2)
        put(f"{h}.mlp.c_fc", p.mlp.up, transposed=True)
        put(f"{h}.mlp.c_proj", p.mlp.down, transposed=True)
    put("ln_f", params.ln_f)
    if params.head is not None:
        put("lm_head", params.head)
    return tensors
