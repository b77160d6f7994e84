"""A classifier is the same tree with another head: logits and gradients."""

from pathlib import Path

import pytest
import torch
from builders import same, tiny
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import fgpt
from fgpt.cli.inference.classifiers import (
    log_probabilities,
)
from fgpt.data.classification_prompts import (
    class_labels,
)
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.tree import leaves


def test_a_classifier_is_the_same_tree_with_another_head():
    base = tiny()
    params = fgpt.with_classification_head(base, 3, fgpt.key(0))
    assert leaves(params).keys() - leaves(base).keys() == {"head.w"}
    assert all(x is leaves(base)[path] for path, x in leaves(params).items() if path != "head.w")
    assert params.cfg.vocab_size == base.cfg.vocab_size
    assert not params.cfg.tie_word_embeddings
    assert fgpt.apply(params, torch.tensor([[1, 2]])).shape == (1, 2, 3)
    assert same(params, fgpt.with_classification_head(base, 3, fgpt.key(0)))
    large = fgpt.with_classification_head(tiny(d_model=256, n_head=4), 100, fgpt.key(0)).head
    assert large is not None
    assert float(large.w.std()) == pytest.approx(0.02, rel=0.05)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="num_classes is 0: expected 1 or more"):
        fgpt.with_classification_head(base, 0, fgpt.key(0))


def test_logits_are_those_of_transformers(tmp_path: Path):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=31, pad_token_id=0)
    config.num_labels = 5
    reference = GPT2ForSequenceClassification(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    model = GPT2LMHeadModel(config)
    model.transformer.load_state_dict(reference.transformer.state_dict())
    model.save_pretrained(tmp_path)
    params = fgpt.with_classification_head(fgpt.load(str(tmp_path)), 5, fgpt.key(0))
    params = fgpt.adapt(params, {"head.w": reference.score.weight.detach()})
    lengths = (7, 24, 1)
    texts = [torch.randint(1, 31, (n,), generator=rng).tolist() for n in lengths]
    padded = torch.tensor([text + [0] * (24 - len(text)) for text in texts])
    expected = reference(padded, attention_mask=torch.tensor([[1] * n + [0] * (24 - n) for n in lengths])).logits
    examples = [Example.classification(tuple(text), 0) for text in texts]
    found = log_probabilities(params, examples, class_labels("abcde"), 24)
    torch.testing.assert_close(found, expected.detach().log_softmax(-1), atol=1e-5, rtol=0)


def test_gradient_is_that_of_cross_entropy_at_the_last_tokens():
    params = fgpt.with_classification_head(tiny(), 3, fgpt.key(0))
    texts = [((1, 2, 3), 0), ((4, 5), 2), ((6, 7, 8, 9), 1)]
    batch = collate([[Example.classification(tokens, label) for tokens, label in texts]])
    trained = fgpt.trainable_leaves(params, r"head\..*") | fgpt.trainable_leaves(params, r".*ln_.*")
    got = torch.func.grad(lambda a: fgpt.loss(fgpt.adapt(params, a), batch))(trained)

    def plainly(a: fgpt.Adapters) -> torch.Tensor:
        each = [fgpt.apply(fgpt.adapt(params, a), torch.tensor([tokens]))[0, -1] for tokens, _ in texts]
        return torch.nn.functional.cross_entropy(torch.stack(each), torch.tensor([label for _, label in texts]))

    expected = torch.func.grad(plainly)(trained)
    for path, x in got.items():
        torch.testing.assert_close(x, expected[path], atol=1e-6, rtol=1e-4)
