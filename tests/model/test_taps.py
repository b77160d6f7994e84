"""Taps read and replace activations: explicit attention is the fast kernel, edits are edits of the tree, transforms
work through them.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import ROOT, close, same, stack_trees, tiny, tokens, with_noise
from torch import Tensor
from torch.func import grad, jvp, vmap

import fgpt
from fgpt import model as M
from fgpt.kernels import attention as A
from fgpt.model.taps import bind
from fgpt.tree import astype, replace_at

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "parallel": {"parallel_residual": True, "n_norms": 1, "rotary_dim": 4, "interleaved": True},
    "grouped heads": {"n_head": 4, "n_kv": 2, "rotary_dim": 4, "gated_mlp": True, "norm_type": "rms", "qk_norm": True},
    "window": {"sliding_window": 3, "full_layers": (1,), "rotary_dim": 8},
    "scaled scores": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}
SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
CU_SEQLENS = torch.tensor([[0, 3, 7, 9], [0, 9, 9, 9]])
MASKS: list[dict[str, Tensor]] = [{}, {"segments": SEGMENTS}, {"cu_seqlens": CU_SEQLENS}]
RESIDUAL = r"blocks\.\d+"


def unchanged(path: str, x: Tensor) -> Tensor:
    return x


# ------------------------------------------------------------------------------------------------ the fast kernel


@pytest.mark.parametrize("mask", MASKS, ids=["causal", "segments", "cu_seqlens"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("name", SHAPES)
def test_explicit_attention_is_the_fast_kernel(name: str, fused: bool, mask: dict[str, Tensor]):
    """Values, and gradients in fp64; and each head's output is its weights' mean of the values."""
    params, text = tiny(**SHAPES[name]), tokens(31, 2, 9)
    params = M.fuse_qkv(params) if fused else params
    tap = fgpt.Tap(unchanged, target=".*")
    close(fgpt.hidden(params, text, tap=tap, **mask), fgpt.hidden(params, text, **mask), 1e-5)
    precise = astype(params, torch.float64)
    direction = torch.randn(2, 9, 16, generator=fgpt.key(1), dtype=torch.float64)

    def loss(tree: Any, tap: fgpt.Tap | None) -> Tensor:
        return (direction * fgpt.hidden(fgpt.adapt(precise, tree), text, tap=tap, **mask)).sum()

    trainable = fgpt.trainable_leaves(precise, r"blocks\..*\.w")
    close(grad(loss)(trainable, tap), grad(loss)(trainable, None), 1e-10)
    _, activations = fgpt.trace(params, text, target=r"blocks\.\d\.attn\.(weights|v|z)", **mask)
    for i in range(2):
        weights, v, z = (activations[f"blocks.{i}.attn.{x}"] for x in ("weights", "v", "z"))
        close(weights.sum(-1), torch.ones(weights.shape[:-1]), 1e-6)
        close(z, weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1), 1e-5)
        if mask:
            visible = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]).tril()
            assert not weights.masked_select(~visible[:, None]).any()


@pytest.mark.parametrize("name", SHAPES)
def test_other_taps_leave_the_fast_kernel_and_every_bit(name: str):
    params, text = tiny(**SHAPES[name]), tokens(31, 2, 9)
    tap = fgpt.Tap(unchanged, target=r"(?!.*(scores|weights)).*")
    for mask in MASKS:
        assert torch.equal(fgpt.hidden(params, text, tap=tap, **mask), fgpt.hidden(params, text, **mask))


def test_attention_maps_are_computed_only_where_they_are_selected(monkeypatch: pytest.MonkeyPatch):
    params, text, calls = tiny(n_layer=3), tokens(31, 1, 5), []

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return A.reference(*args)

    monkeypatch.setattr("fgpt.model.forward.explicit_attention", count)
    fgpt.trace(params, text, target=r"(?!.*(scores|weights)).*")
    assert not calls
    fgpt.trace(params, text, target=r"blocks\.1\.attn\.weights")
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------------------- edits


@pytest.mark.parametrize("name", SHAPES)
def test_steering_is_a_bias_of_the_last_layer(name: str):
    params, text = tiny(**SHAPES[name]), tokens(31, 2, 9)
    v = torch.randn(16, generator=fgpt.key(0))
    bias = fgpt.adapt(params, {"blocks.0.mlp.down.b": params.blocks[0].mlp.down.b + v})
    for target in (r"blocks\.0", r"blocks\.0\.mlp"):
        close(fgpt.apply(params, text, tap=fgpt.Tap(lambda path, x: x + v, target)), fgpt.apply(bias, text), 1e-5)


def test_without_the_branches_a_block_is_the_identity():
    params, text = tiny(), tokens(31, 2, 9)
    ablation = fgpt.Tap(lambda path, x: torch.zeros_like(x), target=r"blocks\.1\.(attn|mlp)")
    shorter = replace_at(params, {"blocks": params.blocks[:1]})
    close(fgpt.apply(params, text, tap=ablation), fgpt.apply(shorter, text), 1e-6)


def test_heads_of_zeros_are_columns_of_zeros():
    params, text = tiny(), tokens(31, 2, 9)
    mask = torch.tensor([1.0, 0.0])[:, None, None]
    ablation = fgpt.Tap(lambda path, x: x * mask, target=r"blocks\.1\.attn\.z")
    columns = torch.tensor([1.0] * 8 + [0.0] * 8)
    pruned = replace_at(params, {"blocks.1.attn.o.w": params.blocks[1].attn.o.w * columns})
    close(fgpt.apply(params, text, tap=ablation), fgpt.apply(pruned, text), 1e-6)


def test_scores_are_edited_before_the_mask_and_weights_after_the_softmax():
    """A key whose scores are -inf is as absent; the mask holds whatever a tap returns."""
    params, text = tiny(n_layer=1), tokens(31, 1, 9)
    knockout = fgpt.Tap(lambda path, x: torch.where(torch.arange(9) == 2, -torch.inf, x), target=r".*\.scores")
    _, activations = fgpt.trace(params, text, target=r".*\.(weights|v|z)", tap=knockout)
    _, plain = fgpt.trace(params, text, target=r".*\.weights")
    weights, expected = activations["blocks.0.attn.weights"], plain["blocks.0.attn.weights"].clone()
    expected[..., 2] = 0.0
    rows = [i for i in range(9) if i != 2]
    close(weights[:, :, rows], (expected / expected.sum(-1, keepdim=True))[:, :, rows], 1e-6)
    high = fgpt.Tap(lambda path, x: torch.full_like(x, 7.0), target=r".*\.scores")
    _, activations = fgpt.trace(params, text, target=r".*\.weights", tap=high)
    close(activations["blocks.0.attn.weights"][0, 0], torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None], 1e-6)
    first = fgpt.Tap(lambda path, x: torch.zeros_like(x).index_fill(-1, torch.tensor(0), 1.0), target=r".*\.weights")
    _, activations = fgpt.trace(params, text, target=r".*\.(v|z)", tap=first)
    v, z = activations["blocks.0.attn.v"], activations["blocks.0.attn.z"]
    close(z, v[:, :, :1].expand_as(v), 1e-6)


def test_patching_the_whole_stream_of_a_layer_gives_the_other_prompt():
    params, clean, other = tiny(), tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
    _, donor = fgpt.trace(params, other, target=r"blocks\.0|embed")
    for path in ("embed", r"blocks\.0"):
        patch = fgpt.Tap(lambda path, x: donor[path], target=path)
        close(fgpt.apply(params, clean, tap=patch), fgpt.apply(params, other), 1e-6)
    at = torch.arange(9) == 4
    patch = fgpt.Tap(lambda path, x: torch.where(at[:, None], donor[path], x), target=r"blocks\.0")
    before, after = fgpt.apply(params, clean), fgpt.apply(params, clean, tap=patch)
    assert torch.equal(before[:, :4], after[:, :4])  # causal
    assert ((before - after).abs().amax((0, 2))[4:] > 1e-4).all()


def test_a_trace_is_of_what_the_tap_leaves():
    params, text = tiny(), tokens(31, 2, 9)
    tap = fgpt.Tap(lambda path, x: 2 * x, target=r"blocks\.0\.mlp|embed")
    h, edited = fgpt.trace(params, text, target=".*", tap=tap)
    _, plain = fgpt.trace(params, text, target=".*")
    close(h, fgpt.hidden(params, text, tap=tap), 1e-5)
    close(edited["embed"], 2 * plain["embed"], 0.0)
    stream = edited["embed"] + edited["blocks.0.attn"] + edited["blocks.0.mlp"]
    close(edited["blocks.0"], stream, 1e-6)
    normed = torch.nn.functional.layer_norm(
        edited["embed"] + edited["blocks.0.attn"], (16,), params.blocks[0].ln_2.w, params.blocks[0].ln_2.b
    )
    close(edited["blocks.0.ln_2"], normed, 1e-5)


# ---------------------------------------------------------------------------------------------------------- transforms


def patched_logits(params: fgpt.GPT, text: Tensor, donor: dict[str, Tensor], layer: Any, position: Any) -> Tensor:
    """The last logits, with one position of one layer's residual stream taken from another prompt."""

    def patch(path: str, x: Tensor) -> Tensor:
        is_here = (torch.arange(len(text)) == position) & (layer == int(path.split(".")[1]))
        return torch.where(is_here[:, None], donor[path], x)

    return fgpt.apply(params, text, tap=fgpt.Tap(patch, target=RESIDUAL))[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_causal_tracing_by_vmap_is_the_loop(name: str):
    params, text, other = tiny(**SHAPES[name]), tokens(31, 7), tokens(31, 7, seed=1)
    _, donor = fgpt.trace(params, other, target=RESIDUAL)
    pairs = list(itertools.product(range(2), range(7)))
    layers, positions = (torch.tensor(x) for x in zip(*pairs, strict=True))
    mapped = vmap(lambda i, t: patched_logits(params, text, donor, i, t))(layers, positions)
    loop = torch.stack([patched_logits(params, text, donor, i, t) for i, t in pairs])
    close(mapped, loop, 1e-5)
    close(mapped[-1], fgpt.apply(params, other)[-1], 1e-5)  # the last position of the last layer decides
    gradient = grad(lambda d: vmap(lambda i, t: patched_logits(params, text, d, i, t))(layers, positions).sum())(donor)
    expected = grad(lambda d: torch.stack([patched_logits(params, text, d, i, t) for i, t in pairs]).sum())(donor)
    close(gradient, expected, 1e-4)


def test_a_trace_is_pure_under_vmap_grad_and_jvp():
    """The dict that is made inside comes out, with no tensor of a level that has ended."""
    params, text = astype(tiny(), torch.float64), tokens(31, 3, 7)
    v = torch.randn(16, generator=fgpt.key(0), dtype=torch.float64)

    def activations(strength: Tensor, row: Tensor) -> dict[str, Tensor]:
        tap = fgpt.Tap(lambda path, x: x + strength * v, target=r"blocks\.0")
        return fgpt.trace(params, row, target=".*", tap=tap)[1]

    def loss(strength: Tensor, row: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        traced = activations(strength, row)
        return traced["ln_f"].square().sum() + traced["blocks.1.attn.weights"].square().sum(), traced

    one = torch.tensor(1.0, dtype=torch.float64)
    mapped = vmap(activations, (None, 0))(one, text)
    close(mapped, stack_trees([activations(one, row) for row in text]), 1e-12)
    slope, traced = grad(loss, has_aux=True)(one, text[0])
    close(traced, activations(one, text[0]), 1e-12)
    h = 1e-5
    ahead, behind = (loss(one + sign * h, text[0])[0] for sign in (1, -1))
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-7)
    _, tangents = jvp(lambda s: activations(s, text[0]), (one,), (one,))
    ahead, behind = (activations(one + sign * h, text[0]) for sign in (1, -1))
    for path, tangent in tangents.items():
        close(tangent, (ahead[path] - behind[path]) / (2 * h), 1e-7)
    close(tangents["blocks.0"], v.expand(7, 16), 1e-12)
    slopes = vmap(lambda row: jvp(lambda s: loss(s, row)[0], (one,), (one,))[1])(text)
    close(slopes, vmap(grad(lambda s, row: loss(s, row)[0]), (None, 0))(one, text), 1e-10)
    curvature = jvp(grad(lambda s: loss(s, text[0])[0]), (one,), (one,))[1]
    slopes = [grad(lambda s: loss(s, text[0])[0])(one + sign * h) for sign in (1, -1)]
    torch.testing.assert_close(curvature, (slopes[0] - slopes[1]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", [r"blocks\.\d", r"blocks\.1\.(attn\.weights|mlp)"])
def test_gradients_of_adapters_of_examples_and_of_a_stack(target: str):
    """vmap(grad) through a tap, over examples and over adapters, is the loop."""
    params, text = tiny(), tokens(31, 3, 7)
    trees = [with_noise(fgpt.lora(params, fgpt.key(i), 2, target=r".*\.(q|up)")) for i in range(3)]

    def loss(adapters: Any, row: Tensor, factor: Any = 0.5) -> Tensor:
        tap = fgpt.Tap(lambda path, x: x * factor, target)
        return fgpt.apply(fgpt.adapt(params, adapters), row, tap=tap).log_softmax(-1)[..., 3].sum()

    of_examples = vmap(grad(loss), (None, 0))(trees[0], text)
    close(of_examples, stack_trees([grad(loss)(trees[0], row) for row in text]), 1e-5)
    of_stack = vmap(grad(loss), (0, None))(stack_trees(trees), text[0])
    close(of_stack, stack_trees([grad(loss)(tree, text[0]) for tree in trees]), 1e-5)
    factors = torch.tensor([0.0, 0.5, 2.0])
    of_both = vmap(grad(loss, argnums=(0, 2)), (0, 0, 0))(stack_trees(trees), text, factors)
    loop = [grad(loss, argnums=(0, 2))(*x) for x in zip(trees, text, factors, strict=True)]
    close(of_both[0], stack_trees([x for x, _ in loop]), 1e-5)
    close(of_both[1], torch.stack([x for _, x in loop]), 1e-5, 1e-5)


# ----------------------------------------------------------------------------------------------- the rest of the model


@pytest.mark.parametrize("to", [None, "nf4", "int8"])
@pytest.mark.parametrize("kind", [fgpt.lora, fgpt.dora, fgpt.ia3])
def test_the_tap_sees_adapted_activations(kind: Callable[..., Any], to: Any):
    params, text = tiny(d_model=64, d_mlp=128), tokens(31, 2, 9)
    frozen = params if to is None else fgpt.quantize(params, to)
    options = {} if kind is fgpt.ia3 else {"rank": 2}
    adapters = with_noise(kind(frozen, fgpt.key(0), **options) if options else kind(frozen))
    adapted = fgpt.adapt(frozen, adapters)
    h, activations = fgpt.trace(adapted, text, target=".*")
    _, base = fgpt.trace(frozen, text, target=".*")
    _, expected = fgpt.trace(fgpt.merge(adapted, base="dequantized"), text, target=".*")
    close(h, fgpt.hidden(adapted, text), 1e-5)
    for path, x in activations.items():
        if to == "int8":  # which rounds its inputs, too
            assert (x - expected[path]).norm() < 5e-2 * expected[path].norm()
        else:
            close(x, expected[path], 1e-4)
    assert all(not torch.allclose(activations[f"blocks.1{x}"], base[f"blocks.1{x}"], atol=1e-2) for x in ("", ".mlp"))


def test_blocks_are_rematerialized_unless_they_are_tapped_inside():
    params, text, blocks = tiny(n_layer=3), tokens(31, 2, 9), []

    def count(x: Tensor, p: Any, *args: Any) -> Any:
        blocks.append([p is b for b in params.blocks].index(True))
        return M.forward.block(x, p, *args)

    for target, expected in ((r"blocks\.1", [0, 1, 2]), (r"blocks\.1\.mlp", [0, 2]), ("embed|ln_f", [0, 1, 2])):
        blocks.clear()
        bound = bind(fgpt.Tap(unchanged, target), params)
        M.transformer_layers(params, text, torch.arange(9), None, (None,) * 3, block_fn=count, tap=bound)
        assert blocks == expected


@pytest.mark.parametrize("target", [r"blocks\.\d", r"blocks\.1\.attn\.(weights|v)", ".*"])
def test_remat_changes_no_gradient(target: str):
    """What the tap reads is differentiated as well."""
    params, text = tiny(), tokens(31, 2, 9)
    adapters = with_noise(fgpt.lora(params, fgpt.key(0), 2))

    def loss(tree: Any, factor: Tensor, remat: bool) -> Tensor:
        tap = fgpt.Tap(lambda path, x: x * factor, target)
        return fgpt.hidden(fgpt.adapt(params, tree), text, remat=remat, tap=tap).pow(3).sum()

    factor = torch.tensor(0.9)
    close(grad(loss, (0, 1))(adapters, factor, True), grad(loss, (0, 1))(adapters, factor, False), 1e-4, 1e-5)


def test_chunks_with_a_cache_are_one_pass():
    params, text = tiny(**SHAPES["grouped heads"]), tokens(31, 2, 9)
    tap = fgpt.Tap(lambda path, x: x * x, target=r"blocks\.\d\.(attn\.(k|weights)|mlp)|embed")
    whole = fgpt.hidden(params, text, tap=tap)
    cache, parts = fgpt.KVCache(), []
    for chunk in text.split([4, 1, 4], 1):
        h, cache = fgpt.forward_with_cache(params, chunk, cache, tap=tap)
        parts.append(h)
    close(torch.cat(parts, 1), whole, 1e-5)


def test_a_trace_in_bf16():
    params, text = astype(tiny(), torch.bfloat16), tokens(31, 2, 9)
    _, activations = fgpt.trace(params, text, target=".*")
    scores = {path for path, x in activations.items() if x.dtype == torch.float32}
    assert scores == {"blocks.0.attn.scores", "blocks.1.attn.scores"}
    assert all(x.dtype == torch.bfloat16 for path, x in activations.items() if path not in scores)


def test_nothing_is_kept_between_calls():
    params, text = tiny(), tokens(31, 2, 9)
    first = fgpt.trace(params, text, target=RESIDUAL)[1]
    other = fgpt.trace(params, tokens(31, 2, 9, seed=1), target=RESIDUAL)[1]
    assert same(first, fgpt.trace(params, text, target=RESIDUAL)[1])
    assert not same(first, other)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("target", ["block.1.weights", r"transformer\.h\.1", r"blocks\.2", ""])
def test_a_selector_without_a_point_names_the_nearest(target: str):
    params, text = tiny(), tokens(31, 1, 5)
    for call in (
        lambda: fgpt.hidden(params, text, tap=fgpt.Tap(unchanged, target)),
        lambda: fgpt.apply(params, text, tap=fgpt.Tap(unchanged, target)),
        lambda: fgpt.forward_with_cache(params, text, fgpt.KVCache(), tap=fgpt.Tap(unchanged, target)),
        lambda: fgpt.trace(params, text, target=target),
        lambda: fgpt.trace(params, text, target=".*", tap=fgpt.Tap(unchanged, target)),
    ):
        with pytest.raises(fgpt.InputError, match=r"matches no path; nearest are (blocks|embed)") as err:
            call()
        assert "\n" not in str(err.value)


def test_one_norm_has_no_second_point():
    params = tiny(**SHAPES["parallel"])
    with pytest.raises(fgpt.InputError, match=r"nearest are .*ln_1"):
        fgpt.trace(params, tokens(31, 1, 5), target=r"blocks\.0\.ln_2")


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda x: x[:, :1], r"float32 \[2, 1, 16\] on cpu"),
        (lambda x: x.double(), r"float64 \[2, 9, 16\] on cpu"),
        (lambda x: None, "None"),
        (lambda x: x.to("meta"), r"float32 \[2, 9, 16\] on meta"),
    ],
)
def test_another_kind_of_tensor_is_one_line(change: Callable[[Tensor], Any], got: str):
    params, text = tiny(), tokens(31, 2, 9)
    tap = fgpt.Tap(lambda path, x: change(x), target=r"blocks\.1\.mlp")
    message = rf"^the tap at blocks\.1\.mlp returned {got}: expected x's .*float32 \[2, 9, 16\] on cpu$"
    for call in (lambda: fgpt.hidden(params, text, tap=tap), lambda: fgpt.trace(params, text, target=".*", tap=tap)):
        with pytest.raises(fgpt.InputError, match=message):
            call()


# ---------------------------------------------------------------------------------------------------------------- docs


def test_the_documented_points_and_shapes_are_those_of_a_trace():
    """Of a model in which no two sizes are equal; the table's example is block 3."""
    params = tiny(n_layer=4, n_head=4, n_kv=2, d_model=24, d_head=6, d_mlp=40, gated_mlp=True)
    sizes = {"*batch": 3, "seq": 9, "key": 9, "d_model": 24, "n_head": 4, "n_kv": 2, "d_head": 6, "d_mlp": 40}
    _, activations = fgpt.trace(params, tokens(31, 3, 9), target=".*")
    page = (ROOT / "docs" / "activations.md").read_text(encoding="utf-8")
    documented: dict[str, list[int]] = {}
    for paths, shape in re.findall(r"^\| (`.*?) \|.*\| `\[(.*)\]` \|$", page, flags=re.M):
        for path in re.findall(r"`(\S+)`", paths):
            documented[path] = [sizes[axis] for axis in shape.split()]
    expected = {path: list(x.shape) for path, x in activations.items() if not re.match(r"blocks\.[012]", path)}
    assert documented == expected
