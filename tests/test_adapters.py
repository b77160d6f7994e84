"""LoRA against PEFT, its files both ways, and the laws of the weight algebra."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import close, hf_gpt2, ours, same, shaken, shared, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import grad
from torch.nn import functional as F

import fgpt
from fgpt.adapters import layers
from fgpt.tree import cast, count, leaves, update, walk

LINEARS = r"blocks\.\d+\.(attn|mlp)\.\w+"
X, Y = tokens(31, 2, 9), tokens(31, 2, 9, seed=1)
BATCH = fgpt.Batch(X, Y, torch.ones(2, 9))
MODULES = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}


def loss_of(params: fgpt.GPT) -> Callable[[fgpt.Adapters], Tensor]:
    return lambda adapters: fgpt.loss(fgpt.adapt(params, adapters), BATCH)


def step_loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: torch.Generator | None) -> tuple[Tensor, Tensor]:
    return fgpt.nll(fgpt.adapt(params, adapters), batch)


def peft_model(**options: Any) -> Any:
    """A PEFT LoRA on every linear layer of a GPT-2, moved away from the identity."""
    targets = {"r": 4, "lora_alpha": 8, "target_modules": list(MODULES), "fan_in_fan_out": True}
    model = peft.get_peft_model(hf_gpt2(), peft.LoraConfig(**targets | options))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    return model.eval()


# --------------------------------------------------------------------------------------------------------------- PEFT


def test_logits_and_gradients_are_pefts(tmp_path: Path):
    model = peft_model()
    params = fgpt.fuse(ours(hf_gpt2(), tmp_path))
    theirs = {n: p for n, p in model.named_parameters() if "lora_" in n}
    prefix = "base_model.model.transformer.h"

    def pair(i: int, module: str) -> list[Tensor]:
        return [theirs[f"{prefix}.{i}.{module}.lora_{side}.default.weight"] for side in "AB"]

    paths = {f"blocks.{i}.{path}": (i, module) for i in range(2) for module, path in MODULES.items()}
    adapters = {path: fgpt.LoRA(*(x.detach() for x in pair(*at)), 8.0) for path, at in paths.items()}
    logits = model(X).logits
    close(fgpt.functional_call(fgpt.apply, (params, adapters), X), logits.detach(), 1e-5)
    F.cross_entropy(logits.flatten(0, 1), Y.flatten()).backward()
    grads: Any = grad(loss_of(params))(adapters)
    for path, at in paths.items():
        a, b = (p.grad for p in pair(*at))
        assert min(x.abs().max() for x in (a, b) if x is not None) > 1e-3
        close((grads[path].a, grads[path].b), (a, b), 1e-5)


@pytest.mark.parametrize("target", [r".*\.qkv", r"blocks\.1\.attn\.qkv|blocks\.\d+\.(attn\.o|mlp\..*)"])
def test_our_file_in_peft(target: str, tmp_path: Path):
    params = fgpt.fuse(ours(hf_gpt2(), tmp_path / "base"))
    adapters = shaken(fgpt.lora(params, fgpt.key(0), rank=3, alpha=5, target=target))
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    model = peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval()
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == fgpt.trainable(adapters)
    with torch.no_grad():
        close(fgpt.apply(fgpt.adapt(params, adapters), X), model(X).logits, 1e-5)
    again = fgpt.load_peft(tmp_path / "adapter", params)
    assert same(again, adapters)
    assert {p: x.scale for p, x in again.items()} == pytest.approx({p: x.scale for p, x in adapters.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn.c_attn": 2, r"h\.1\.mlp\.c_fc": 5}, "alpha_pattern": {"mlp.c_proj": 3}},
        {"rank_pattern": {"attn.c_attn": 2}, "alpha_pattern": {"attn.c_attn": 32}, "use_rslora": True},
    ],
)
def test_pefts_file_with_us(options: dict[str, Any], tmp_path: Path):
    model = peft_model(**options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    params = fgpt.fuse(ours(hf_gpt2(), tmp_path / "base"))
    adapters = fgpt.load_peft(tmp_path / "adapter", params)
    assert fgpt.trainable(adapters) == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        close(fgpt.apply(fgpt.adapt(params, adapters), X), model(X).logits, 1e-5)


def test_q_and_v_of_unequal_rank_and_alpha_travel_stacked(tmp_path: Path):
    """PEFT sees one exact LoRA on c_attn; we get back the adapters that we saved."""
    params = ours(hf_gpt2(), tmp_path / "base")
    adapters = shaken(
        fgpt.lora(params, fgpt.key(0), 2, 8, r"blocks\.\d+\.attn\.q")
        | fgpt.lora(params, fgpt.key(0), 3, 6, r"blocks\.0\.attn\.v")
        | fgpt.lora(params, fgpt.key(0), 4, 2, r"blocks\.1\.attn\.(k|v)")
    )
    fgpt.save_peft(adapters, params, tmp_path / "adapter", "base")
    model = peft.PeftModel.from_pretrained(hf_gpt2(), tmp_path / "adapter").eval()
    expected = fgpt.apply(fgpt.adapt(params, adapters), X)
    with torch.no_grad():
        close(expected, model(X).logits, 1e-5)
    again = fgpt.load_peft(tmp_path / "adapter", params)
    assert again.keys() == adapters.keys()
    for path, x in adapters.items():
        assert torch.equal(again[path].a, x.a)
        close(again[path].scale * again[path].b, x.scale * x.b, 1e-7)
    close(fgpt.apply(fgpt.adapt(params, again), X), expected, 1e-5)
    on_fused = fgpt.load_peft(tmp_path / "adapter", fgpt.fuse(params))
    close(fgpt.apply(fgpt.adapt(fgpt.fuse(params), on_fused), X), expected, 1e-5)


def test_stacking_is_bitwise_where_ranks_and_alphas_are_equal(tmp_path: Path):
    params = tiny()
    adapters = shaken(fgpt.lora(params, fgpt.key(0), 4, 8, r"blocks\.\d+\.attn\.(q|v)"))
    fgpt.save_peft(adapters, params, tmp_path, "base")
    again = fgpt.load_peft(tmp_path, params)
    assert same(again, adapters)
    assert [x.alpha for x in again.values()] == [x.alpha for x in adapters.values()]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # r' = 2r and alpha' = 2 alpha


# -------------------------------------------------------------------------------------------------------------- counts


def gpt2(n_layer: int, n_head: int, d: int, monkeypatch: pytest.MonkeyPatch) -> fgpt.GPT:
    """GPT-2's real shape, and no storage."""
    rng = fgpt.key(0)
    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr("fgpt.model.fold_in", lambda *_: None)
        return fgpt.init(fgpt.Config(n_layer, n_head, d, 1024, 50257, 4 * d), rng)


def test_counts(monkeypatch: pytest.MonkeyPatch):
    small, medium = gpt2(12, 12, 768, monkeypatch), gpt2(24, 16, 1024, monkeypatch)
    assert fgpt.trainable(fgpt.lora(small, fgpt.key(0), 8, target=r"blocks\..*\.attn\.[qkvo]")) == 589_824
    assert fgpt.trainable(fgpt.lora(fgpt.fuse(small), fgpt.key(0), 8, target=r"blocks\..*\.(qkv|o)")) == 442_368
    assert fgpt.trainable(fgpt.lora(medium, fgpt.key(0), 4, target=r"blocks\..*\.attn\.(q|v)")) == 393_216
    fused = r"blocks\..*\.(attn\.qkv|attn\.o|mlp\.down)"
    assert fgpt.trainable(fgpt.lora(fgpt.fuse(small), fgpt.key(0), 8, target=fused)) == 811_008
    assert fgpt.trainable(fgpt.tune(small)) == 124_439_808


def test_a_real_adapter(monkeypatch: pytest.MonkeyPatch):
    folder = shared("gpt2-lora-adapter")
    adapters: Any = fgpt.load_peft(folder, fgpt.fuse(gpt2(12, 12, 768, monkeypatch)))
    stored = load_file(folder / "adapter_model.safetensors")
    assert fgpt.trainable(adapters) == 811_008
    assert sum(len(leaves(x)) for x in adapters.values()) == len(stored)
    for name, path in MODULES.items():
        for i in range(12 if name != "mlp.c_fc" else 0):
            lora = adapters[f"blocks.{i}.{path}"]
            a, b = (stored[f"base_model.model.transformer.h.{i}.{name}.lora_{side}.weight"] for side in "AB")
            assert same(lora, fgpt.LoRA(a, b, 16.0))
            assert lora.scale == 2.0
    with pytest.raises(fgpt.InputError, match=r"fuse\(params\) first"):
        fgpt.load_peft(folder, gpt2(12, 12, 768, monkeypatch))


# ------------------------------------------------------------------------------------------------------------ training


def test_at_init_the_adapted_model_is_the_base_bitwise(gpt: fgpt.GPT):
    adapters = fgpt.lora(gpt, fgpt.key(0), 4, target=rf"wte|{LINEARS}")
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, adapters), X), fgpt.apply(gpt, X))
    assert same(fgpt.merge(fgpt.adapt(gpt, adapters)), gpt)


def test_a_step_moves_every_adapter_and_nothing_else(gpt: fgpt.GPT):
    """With B = 0 the gradient of A is zero, so the first step moves every B and no A; the second moves all."""
    adapters, optimizer = fgpt.lora(gpt, fgpt.key(0), 4, target=LINEARS), fgpt.adamw(1e-2)
    before = {path: x.clone() for path, x in leaves(gpt).items()}
    step = fgpt.make_step(step_loss, optimizer)
    zero = fgpt.start(adapters, optimizer)
    one, _ = step(zero, gpt, [BATCH], None)
    two, _ = step(one, gpt, [BATCH], None)
    assert same(before, leaves(gpt))
    old, new, newer = (leaves(state.trainable) for state in (zero, one, two))
    assert [len(x) for x in (old, new, newer)] == [24] * 3
    for path in old:
        assert torch.equal(old[path], new[path]) == path.endswith(".a")
        assert not torch.equal(new[path], newer[path])


# ------------------------------------------------------------------------------------------------------------ the laws


@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([0.5, 8.0]), st.integers(0, 9))
def test_linear_is_dense(depth: int, rank: int, alpha: float, seed: int):
    w: Any = torch.randn(7, 5, generator=fgpt.key(seed))
    meaning = w.double()
    for i in range(depth):
        a, b = (torch.randn(*s, generator=fgpt.fold_in(fgpt.key(seed), i)) for s in ((rank, 5), (7, rank)))
        w, meaning = fgpt.Adapted(w, a, b, alpha / rank), meaning + alpha / rank * b.double() @ a.double()
    x, bias = torch.randn(2, 3, 5, generator=fgpt.key(seed + 1)), torch.randn(7)
    close(fgpt.dense(w).double(), meaning, 1e-5, 1e-5)
    close(fgpt.linear(x, w, bias), x @ fgpt.dense(w).T + bias, 1e-4, 1e-5)
    close(fgpt.embed(tokens(7, 2, 3), w), fgpt.dense(w)[tokens(7, 2, 3)], 1e-4, 1e-5)


@given(st.integers(1, 3), st.booleans(), st.integers(0, 9))
def test_merged_is_factored(stacked: int, fused: bool, seed: int):
    """Stacked adapters too, and on a tied table, where one adapter moves embedding and head together."""
    params = fgpt.fuse(tiny()) if fused else tiny()
    trees = [
        shaken(fgpt.lora(params, fgpt.key(i), 1 + i, target=rf"wte|wpe|{LINEARS}"), seed=seed + i)
        for i in range(stacked)
    ]
    adapted = fgpt.adapt(params, *trees)
    merged = fgpt.merge(adapted)
    assert not any(isinstance(x, fgpt.Adapted) for _, x in walk(merged))
    assert leaves(merged).keys() == leaves(params).keys()
    close(fgpt.apply(merged, X), fgpt.apply(adapted, X), 1e-4, 1e-5)
    assert (fgpt.apply(adapted, X) - fgpt.apply(params, X)).abs().max() > 0.1


def test_an_adapter_on_a_tied_table_moves_embedding_and_head(gpt: fgpt.GPT):
    adapted = fgpt.adapt(gpt, shaken(fgpt.lora(gpt, fgpt.key(0), 2, target="wte")))
    table = fgpt.dense(adapted.wte.w)
    close(fgpt.apply(adapted, X), fgpt.apply(update(gpt, {"wte.w": table}), X), 1e-5)
    close(fgpt.embed(X, adapted.wte.w), table[X], 1e-6)
    close(fgpt.logits(adapted, torch.eye(16)), table.T, 1e-6)


def test_the_factored_path_never_merges(gpt: fgpt.GPT, factored: Callable[[], None]):
    adapters = shaken(fgpt.lora(gpt, fgpt.key(0), 2, target=rf"wte|{LINEARS}"))
    adapted = fgpt.adapt(gpt, adapters)
    fgpt.apply(adapted, X)
    grad(loss_of(gpt))(adapters)
    fgpt.generate(adapted, [[1], [2, 3]], end=0, most=3)
    with pytest.raises(AssertionError, match="dense was called"):
        fgpt.merge(adapted)
    factored()
    fgpt.merge(adapted)


def test_a_half_precision_base_keeps_its_dtype_and_the_adapters_theirs(gpt: fgpt.GPT):
    params, adapters = cast(gpt, torch.bfloat16), shaken(fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS))
    assert fgpt.apply(fgpt.adapt(params, adapters), X).dtype == torch.bfloat16
    assert {x.dtype for x in leaves(grad(loss_of(params))(adapters)).values()} == {torch.float32}
    assert same(leaves(fgpt.merge(fgpt.adapt(params, {}))), leaves(params))


# --------------------------------------------------------------------------------------------- unions and selectors


def test_lora_and_tuned_leaves_are_one_tree(gpt: fgpt.GPT):
    lora, norms = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.tune(gpt, r".*ln_.*")
    both = shaken(lora | norms, seed=3)
    assert fgpt.trainable(both) == fgpt.trainable(lora) + 2 * 16 * (2 * 2 + 1)
    expected = fgpt.adapt(update(gpt, {p: both[p] for p in norms}), {p: both[p] for p in lora})
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, both), X), fgpt.apply(expected, X))
    assert {p for p, g in leaves(grad(loss_of(gpt))(both)).items() if g.abs().max() == 0} == set()


def test_a_lora_lies_on_a_weight_tuned_in_the_same_tree(gpt: fgpt.GPT):
    """Whichever side of the union comes first, neither is silently dropped."""
    lora, full = shaken(fgpt.lora(gpt, fgpt.key(0), 2)), shaken(fgpt.tune(gpt), seed=5)
    expected = fgpt.apply(fgpt.adapt(gpt, full, lora), X)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, lora | full), X), expected)
    assert torch.equal(fgpt.apply(fgpt.adapt(gpt, full | lora), X), expected)


def test_tuning_everything_is_the_model(gpt: fgpt.GPT):
    full = fgpt.tune(gpt, ".*")
    assert fgpt.trainable(full) == count(gpt)
    assert same(fgpt.adapt(gpt, full), gpt)
    moved = shaken(full, seed=7)
    assert same(leaves(fgpt.adapt(gpt, moved)), moved)
    assert {x.dtype for x in leaves(fgpt.tune(cast(gpt, torch.bfloat16))).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: fgpt.lora(p, fgpt.key(0), target=r"blocks\.\d+\.attn\.c_attn"),
            r"no path; nearest are blocks\.0\.a",
        ),
        (lambda p: fgpt.lora(p, fgpt.key(0), target="(q"), "not a regular expression"),
        (lambda p: fgpt.tune(p, r"ln_f\.weight"), r"no path; nearest are .*ln_f\.w"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=17), r"rank 17 on blocks\.0\.attn\.q: expected 1 to 16"),
        (lambda p: fgpt.lora(p, fgpt.key(0), rank=0), "rank 0"),
        (
            lambda p: fgpt.adapt(p, fgpt.lora(tiny(d_model=8), fgpt.key(0), 2)),
            r"adapter at blocks\.0\.attn\.q fits a weight of \[8, 8\], but the base has \[16, 16\]",
        ),
        (lambda p: fgpt.adapt(p, {"ln_f.w": torch.ones(8)}), r"ln_f\.w has shape \[8\], but the base has \[16\]"),
        (lambda p: fgpt.adapt(p, {"ln_g.w": torch.ones(16)}), r"no leaf 'ln_g\.w' to replace"),
        (lambda p: fgpt.adapt(p, fgpt.lora(tiny(n_layer=3), fgpt.key(0), 2)), r"no layer 'blocks\.2\.attn\.q'"),
        (lambda p: fgpt.adapt(p, fgpt.lora(fgpt.fuse(p), fgpt.key(0), 2)), r"for a fused base: fuse\(params\) first"),
        (lambda p: fgpt.adapt(fgpt.fuse(p), fgpt.lora(p, fgpt.key(0), 2)), r"not fused: do not fuse\(params\)"),
        (lambda p: fgpt.fuse(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2))), "fuse the base first"),
        (lambda p: fgpt.save(fgpt.adapt(p, fgpt.lora(p, fgpt.key(0), 2)), Path("x")), r"merge\(params\) first"),
    ],
)
def test_what_does_not_fit_is_named(make: Callable[[fgpt.GPT], Any], message: str, gpt: fgpt.GPT):
    with pytest.raises(fgpt.InputError, match=message):
        make(gpt)


# ---------------------------------------------------------------------------------------------------------- randomness


def test_keys_are_read_and_never_advanced(gpt: fgpt.GPT):
    rng, world = fgpt.key(3), torch.get_rng_state()
    before = rng.get_state()
    fgpt.init(gpt.cfg, rng)
    fgpt.lora(gpt, rng, 2)
    first = fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=rng)
    assert fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=rng) == first
    assert fgpt.generate(gpt, [[1], [2, 3]], end=0, most=8, temperature=1.0, rng=fgpt.key(4)) != first
    assert torch.equal(rng.get_state(), before)
    assert torch.equal(torch.get_rng_state(), world)


def test_draws_belong_to_the_key_and_the_path(gpt: fgpt.GPT):
    some = fgpt.lora(gpt, fgpt.key(0), 2)
    more = fgpt.lora(gpt, fgpt.key(0), 2, target=LINEARS)
    assert same(some, {path: more[path] for path in some})  # what else is adapted changes nothing
    drawn = [x.a for x in more.values() if x.a.shape[1] == 16] + [x.a for x in fgpt.lora(gpt, fgpt.key(1), 2).values()]
    assert len({tuple(a.flatten().tolist()) for a in drawn}) == len(drawn)
    assert all(x.a.abs().max() <= 16**-0.5 and x.a.std() > 0.1 for x in some.values())
    assert set(some) == {p for p in layers(gpt) if re.fullmatch(r"blocks\.\d\.attn\.[qkv]", p)}


def test_adapters_and_params_are_fp32_whatever_the_default_is(gpt: fgpt.GPT):
    torch.set_default_dtype(torch.float64)
    try:
        adapters, params = fgpt.lora(gpt, fgpt.key(0), 2), fgpt.init(gpt.cfg, fgpt.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(adapters, fgpt.lora(gpt, fgpt.key(0), 2))
    assert same(params, fgpt.init(gpt.cfg, fgpt.key(0)))
