"""BERT's encoders in Hugging Face's layout: config.json and model.safetensors, as a params tree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgpt.errors import InputError, short_repr
from fgpt.io.files import read_json
from fgpt.io.models import CONFIG, WEIGHTS
from fgpt.io.safetensors_files import read_tensors, shards
from fgpt.model import MLP, Attention, Embedding, Linear, Norm
from fgpt.retrieval.encoder import Encoder, EncoderBlock

SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)
FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
}
"""The values of fields that ask for something else than `encode` computes."""
PREFIX = "bert."
"""What tensors' names begin with in a file of an encoder with a head."""


def load_encoder(folder: Path) -> Encoder:
    """The encoder of a folder, in fp32.

    Raises:
        InputError: if the folder holds no whole encoder of BERT's architecture.
    """
    config = read_json(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for path in shards(folder, WEIGHTS):
        tensors |= read_tensors(path)
    try:
        return encoder_from_hf(tensors, config)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from None


def encoder_from_hf(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Encoder:
    """The params tree of transformers' BertModel.

    Args:
        tensors: By transformers' names; those of a head and of the pooler are not read.
        config: The fields of config.json.

    Raises:
        InputError: for a config that asks for something else, and for a tensor that is missing or of another shape.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{CONFIG}: expected an object of fields, got {type(config).__name__}")
    for name, values in FIXED.items():
        if config.get(name) not in values:
            raise InputError(f"{name} is {short_repr(config.get(name))}: expected {values[0]!r}, an encoder of BERT's")
    for name in SIZES:
        if type(config.get(name)) is not int or config[name] < 1:
            raise InputError(f"{CONFIG}: {name} is {short_repr(config.get(name))}: expected an integer above 0")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise InputError(f"a width of {config['hidden_size']} does not divide into heads of one size")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"layer_norm_eps is {short_repr(eps)}: expected a small number above 0")
    d, m = config["hidden_size"], config["intermediate_size"]

    def tensor(name: str, *shape: int) -> Tensor:
        x = tensors.get(name, tensors.get(PREFIX + name))
        if x is None:
            raise InputError(f"there is no tensor {name}: expected the weights of an encoder of BERT's")
        if tuple(x.shape) != shape:
            raise InputError(f"tensor {name} has shape {list(x.shape)}: expected {list(shape)}")
        return x.to(torch.float32)

    def table(name: str, rows: int) -> Embedding:
        return Embedding(tensor(f"embeddings.{name}_embeddings.weight", rows, d))

    def layer(name: str, out: int, inp: int) -> Linear:
        return Linear(tensor(f"{name}.weight", out, inp), tensor(f"{name}.bias", out))

    def layer_norm(name: str) -> Norm:
        return Norm(tensor(f"{name}.LayerNorm.weight", d), tensor(f"{name}.LayerNorm.bias", d))

    def block(at: str) -> EncoderBlock:
        q, k, v = (layer(f"{at}.attention.self.{name}", d, d) for name in ("query", "key", "value"))
        return EncoderBlock(
            Attention(q, k, v, layer(f"{at}.attention.output.dense", d, d)),
            layer_norm(f"{at}.attention.output"),
            MLP(layer(f"{at}.intermediate.dense", m, d), layer(f"{at}.output.dense", d, m)),
            layer_norm(f"{at}.output"),
        )

    return Encoder(
        table("word", config["vocab_size"]),
        table("position", config["max_position_embeddings"]),
        table("token_type", config["type_vocab_size"]),
        layer_norm("embeddings"),
        tuple(block(f"encoder.layer.{i}") for i in range(config["num_hidden_layers"])),
        n_head=config["num_attention_heads"],
        norm_eps=eps,
    )
