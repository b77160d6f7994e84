"""The doctor: every law holds where nothing is wrong, and of each there is a fault that it alone reports."""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same, tokens, with_noise
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.checks.context import max_or_nan, max_rel_diff, perturb
from fgpt.cli.diagnostics import doctor
from fgpt.cli.training import tasks
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.recipes import ClassificationRecipe, PretrainingRecipe, find
from fgpt.tree import astype, leaves
from fgpt.weights import Adapted

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "norm_type": "rms", "activation": "silu", "gated_mlp": True, "biases": "", "rotary_dim": 32,
        "tie_word_embeddings": False, "n_kv": 1,
    },
    "neox": {"rotary_dim": 8, "parallel_residual": True, "tie_word_embeddings": False},
}  # fmt: skip
BASES = ("fp32", "bf16", "nf4", "int8", "blockwise8")
METHODS: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(1), 4, target=r"blocks\..*\.(q|v|up|down)", dropout=0.1),
    "dora": lambda p: fgpt.dora(p, fgpt.key(1), 4),
    "ia3": fgpt.ia3,
    "ln": lambda p: fgpt.trainable_leaves(p, r".*ln_.*"),
    "lora and ln": lambda p: fgpt.lora(p, fgpt.key(1), 4) | fgpt.trainable_leaves(p, r".*ln_.*"),
    "full": lambda p: fgpt.trainable_leaves(p, r"(?!.*(codes|absmax|code|offset)).*"),
}
CHECKS = [
    "finite loss", "padding", "packing", "batch composition", "batch size", "cache", "merge", "accumulation",
    "gradient flow", "first step", "determinism", "save and load", "frozen base",
]  # fmt: skip


def model(family: str = "gpt2", base: str = "fp32", layers: int = 1) -> fgpt.GPT:
    cfg = fgpt.Config(**{"n_layer": layers, "n_head": 2, "d_model": 64, "n_ctx": 24, "vocab_size": 31, "d_mlp": 128}
                      | FAMILIES[family])  # fmt: skip
    params = with_noise(fgpt.init(cfg, fgpt.key(0)), 0.1)
    if base in ("fp32", "bf16"):
        return params if base == "fp32" else astype(params, torch.bfloat16)
    return fgpt.quantize(params, base, target=r"blocks\..*\.(q|k|v|o|up|down)")  # pyright: ignore[reportArgumentType]


def batch(*rows: tuple[int, ...], label: int | None = None) -> fgpt.Batch:
    """Rows of documents of these lengths, each half a prompt; of token 30 there is none."""
    number = itertools.count()

    def document(length: int) -> Example:
        text = tuple(tokens(30, length, seed=next(number)).tolist())
        return Example(text, length // 2 if label is None else length, label)

    return collate([[document(length) for length in row] for row in rows])


PACKED, PLAIN = batch((7, 9), (16,), (4, 5, 3)), batch((7,), (20,), (12,))


def verdict(*arguments: Any, **options: Any) -> tuple[set[str], set[str]]:
    """The checks that fail, and those that do not apply."""
    found = fgpt.run_checks(*arguments, **options)
    assert [x.check for x in found] == CHECKS
    assert all(x.note for x in found if x.holds is None)
    return {x.check for x in found if x.holds is False}, {x.check for x in found if x.holds is None}


def module(name: str) -> Any:
    return importlib.import_module(name)


# ------------------------------------------------------------------------------------------------------- nothing wrong


lengths = st.lists(st.lists(st.integers(4, 8), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)


@given(st.sampled_from(list(FAMILIES)), st.sampled_from(BASES), st.sampled_from(list(METHODS)), lengths)
@settings(max_examples=8)
def test_the_laws_hold(family: str, base: str, method: str, rows: list[tuple[int, ...]]):
    params = model(family, base, 2)
    broken, unasked = verdict(params, METHODS[method](params), batch(*rows))
    alone = {"batch composition", "batch size", "accumulation"} if len(rows) == 1 else set()
    packed = set() if any(len(row) > 1 for row in rows) else {"packing"}
    assert not broken
    assert unasked == alone | packed | ({"merge"} if method in ("ln", "full") else set())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_laws_hold_of_a_classifier(family: str):
    params = fgpt.with_classification_head(model(family), 3, fgpt.key(0))
    adapters = fgpt.lora(params, fgpt.key(1), 4) | fgpt.trainable_leaves(params, r"head\..*")
    assert verdict(params, adapters, batch((7, 9), (16,), label=2)) == (set(), set())


def test_the_laws_hold_where_rows_fill_the_context_and_of_a_fused_base():
    params = fgpt.fuse_qkv(model())
    adapters = fgpt.lora(params, fgpt.key(0), 4, target=r".*qkv")
    assert verdict(params, adapters, batch((24,), (11, 13))) == (set(), set())


def test_what_cannot_be_asked_is_not_passed_in_silence():
    params, x = model(), tokens(31, 9)
    one = fgpt.Batch(x[:-1], x[1:], torch.ones(8))  # a row without a batch around it
    rows = {"batch composition", "batch size", "accumulation", "packing"}
    assert verdict(params, fgpt.trainable_leaves(params, r".*ln_.*"), one) == (set(), rows | {"merge"})
    trained = {"accumulation", "gradient flow", "first step", "determinism", "save and load", "merge"}
    assert verdict(params, {}, PACKED) == (set(), trained)
    noise = next(f for f in fgpt.run_checks(params, {}, PACKED) if f.check == "merge")
    assert (noise.error, noise.holds, noise.note) == (None, None, "no adapters")


def test_it_leaves_everything_as_it_was():
    params = model()
    adapters, before = METHODS["lora"](params), leaves(params)
    copies = {path: x.clone() for path, x in before.items()}
    first = fgpt.run_checks(params, adapters, PACKED)
    assert same(copies, before)
    assert torch.is_grad_enabled()
    assert fgpt.run_checks(params, adapters, PACKED) == first


def test_the_point_it_asks_at_is_near_and_nothing_special():
    params = model()
    adapters = METHODS["dora"](params) | METHODS["ln"](params)
    for path, x in leaves(perturb(adapters)).items():
        was = leaves(adapters)[path]
        assert x.ne(was).all() or x.ne(was).float().mean() > 0.9, path
        assert (x - was).square().mean().sqrt() < 0.06 * was.square().mean().sqrt().clamp(min=0.5)
    assert same(perturb(adapters), perturb(adapters))


def test_a_margin_that_is_no_number_does_not_hold():
    assert fgpt.CheckResult("", "", max_or_nan([0.0, float("nan"), 1.0]), 2.0).holds is False
    assert max_rel_diff(torch.zeros(2), torch.tensor([0.0, 1.0])) > 1
    assert max_rel_diff(torch.tensor([2.0, -4.0]), torch.tensor([2.0, -3.0])) == 0.25


# ---------------------------------------------------------------------------------------------- a fault, and its law


Patch = Callable[[str, str, Callable[[Any], Any]], None]


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """`patch(module, name, change)`: what the module calls `name` is `change` of what it was."""

    def put(where: str, name: str, change: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(module(where), name, change(getattr(module(where), name)))

    return put


def faulty(rows: fgpt.Batch = PACKED, base: str = "fp32", method: str = "lora and ln", **options: Any) -> set[str]:
    params = model(base=base)
    return verdict(params, METHODS[method](params), rows, **options)[0]


def test_loss_nothing_weighted():
    unweighted = replace(PACKED, weights=torch.zeros_like(PACKED.weights), loss_positions=None)
    params = model()
    broken, unasked = verdict(params, METHODS["lora"](params), unweighted)
    assert (broken, unasked) == ({"finite loss"}, set(CHECKS[1:-1]))


def test_loss_is_no_number():
    params = fgpt.adapt(model(), {"ln_f.b": torch.full([64], torch.inf)})
    assert verdict(params, METHODS["lora"](params), PACKED)[0] == {"finite loss"}


def test_loss_a_forgotten_position():
    assert PACKED.loss_positions is not None
    for at in (PACKED.loss_positions[1:], torch.cat([PACKED.loss_positions, PACKED.loss_positions[:1]])):
        assert faulty(replace(PACKED, loss_positions=at)) == {"finite loss"}


def test_padding_that_counts_as_positions(patch: Patch):
    def counting(through: Any) -> Any:
        def wrong(params: Any, tokens: Any, positions: Any, mask: Any, *rest: Any, **options: Any) -> Any:
            there = positions if mask is None else torch.arange(tokens.shape[-1]).expand_as(tokens)
            return through(params, tokens, there, mask, *rest, **options)

        return wrong

    patch("fgpt.model.forward", "transformer_layers", counting)
    assert faulty(PLAIN) == {"padding"}
    assert "packing" in faulty(PACKED)


def test_padding_that_counts_in_the_mean(patch: Patch):
    def per_position(nll: Any) -> Any:
        return lambda params, batch, *_: (nll(params, batch)[0], torch.tensor(float(batch.tokens.numel())))

    patch("fgpt.checks.forward", "nll", per_position)
    assert faulty(PLAIN) == {"padding"}


def test_packing_documents_that_see_one_another(patch: Patch):
    def join(forward: Any) -> Any:
        def wrong(params: Any, tokens: Any, segments: Any, *rest: Any) -> Any:
            return forward(params, tokens, None if segments is None else segments.clamp(max=1), *rest)

        return wrong

    patch("fgpt.model.forward", "_forward", join)
    for base in ("fp32", "bf16"):
        assert faulty(PACKED, base) == {"packing"}


def test_rows_that_share_the_scale_of_activations(patch: Patch):
    def share(round_rows: Any) -> Any:
        def wrong(x: Any) -> Any:
            if x.ndim < 3:
                return round_rows(x)
            absmax = x.abs().amax((0, 2), keepdim=True).expand(*x.shape[:-1], 1)
            return (x * (127 / absmax)).round().to(torch.int8), absmax

        return wrong

    patch("fgpt.kernels.quantized_linear", "_round", share)
    assert faulty(PACKED, "int8", "lora") == {"batch composition"}


def test_rows_whose_number_matters(patch: Patch):
    def count_rows(forward: Any) -> Any:
        def wrong(params: Any, tokens: Any, *rest: Any) -> Any:
            h, cache = forward(params, tokens, *rest)
            rows = len(tokens) - 1 if tokens.ndim > 1 and not torch.is_grad_enabled() else 0
            bump = torch.linspace(0, 0.01 * rows, h.shape[-1])
            return h + bump, cache

        return wrong

    patch("fgpt.model.forward", "_forward", count_rows)
    assert faulty(PLAIN) == {"batch size"}


def test_a_cache_that_forgets_the_newest_token(patch: Patch):
    def forgetful(forward_with_cache: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            h, cache = forward_with_cache(*arguments)
            segments = None if cache.segments is None else cache.segments[..., :-1]
            return h, fgpt.KVCache(tuple((k[..., :-1, :], v[..., :-1, :]) for k, v in cache.kv), segments)

        return wrong

    patch("fgpt.checks.forward", "forward_with_cache", forgetful)
    assert faulty(PLAIN) == faulty(PACKED) == {"cache"}


def test_a_room_whose_positions_are_off_by_one(patch: Patch):
    def late(prefill: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            scores, cache = prefill(*arguments)
            return scores, replace(cache, next_position=cache.next_position - 1)

        return wrong

    patch("fgpt.generation.static_cache", "prefill", late)
    assert faulty() == {"cache"}


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_a_merge_that_forgets_the_strength(patch: Patch, base: str):
    def weak(dense: Any) -> Any:
        return lambda w: dense(replace(w, scale=1.0) if isinstance(w, Adapted) else w)

    patch("fgpt.adapters", "dense", weak)
    params = model(base=base)
    adapters = fgpt.lora(params, fgpt.key(0), 4, alpha=32, target=r"blocks\..*\.(q|v|up|down)")
    assert verdict(params, adapters, PACKED)[0] == {"merge"}


def test_accumulation_by_the_mean_of_means(patch: Patch):
    def averaging(make_step: Any) -> Any:
        def make_wrong(*arguments: Any, **options: Any) -> Any:
            step = make_step(*arguments, **options)

            def wrong(state: Any, frozen: Any, batches: Any, rng: Any) -> Any:
                states = [step(state, frozen, [b], rng) for b in batches]
                mean = fgpt.tree.tree_map(lambda *x: torch.stack(x).mean(0), *(s.trainable for s, _ in states))
                return replace(states[0][0], trainable=mean), states[0][1]

            return lambda state, frozen, batches, rng: (step if len(batches) == 1 else wrong)(
                state, frozen, batches, rng
            )

        return make_wrong

    patch("fgpt.checks.context", "make_step", averaging)
    for rows in (PACKED, batch((8,), (8,))):  # rows alike have means alike, but for what they count
        assert faulty(rows) == {"accumulation"}


def test_a_leaf_that_has_no_gradient_is_named(patch: Patch):
    patch("fgpt.model.forward", "norm", lambda norm: lambda x, p, eps: norm(x, replace(p, b=p.b.detach()), eps))
    params = model()
    found = fgpt.run_checks(params, METHODS["lora and ln"](params), PACKED)
    (silent,) = (x for x in found if x.holds is False)
    assert (silent.check, silent.error) == ("gradient flow", 3.0)
    assert "blocks.0.ln_1.b" in silent.note


def test_a_rate_that_is_lost_in_rounding():
    params = model()
    adapters = astype(fgpt.trainable_leaves(params, r".*ln_.*\.w"), torch.bfloat16)
    assert verdict(params, adapters, PACKED, lr=1e-5)[0] == {"first step"}
    assert not verdict(params, adapters, PACKED, lr=1e-2)[0]


def test_an_optimizer_that_leaves_one_out(patch: Patch):
    def partial(adamw: Any) -> Any:
        def make_wrong(lr: float) -> Any:
            whole = adamw(lr)

            def update(grads: Any, state: Any, params: Any) -> Any:
                new, after = whole.update(grads, state, params)
                return new | {"ln_f.w": params["ln_f.w"]}, after

            return fgpt.Optimizer(whole.init, update)

        return make_wrong

    patch("fgpt.checks.context", "adamw", partial)
    assert faulty() == {"first step"}


def test_a_step_that_draws_from_somewhere_else(patch: Patch):
    count = itertools.count()

    def drifting(nll: Any) -> Any:
        def wrong(params: Any, batch: Any) -> Any:
            total, weight = nll(params, batch)
            return total * (1 + 2e-7 * next(count)), weight

        return wrong

    patch("fgpt.checks.context", "nll", drifting)
    assert faulty() == {"determinism"}


def test_a_file_that_rounds(patch: Patch):
    def short(write: Any) -> Any:
        return lambda path, tensors, about: write(path, {k: x.bfloat16().float() for k, x in tensors.items()}, about)

    patch("fgpt.io.serialization", "write_tensors", short)
    assert faulty() == {"save and load"}


def test_a_peft_folder_that_forgets_alpha(patch: Patch):
    def weak(load: Any) -> Any:
        return lambda *arguments: {path: replace(x, alpha=1.0) for path, x in load(*arguments).items()}

    patch("fgpt.checks.persistence", "load_peft", weak)
    assert faulty(method="lora") == {"save and load"}
    params = model()
    partly = METHODS["lora"](params) | fgpt.trainable_leaves(
        params, r"blocks\.0\.attn\.q\.b"
    )  # which PEFT does not hold
    assert not verdict(params, partly, PACKED)[0]


def test_a_base_that_is_written_to(patch: Patch):
    done: list[bool] = []

    def careless(nll: Any) -> Any:
        def wrong(params: Any, batch: Any) -> Any:
            if not done:  # which a softmax takes off again, so that no other law can tell
                params.blocks[0].attn.k.b.add_(1.0)
                done.append(True)
            return nll(params, batch)

        return wrong

    patch("fgpt.checks.context", "nll", careless)
    params = model()
    (finding,) = (x for x in fgpt.run_checks(params, METHODS["lora"](params), PACKED) if x.holds is False)
    assert (finding.check, finding.error) == ("frozen base", 1.0)
    assert "base.blocks.0.attn.k.b" in finding.note


# ------------------------------------------------------------------------------------------------------------- a run


NANO = replace(find("lora-nano"), max_seq_len=160, micro_batch_size=2, overlong="drop")  # pyright: ignore[reportCallIssue]


def test_doctor_of_a_run(capsys: pytest.CaptureFixture[str]):
    found = doctor.run(NANO)
    assert {x.check for x in found if not x.holds} <= {"packing"}  # which short rows give nothing to be asked of
    printed = capsys.readouterr().err
    assert all(check in printed for check in CHECKS)
    assert f"torch {torch.__version__} on cpu" in printed
    assert "FAIL" not in printed


def test_doctor_of_a_broken_run_says_which_laws(patch: Patch, capsys: pytest.CaptureFixture[str]):
    patch("fgpt.checks.persistence", "load_peft", lambda load: lambda *_: {})
    with pytest.raises(InputError, match="lora-nano: save and load: broken on this machine"):
        doctor.run(NANO)
    assert "FAIL" in capsys.readouterr().err


def test_doctor_of_full_tuning_asks_of_the_base_itself():
    run = find("full-nano")
    base, adapters, first = doctor.first_step_inputs(tasks.build_job(run))
    assert adapters.keys() == leaves(base).keys()
    assert same(base, fgpt.load("nano"))
    assert len(first.tokens) >= doctor.NUM_ROWS


def test_doctor_of_pretraining_and_of_a_classifier(tmp_path: Path):
    stories, rows = tmp_path / "stories.txt", tmp_path / "rows.txt"
    stories.write_text("<|endoftext|>".join(f"Once there was a fox who had {i} hats." for i in range(40)))
    small = PretrainingRecipe(
        name="p",
        data=(stories,),
        n_layer=1,
        n_head=2,
        d_model=32,
        max_seq_len=24,
        micro_batch_size=3,
        steps=2,
        device="cpu",
        compile=False,
    )
    assert all(x.holds is not False for x in doctor.run(small))
    rows.write_text("".join(f"I feel {word} and {i};{word}\n" for i in range(12) for word in ("sad", "glad")))
    recipe = ClassificationRecipe(
        name="c",
        base="nano",
        train=str(rows),
        num_heldout=4,
        max_seq_len=48,
        micro_batch_size=3,
        head="classifier",
        device="cpu",
    )
    assert all(x.holds is not False for x in doctor.run(recipe))
