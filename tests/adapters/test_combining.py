"""Combinations mean the combination of what their members mean, whatever their kinds; against PEFT, SVD and by hand."""

from typing import Any

import pytest
import torch
from builders import close, same, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch.func import grad

import fgpt
from fgpt.adapter_combining import combine, nearest_lora, task_vector, truncate_rank
from fgpt.tree import astype, leaves, tree_map

BASE: Any = tiny()
UNTIED = tiny(tie_word_embeddings=False)
Q = "blocks.0.attn.q"
LAYERS = r"blocks\..*\.(q|v|down)"


def make(kind: str, seed: int, params: Any = BASE) -> Any:
    """Adapters of a kind, none of which is the identity."""
    rng = fgpt.key(seed)
    kinds = {
        "lora": lambda: fgpt.lora(params, rng, 1 + seed % 3, target=LAYERS),
        "rslora": lambda: fgpt.lora(params, rng, 4, alpha=3, target=LAYERS, rs=True, dropout=0.1),
        "dora": lambda: fgpt.dora(params, rng, 2, target=r"blocks\.0.*\.(q|up)"),
        "ia3": lambda: fgpt.ia3(params),
        "leaves": lambda: fgpt.trainable_leaves(params, r".*ln_.*|blocks\.1\.attn\.q\..*"),
        "tokens": lambda: fgpt.trainable_tokens(params, [3, 5], target="wte"),
        "table": lambda: fgpt.trainable_leaves(params, r"wte\.w"),
        "wte": lambda: fgpt.lora(params, rng, 2, target="wte"),
        "head": lambda: {"head": fgpt.lora(UNTIED, rng, 2, target="head")["head"]},
    }
    return with_noise(kinds[kind](), seed=seed)


KINDS = ["lora", "rslora", "dora", "ia3", "leaves", "tokens", "table", "wte", "head"]
members = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.floats(-2, 2)), min_size=1, max_size=3)


def meaning(adapters: Any, params: Any = BASE) -> dict[str, torch.Tensor]:
    """Every leaf of the merged model in fp64, with a head of its own."""
    double = astype(params, torch.float64)
    merged: Any = fgpt.merge(fgpt.adapt(double, tree_map(torch.Tensor.double, adapters)))
    return leaves(merged if merged.head is not None else merged.untie())


@given(members)
def test_a_linear_combination_means_the_sum_of_the_changes(chosen: list[tuple[str, int, float]]):
    sets = [make(kind, seed) for kind, seed, _ in chosen]
    weights = [w for _, _, w in chosen]
    found, base = meaning(combine(BASE, sets, weights)), meaning({})
    changes = [meaning(x) for x in sets]
    for path, x in base.items():
        expected = x + sum(w * (changed[path] - x) for w, changed in zip(weights, changes, strict=True))
        torch.testing.assert_close(found[path], expected, atol=2e-6, rtol=0, msg=lambda m, p=path: f"{p}: {m}")


