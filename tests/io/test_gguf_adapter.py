"""GGUF files of LoRAs: a model's file with its LoRA's is the file of the merged model, and llama.cpp computes so."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders import close, tiny, tokens, with_noise
from builders.gguf_files import MODELS, random_model

import fgpt
from fgpt.io.gguf_header import read_header

TOKENS = tokens(48, 20)
TARGETS = {
    "all": r"blocks\..*\.(q|k|v|o|up|down|gate)",
    "k and v": r"blocks\..*\.(k|v)",
}


def model_and_lora(name: str, target: str, folder: Path) -> tuple[fgpt.GPT, Any]:
    model = random_model(MODELS[name][1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.2)
    model.save_pretrained(folder)
    params = fgpt.load(folder)
    lora = fgpt.lora(params, fgpt.key(0), rank=3, alpha=5, target=TARGETS[target])
    wide = fgpt.lora(params, fgpt.key(1), rank=4, alpha=2, rs=True, target=r"blocks\.1\..*\.o")
    return params, with_noise(lora | wide, std=0.1)


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_of_both_files_is_the_merged_model(name: str, target: str, tmp_path: Path):
    params, adapters = model_and_lora(name, target, tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "base.gguf", type="f32")
    fgpt.save_gguf(fgpt.merge(fgpt.adapt(params, adapters)), tmp_path / "merged.gguf", type="f32")
    fgpt.save_gguf_adapter(adapters, params, tmp_path / "lora.gguf")
    fields, lora = read_header(tmp_path / "lora.gguf").fields, arrays(tmp_path / "lora.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    base, merged = arrays(tmp_path / "base.gguf"), arrays(tmp_path / "merged.gguf")
    changed = {key for key, x in base.items() if not np.array_equal(x, merged[key])}
    assert {key.rpartition(".")[0] for key in lora} == changed
    for key in changed:
        a, b = lora[f"{key}.lora_a"], lora[f"{key}.lora_b"]
        change = fields["adapter.lora.alpha"] / len(a) * b @ a
        np.testing.assert_allclose(base[key] + change, merged[key], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_adds_the_lora(name: str, tmp_path: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    params, adapters = model_and_lora(name, "all", tmp_path / "hub")
    fgpt.save_gguf(params, tmp_path / "base.gguf", type="f32")
    fgpt.save_gguf_adapter(adapters, params, tmp_path / "lora.gguf")
    options: dict[str, Any] = {"n_ctx": 64, "logits_all": True, "verbose": False, "n_threads": 1}
    model = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=str(tmp_path / "lora.gguf"), **options)
    model.eval(TOKENS.tolist())
    expected = fgpt.apply(fgpt.adapt(params, adapters), TOKENS)
    assert (expected - fgpt.apply(params, TOKENS)).std() > 0.1 * expected.std()
    close(torch.from_numpy(np.array(model.scores[: len(TOKENS)])), expected, 5e-3 * float(expected.std()))
    model.close()


def test_over_a_quantized_base(tmp_path: Path):
    params = tiny()
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), rank=2))
    for name, base in (("plain", params), ("int8", fgpt.quantize(params, "int8"))):
        fgpt.save_gguf_adapter(adapters, base, tmp_path / name)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "int8").read_bytes()


REFUSED: dict[str, tuple[Any, str]] = {
    "dora": (lambda p: fgpt.dora(p, fgpt.key(0), rank=2), "this is DoRA: merge it and write"),
    "ia3": (lambda p: fgpt.ia3(p), "this is IA3: merge it"),
    "the embedding": (lambda p: fgpt.lora(p, fgpt.key(0), rank=2, target="wte"), "there is transformer.wte"),
    "norms beside": (
        lambda p: fgpt.lora(p, fgpt.key(0), rank=2) | fgpt.trainable_leaves(p, r".*ln_1.*"),
        "on linear layers alone, and there is",
    ),
    "biases": (lambda p: fgpt.trainable_leaves(p, r".*\.q\.b"), "save_adapters(adapters, path) keeps it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_of_a_linear_layer(name: str, tmp_path: Path):
    make, message = REFUSED[name]
    params = tiny()
    with pytest.raises(fgpt.InputError) as error:
        fgpt.save_gguf_adapter(make(params), params, tmp_path / "a.gguf")
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []
