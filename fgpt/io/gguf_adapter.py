"""GGUF files of LoRAs alone, which llama.cpp adds to a model's file: `llama-cli -m MODEL.gguf --lora ADAPTER.gguf`.

    general.type "adapter"    adapter.type "lora"    adapter.lora.alpha
    NAME.lora_a [rank, in], NAME.lora_b [out, rank] of the model's tensor NAME:  W' = W + (alpha / rank) B A

All have one rank and one alpha, as in PEFT's files: q, k and v that are one matrix there are one LoRA. The rows of B
lie as those of W do in the file.

Source: github.com/ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fgpt import families
from fgpt._typing import StrPath
from fgpt.adapter_types import Adapters
from fgpt.errors import InputError
from fgpt.extras import require_extra
from fgpt.io.gguf import Source, sources_of
from fgpt.io.gguf_header import read_header
from fgpt.io.gguf_writer import FileTensor, architecture, file_type_fields, write_gguf_file
from fgpt.io.peft.adapter_files import pack
from fgpt.io.peft.modules import PREFIX
from fgpt.model import GPT

LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


def save_gguf_adapter(
    adapters: Adapters, params: GPT, path: StrPath, metadata: Mapping[str, Any] | None = None
) -> None:
    r"""Write LoRAs of the model `params` as a GGUF file, in fp32.

    Args:
        adapters: LoRAs on linear layers. On the head of a tied model there is none in llama.cpp, nor on the embedding.
        params: The model that they fit, quantized or not.
        path: The file, replaced as a whole.
        metadata: Further keys, such as {"general.name": "mine"}.

    Raises:
        InputError: for a model that llama.cpp has no architecture for, for other adapters than LoRAs on linear layers,
            and without the package gguf.

    >>> import tempfile, fgpt
    >>> from fgpt.io.gguf_header import read_header
    >>> params = fgpt.load("nano")
    >>> adapters = fgpt.lora(params, fgpt.key(0), rank=2, alpha=4, target=r"blocks\.0\.mlp\.up")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fgpt.save_gguf_adapter(adapters, params, f"{folder}/lora.gguf")
    ...     file = read_header(Path(folder) / "lora.gguf")
    >>> file.fields["adapter.lora.alpha"], {name: x.shape for name, x in file.entries.items()}
    (4.0, {'blk.0.ffn_up.weight.lora_a': (2, 256), 'blk.0.ffn_up.weight.lora_b': (1024, 2)})
    """
    require_extra("gguf", "GGUF files", "gguf")
    arch, cfg = architecture(params.cfg)
    packed = pack(adapters, params, "")
    if packed.config["peft_type"] != "LORA" or packed.config.get("use_dora"):
        kind = "DoRA" if packed.config.get("use_dora") else packed.config["peft_type"]
        raise InputError(f"a GGUF file holds LoRAs alone, and this is {kind}: merge it and write the model")
    sources = sources_of(families.family_of(cfg).config_to_hf(cfg), arch)
    tensors = dict(_lora_tensor(name.removeprefix(PREFIX), x, sources) for name, x in packed.tensors.items())
    fields = {"general.architecture": arch, "general.type": "adapter", "adapter.type": "lora"}
    fields |= {"adapter.lora.alpha": float(packed.config["lora_alpha"])} | file_type_fields("f32")
    write_gguf_file(Path(path), fields | dict(metadata or {}), tensors, read_header)


def _lora_tensor(name: str, x: Tensor, sources: Mapping[str, Source]) -> tuple[str, FileTensor]:
    """A tensor of PEFT's by its name in the file. Raises InputError if it is not that of a LoRA on a linear layer."""
    match = LORA.fullmatch(name)
    source = sources.get(f"{match['module']}.weight") if match else None
    if match is None or source is None:
        raise InputError(
            f"a GGUF file holds LoRAs on linear layers alone, and there is {name}: merge it and write the model"
        )
    if match["part"] == "B" and source.order and not source.order.is_transposed:
        x = source.order.to_file(x)
    x = x.detach().float().cpu()
    return f"{source.name}.lora_{match['part'].lower()}", FileTensor("F32", tuple(x.shape), lambda: x)