@given(members)
def test_the_order_does_not_matter(chosen: list[tuple[str, int, float]]):
    sets, weights = [make(kind, seed) for kind, seed, _ in chosen], [w for _, _, w in chosen]
    for method in ("linear", "ties"):
        forward = meaning(combine(BASE, sets, weights, method=method))  # pyright: ignore[reportArgumentType]
        backward = meaning(combine(BASE, sets[::-1], weights[::-1], method=method))  # pyright: ignore
        close(forward, backward, 2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_set_is_itself(kind: str):
    alone = make(kind, 1)
    close(meaning(combine(BASE, [alone], [1.0])), meaning(alone), 1e-6)
    if kind in ("lora", "rslora", "wte", "head"):
        assert combine(BASE, [alone], [1.0]) == alone  # the very same nodes
    close(meaning(combine(BASE, [alone], [1.0], method="ties", density=1.0)), meaning(alone), 1e-6)
    close(meaning(combine(BASE, [alone], [0.0])), meaning({}), 1e-6)


def test_loras_stay_loras_and_are_exact():
    first, second = make("lora", 1), make("rslora", 2)
    both: Any = combine(BASE, [first, second], [0.7, -0.2])
    assert {type(x) for x in both.values()} == {fgpt.LoRA}
    assert {len(x.a) for x in both.values()} == {2 + 4}
    x: Any = both[Q]
    expected = sum(w * y.scale * y.b @ y.a for w, y in ((0.7, first[Q]), (-0.2, second[Q])))
    close(x.scale * x.b @ x.a, expected, 1e-6)
    assert {len(x.a) for x in combine(BASE, [first, second], rank=3).values()} == {3}  # pyright: ignore


@given(st.integers(1, 7), st.integers(1, 9))
def test_truncation_is_that_of_the_svd(rank: int, limit: int):
    x = with_noise(fgpt.LoRA(torch.zeros(rank, 12), torch.zeros(9, rank), alpha=3.0), seed=rank)
    product = x.scale * x.b @ x.a
    u, s, vh = torch.linalg.svd(product.double(), full_matrices=False)
    best = (u[:, :limit] * s[:limit]) @ vh[:limit]
    for found in (truncate_rank(x, limit), nearest_lora(product, limit)):
        close(found.scale * found.b @ found.a, best.float(), 2e-6)
    assert truncate_rank(x, limit) is x or limit < rank


@given(st.integers(0, 99), st.sampled_from([0.1, 0.3, 0.7, 1.0]))
def test_ties_is_pefts(seed: int, density: float):
    """On one matrix, as PEFT trims each tensor by itself and the paper (and we) a whole task vector, and with equal
    weights, by which PEFT multiplies after it has elected signs.
    """
    changes = [0.1 * torch.randn(16, 16, generator=fgpt.key(seed + i)) for i in range(3)]
    weights = [0.6] * 3
    sets: Any = [{f"{Q}.w": BASE.blocks[0].attn.q.w + change} for change in changes]
    found = combine(BASE, sets, weights, method="ties", density=density)
    theirs = merge_utils.ties(changes, torch.tensor(weights), density, majority_sign_method="total")
    close(task_vector(BASE, found)[f"{Q}.w"], theirs, 1e-6)


def test_ties_trims_the_whole_vector():
    """Small changes of one layer go if another layer has larger ones."""
    small, large = torch.full((16, 16), 0.01), torch.full((16, 16), 1.0)
    base = {path: leaves(BASE)[f"{path}.w"] for path in (Q, "blocks.1.attn.q")}
    sets: Any = [{f"{Q}.w": base[Q] + small, "blocks.1.attn.q.w": base["blocks.1.attn.q"] + large}]
    vector = task_vector(BASE, combine(BASE, sets, [1.0], method="ties", density=0.5))
    assert not vector[f"{Q}.w"].any()
    close(vector["blocks.1.attn.q.w"], large, 1e-6)


@given(st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.9]))
def test_dare_keeps_a_share_and_scales_it_up(seed: int, density: float):
    sets = [make("lora", 1)]
    options: Any = {"method": "dare", "density": density, "rng": fgpt.key(seed)}
    found = task_vector(BASE, combine(BASE, sets, [1.0], **options))
    whole = task_vector(BASE, sets[0])
    kept = total = 0
    for path, x in whole.items():
        is_kept = found[path].abs() > 1e-7
        close(found[path], torch.where(is_kept, x / density, 0.0), 1e-5)
        kept, total = kept + int(is_kept.sum()), total + x.numel()
    assert abs(kept / total - density) < 5 * (density * (1 - density) / total) ** 0.5
    again = combine(BASE, sets, [1.0], **options | {"rng": fgpt.key(seed)})
    assert same(again, combine(BASE, sets, [1.0], **options))


def test_slerp_by_hand():
    """Between two changes at right angles, half way is both by √2; between parallel ones it is straight."""
    first, second = torch.zeros(2, 16, 16)
    first[0, 0], second[0, 1] = 0.5, 0.5
    w = BASE.blocks[0].attn.q.w
    sets: Any = [{f"{Q}.w": w + first}, {f"{Q}.w": w + second}]
    half = task_vector(BASE, combine(BASE, sets, [0.5, 0.5], method="slerp"))[f"{Q}.w"]
    close(half, (first + second) / 2**0.5, 1e-6)
    parallel: Any = [sets[0], {f"{Q}.w": w + 2 * first}]
    close(task_vector(BASE, combine(BASE, parallel, [0.5, 0.5], method="slerp"))[f"{Q}.w"], 1.5 * first, 1e-6)


@given(st.floats(0, 1))
def test_slerp_is_symmetric_and_ends_in_its_sets(t: float):
    sets = [make("lora", 1), make("dora", 2)]
    found = meaning(combine(BASE, sets, [1 - t, t], method="slerp"))
    close(found, meaning(combine(BASE, sets[::-1], [t, 1 - t], method="slerp")), 2e-6)
    for end, alone in ((0.0, sets[0]), (1.0, sets[1])):
        close(meaning(combine(BASE, sets, [1 - end, end], method="slerp")), meaning(alone), 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantized_base(kind: Any):
    """LoRAs combine as they are; for another combination a rank is needed, and the base stays quantized."""
    quantized = fgpt.quantize(tiny(d_model=64, d_mlp=64), kind)
    sets = [make("lora", 1, quantized), make("dora", 2, quantized)]
    with pytest.raises(fgpt.InputError, match="the base is quantized there: give a rank"):
        combine(quantized, sets)
    whole = fgpt.adapt(quantized, combine(quantized, sets, [0.6, 0.4], rank=64))
    plain = leaves(fgpt.merge(quantized, "dequantized"))
    merged = leaves(fgpt.merge(whole, "dequantized"))
    alone = [leaves(fgpt.merge(fgpt.adapt(quantized, x), "dequantized")) for x in sets]
    for path, x in plain.items():
        expected = x + 0.6 * (alone[0][path] - x) + 0.4 * (alone[1][path] - x)
        close(merged[path], expected, 1e-5)


def test_weights_can_be_differentiated():
    """The derivative of a loss by each weight, at each path, is that of central differences."""
    sets = [make("lora", 1), make("rslora", 2), make("dora", 3)]
    sets = [tree_map(torch.Tensor.double, x) for x in sets[:2]]
    base, text = astype(BASE, torch.float64), tokens(31, 2, 9)
    batch = fgpt.Batch(text[:, :-1], text[:, 1:], torch.ones(2, 8, dtype=torch.float64))

    def loss(weights: Any) -> torch.Tensor:
        return fgpt.nll(fgpt.adapt(base, combine(base, sets, weights)), batch)[0]

    weights: Any = {path: torch.tensor([0.3, 0.6], dtype=torch.float64) for path in sets[0] | sets[1]}
    found: Any = grad(loss)(weights)
    step = 1e-5
    for i in range(2):
        moved = [weights | {Q: weights[Q] + sign * step * torch.eye(2)[i].double()} for sign in (1, -1)]
        expected = (loss(moved[0]) - loss(moved[1])) / (2 * step)
        close(found[Q][i], expected, 1e-6, 1e-6)
    uniform: Any = grad(loss)(torch.tensor([0.3, 0.6], dtype=torch.float64))
    close(sum(found.values()), uniform, 1e-8)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "expected 2 finite numbers"),
        ({"weights": [1.0, float("nan")]}, "expected 2 finite numbers"),
        ({"density": 0.0}, "density is 0.0: expected a share above 0"),
        ({"rank": 0}, "rank is 0: expected 1 or more"),
        ({"method": "dare"}, "expected a key"),
        ({"method": "slerp", "weights": [0.7, 0.7]}, "with weights 1 - t and t"),
        ({"method": "ties", "weights": torch.ones(2)}, "are for linear"),
        ({"weights": {"x": torch.ones(2)}}, "no weights at"),
        ({"weights": torch.ones(3)}, "expected 2 weights"),
    ],
)
def test_what_does_not_fit(options: Any, message: str):
    with pytest.raises(fgpt.InputError, match=message):
        combine(BASE, [make("lora", 1), make("lora", 2)], **options)


def test_adapters_of_another_base():
    for kind in ("lora", "dora"):
        with pytest.raises(fgpt.InputError, match="fits a weight of"):
            combine(BASE, [make(kind, 1), make(kind, 1, tiny(d_model=32))])
    with pytest.raises(fgpt.InputError, match="no adapters to combine"):
        combine(BASE, [])
