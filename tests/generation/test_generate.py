"""Writing: transformers' own texts token by token, rows that see no neighbors, and text that streams whole."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from builders import ROOT, close, hf_gpt2, load_hf_model, tiny, tokens
from builders.generation import WARM_SAMPLING, adapter_sets
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.generation import static_cache
from fgpt.generation.beam import beam_search
from fgpt.generation.loop import stop_on_strings, stream, stream_text, truncate_at_stop
from fgpt.generation.prompt_lookup import prompt_lookup_decode, propose_ngram
from fgpt.generation.sampling import SamplingParams
from fgpt.io import models
from fgpt.tree import leaves, tree_map

NANO = models.tokenizer("nano")


def both(seed: int) -> tuple[Any, fgpt.GPT]:
    with TemporaryDirectory() as folder:
        model = hf_gpt2(seed)
        return model, load_hf_model(model, Path(folder))


def theirs(model: Any, prompt: list[int], most: int, **options: Any) -> Any:
    ids = torch.tensor([prompt])
    options = {
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": 0,
        "pad_token_id": 0,
        "do_sample": False,
    } | options
    return model.generate(ids, max_new_tokens=most, return_dict_in_generate=True, **options)


def text(row: torch.Tensor, start: int) -> tuple[list[int], bool]:
    written = row[start:].tolist()
    return (written[: written.index(0)], True) if 0 in written else (written, False)


# --------------------------------------------------------------------------------------------------------- transformers


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([None, 0.7, 1.3, 2.0]),
    st.sampled_from([None, 1, 2, 3]),
    st.integers(0, 99),
)
def test_penalised_greedy_text_is_transformers(lengths: list[int], penalty: Any, ngram: Any, seed: int):
    """A ragged batch, each row against transformers on it alone."""
    model, params = both(seed)
    prompts = [tokens(31, n, seed=seed + i).tolist() for i, n in enumerate(lengths)]
    sampling = SamplingParams(repetition_penalty=penalty, no_repeat_ngram=ngram)
    for prompt, got in zip(
        prompts, fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=11, sampling=sampling), strict=True
    ):
        options = {"repetition_penalty": penalty or 1.0, "no_repeat_ngram_size": ngram or 0}
        expected = text(theirs(model, prompt, 11, **options).sequences[0], len(prompt))
        assert (got.tokens, got.finished) == expected


@settings(max_examples=25)
@given(
    st.integers(1, 12),
    st.integers(2, 5),
    st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]),
    st.booleans(),
    st.integers(0, 99),
)
def test_beams_are_transformers(length: int, beams: int, penalty: float, penalised: bool, seed: int):
    """Texts and scores, all of them, in their order."""
    model, params = both(seed)
    prompt = tokens(31, length, seed=seed).tolist()
    extra: dict[str, Any] = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2} if penalised else {}
    sampling = SamplingParams(repetition_penalty=1.5, no_repeat_ngram=2) if penalised else SamplingParams()
    found = beam_search(
        params, prompt, eos_token_id=0, max_new_tokens=10, num_beams=beams, length_penalty=penalty, sampling=sampling
    )
    expected = theirs(
        model,
        prompt,
        10,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=penalty,
        output_scores=True,
        **extra,
    )
    assert [(x.tokens, x.finished) for x in found] == [text(row, length) for row in expected.sequences]
    close(torch.tensor([x.score for x in found]), expected.sequences_scores, 1e-4)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_a_row_does_not_see_its_neighbors():
    """Sampled, ragged, some ending early: whatever is beside it, and however wide the padding."""
    params, rng = tiny(), fgpt.key(3)
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5)]
    together = fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng)
    others = [tokens(31, n, seed=50 + n).tolist() for n in (11, 1, 2)]
    for i in range(3):
        beside = [prompts[j] if j == i else others[j] for j in range(3)]
        assert (
            fgpt.generate(params, beside, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng)[i]
            == together[i]
        )
    assert (
        fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=rng) == together
    )
    assert (
        fgpt.generate(params, prompts, eos_token_id=0, max_new_tokens=30, sampling=WARM_SAMPLING, rng=fgpt.key(4))
        != together
    )
    assert (
        len(
            {
                tuple(x.tokens)
                for x in fgpt.generate(
                    params, prompts[:1] * 6, eos_token_id=0, max_new_tokens=12, sampling=WARM_SAMPLING, rng=rng
                )
            }
        )
        > 3
    )


def test_what_is_read_and_computed(monkeypatch: pytest.MonkeyPatch):
    """A prompt that is there several times is read once, and a row at its end is computed no more."""
    params, sizes = tiny(), []
    read, step = static_cache.prefill, static_cache.decode_step

    def reads(p: fgpt.GPT, x: torch.Tensor, *rest: Any) -> Any:
        sizes.append(tuple(x.shape))
        return read(p, x, *rest)

    def steps(p: fgpt.GPT, x: torch.Tensor, *rest: Any) -> Any:
        sizes.append(tuple(x.shape))
        return step(p, x, *rest)

    monkeypatch.setattr(static_cache, "prefill", reads)
    monkeypatch.setattr(static_cache, "decode_step", steps)
    prompt = tokens(31, 4).tolist()
    got = fgpt.generate(
        params,
        [prompt] * 5,
        eos_token_id=0,
        max_new_tokens=15,
        sampling=SamplingParams(temperature=2.0),
        rng=fgpt.key(0),
    )
    assert sizes[0] == (1, 4)
    lengths = [len(x.tokens) + x.finished for x in got]
    assert len(set(lengths)) > 1
    assert [n for (n,) in sizes[1:]] == [sum(s > i for s in lengths) for i in range(1, max(lengths))]


def test_log_probabilities_are_the_models():
    params = tiny()
    prompts = [tokens(31, n, seed=n).tolist() for n in (2, 6)]
    for prompt, got in zip(
        prompts,
        fgpt.generate(
            params, prompts, eos_token_id=0, max_new_tokens=9, sampling=WARM_SAMPLING, rng=fgpt.key(1), logprobs=True
        ),
        strict=True,
    ):
        whole = torch.tensor([[*prompt, *got.tokens, *([0] if got.finished else [])]])
        log_p = (
            fgpt.apply(params, whole[:, :-1]).log_softmax(-1).gather(-1, whole[:, 1:, None])[0, len(prompt) - 1 :, 0]
        )
        close(torch.tensor(got.logprobs), log_p, 1e-5)


# ----------------------------------------------------------------------------------------------- adapters, row by row


@pytest.mark.parametrize("to", [None, "int8", "nf4"])
def test_a_row_is_written_by_its_own_adapters(to: Any):
    """In one batch, ragged and sampled, equal to each alone; and to the same with no cache."""
    torch.manual_seed(0)
    params = fgpt.init(fgpt.Config(2, 2, 64, 24, 31, 64), fgpt.key(5))
    params = params if to is None else fgpt.quantize(params, to)
    by_name = adapter_sets(params)
    which = [1, 0, 2, 1, 0]
    prompts = [tokens(31, n, seed=n).tolist() for n in (3, 9, 5, 3, 1)]
    for sampling in (SamplingParams(), WARM_SAMPLING):
        together = fgpt.generate(
            params,
            prompts,
            eos_token_id=0,
            max_new_tokens=12,
            sampling=sampling,
            rng=fgpt.key(0),
            adapters=[by_name[i] for i in which],
        )
        for row, i in enumerate(which):
            tuned, beside = (
                fgpt.adapt(params, by_name[i]),
                [prompts[row]] * (row + 1),
            )  # a row's key is that of its place
            assert (
                fgpt.generate(tuned, beside, eos_token_id=0, max_new_tokens=12, sampling=sampling, rng=fgpt.key(0))[row]
                == together[row]
            )
        assert len({tuple(x.tokens) for x in together}) > 2


def test_stacked_adapters_are_differentiable():
    params = tiny()
    many, which, rows = adapter_sets(params), [2, 0, 0, 1], tokens(31, 4, 7)

    def together(sets: list[fgpt.Adapters]) -> torch.Tensor:
        stacked = fgpt.stack_adapters([sets[i] for i in which])
        return torch.func.vmap(lambda a, x: fgpt.apply(fgpt.adapt(params, a), x))(stacked, rows).square().sum()

    def apart(sets: list[fgpt.Adapters]) -> torch.Tensor:
        return sum(fgpt.apply(fgpt.adapt(params, sets[i]), x).square().sum() for i, x in zip(which, rows))  # pyright: ignore

    got, expected = torch.func.grad(together)(many), torch.func.grad(apart)(many)
    assert leaves(got).keys() == leaves(expected).keys()
    assert len(leaves(got)) > 8
    for path, x in leaves(expected).items():
        close(leaves(got)[path], x, 1e-4)


def test_any_kind_of_adapters_stacks_with_its_own():
    params, rows = tiny(), tokens(31, 2, 7)
    for make in (
        lambda seed: fgpt.dora(params, fgpt.key(seed), 2),
        lambda seed: fgpt.ia3(params),
        lambda seed: fgpt.trainable_leaves(params, r".*ln_.*|head\..*|wte\.w"),
    ):
        moved = [tree_map(lambda x: x + 0.1 * torch.randn_like(x), make(seed)) for seed in (0, 1)]
        got = torch.func.vmap(lambda a, x: fgpt.apply(fgpt.adapt(params, a), x))(fgpt.stack_adapters(moved), rows)
        for y, a, x in zip(got, moved, rows, strict=True):
            close(y, fgpt.apply(fgpt.adapt(params, a), x), 1e-5)
        written = fgpt.generate(params, rows.tolist(), eos_token_id=0, max_new_tokens=5, adapters=moved)
        for y, a, x in zip(written, moved, rows.tolist(), strict=True):
            assert [y] == fgpt.generate(fgpt.adapt(params, a), [x], eos_token_id=0, max_new_tokens=5)


def test_adapters_that_do_not_stack():
    params = tiny()
    dora, ia3, ln = fgpt.dora(params, fgpt.key(0), 2), fgpt.ia3(params), fgpt.trainable_leaves(params, r"ln_f\.w")
    for some, message in (
        ([], "no adapters to stack"),
        ([dora, {}], "adapters 1 have nothing at .* where others have a DoRA"),
        ([dora, fgpt.dora(params, fgpt.key(0), 3)], "are of different kinds or settings"),
        ([dora, fgpt.dora(params, fgpt.key(0), 3, 4)], r"at .* have different shapes: .*\(2, 16\).* and .*\(3, 16\)"),
        ([dora, ia3], "are of different kinds|have nothing at"),
        ([ln, {"ln_f.w": torch.ones(3)}], "different shapes"),
    ):
        with pytest.raises(fgpt.InputError, match=message):
            fgpt.stack_adapters(some)
    with pytest.raises(fgpt.InputError, match="2 sets of adapters for 1 prompts: expected one for each"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=1, adapters=[ln, ln])


@pytest.mark.slow
def test_the_compiled_step():
    """In a process of its own: the whole-package check of these tests is what a compiler cannot trace."""
    file = ROOT / "tests" / "scripts" / "compiled_decode.py"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "7 passed" in done.stdout


# ----------------------------------------------------------------------------------------------------------------- text


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_are_whole_characters_and_stop_before_the_stop(written: str, strings: list[str]):
    """Cut into single bytes, the worst that a tokenizer can do."""
    codes = list(written.encode())

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    got = list(stream_text(decode, codes, strings))
    assert "".join(got) == truncate_at_stop(written, strings)
    assert all(got)
    if "�" not in written:
        assert "�" not in "".join(got)
    if not strings and written and "�" not in written:
        assert len(got) == len(written)  # each as soon as it is whole


@settings(max_examples=5)
@given(st.integers(0, 99))
def test_stop_strings(seed: int):
    params = fgpt.load("nano")
    prompt = NANO.encode("Once upon a time")
    rng, sampling = fgpt.key(seed), SamplingParams(temperature=1.0)
    free = fgpt.generate(params, [prompt], eos_token_id=NANO.eos, max_new_tokens=60, sampling=sampling, rng=rng)[0]
    whole = NANO.decode(free.tokens)
    strings = [whole[20:23], "never this"]
    until = stop_on_strings(NANO.decode, strings)
    got = fgpt.generate(
        params, [prompt], eos_token_id=NANO.eos, max_new_tokens=60, sampling=sampling, rng=rng, stopping_criterion=until
    )[0]
    assert truncate_at_stop(NANO.decode(got.tokens), strings) == truncate_at_stop(whole, strings)
    assert got.tokens == free.tokens[: len(got.tokens)]
    assert strings[0] not in NANO.decode(got.tokens[:-1])
    steps = stream(
        params, [prompt], eos_token_id=NANO.eos, max_new_tokens=60, sampling=sampling, rng=rng, stopping_criterion=until
    )
    assert "".join(
        stream_text(NANO.decode, (x.token for s in steps for x in s if not x.is_eos), strings)
    ) == truncate_at_stop(whole, strings)
    with pytest.raises(fgpt.InputError, match="a stop string is empty"):
        stop_on_strings(NANO.decode, ["a", ""])


# ------------------------------------------------------------------------------------------------------------ lookup


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(1, 6), st.integers(0, 99))
def test_lookup_writes_what_greedy_writes(length: int, ngram: int, ahead: int, seed: int):
    params = tiny(n_ctx=64)
    prompt = tokens(5, length, seed=seed).tolist()
    for most in (1, 7, 100):
        [expected] = fgpt.generate(params, [prompt], eos_token_id=0, max_new_tokens=most)
        assert (
            prompt_lookup_decode(
                params, prompt, eos_token_id=0, max_new_tokens=most, ngram=ngram, num_draft_tokens=ahead
            )
            == expected
        )


def test_lookup_takes_fewer_passes_where_text_repeats(monkeypatch: pytest.MonkeyPatch):
    params, passes = tiny(n_ctx=200), 0

    def counted(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        return fgpt.forward_with_cache(*args)

    monkeypatch.setattr("fgpt.generation.prompt_lookup.forward_with_cache", counted)
    got = prompt_lookup_decode(params, [1, 2], eos_token_id=-1, max_new_tokens=150)
    assert got == fgpt.generate(params, [[1, 2]], eos_token_id=-1, max_new_tokens=150)[0]
    assert passes < 0.6 * len(got.tokens)


def test_a_draft_is_what_followed_last():
    assert propose_ngram([1, 2, 3, 9, 1, 2, 3, 7, 1, 2, 3], 3, 2) == [7, 1]
    assert propose_ngram([1, 2, 3], 3, 2) == []
    assert propose_ngram([1, 1, 1, 1], 2, 5) == [1]


def test_bad_input_is_named():
    params = tiny()
    for call in (
        lambda p: fgpt.generate(params, [p], eos_token_id=0, max_new_tokens=1),
        lambda p: beam_search(params, p, eos_token_id=0, max_new_tokens=1),
        lambda p: prompt_lookup_decode(params, p, eos_token_id=0, max_new_tokens=1),
    ):
        for prompt in ([], [1] * 24):
            with pytest.raises(fgpt.InputError, match=f"prompt 0 has {len(prompt)} tokens: expected 1 to 23"):
                call(prompt)
        assert call([1]) is not None
    assert fgpt.generate(params, [], eos_token_id=0, max_new_tokens=3) == []
    for got in (
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=0)[0],
        prompt_lookup_decode(params, [1], eos_token_id=0, max_new_tokens=0),
        beam_search(params, [1], eos_token_id=0, max_new_tokens=0)[0],
    ):
        assert (got.tokens, got.finished) == ([], False)
    with pytest.raises(fgpt.InputError, match="max_new_tokens is -1: expected 0 or more"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=-1)
    with pytest.raises(fgpt.InputError, match="eos_token_id is 31: expected 0 to 30, or -1 for none"):
        fgpt.generate(params, [[1]], eos_token_id=31, max_new_tokens=1)
    with pytest.raises(fgpt.InputError, match="needs a key"):
        fgpt.generate(params, [[1]], eos_token_id=0, max_new_tokens=1, sampling=SamplingParams(temperature=1.0))
    with pytest.raises(fgpt.InputError, match="expects 1 beam or more and temperature 0, got 0"):
        beam_search(params, [1], eos_token_id=0, max_new_tokens=1, num_beams=0)
    for penalty in (1e300, -1e300, float("nan")):
        with pytest.raises(fgpt.InputError, match=r"length_penalty is .*: expected -30 or more, at most 30"):
            beam_search(params, [1], eos_token_id=0, max_new_tokens=1, length_penalty=penalty)
    with pytest.raises(fgpt.InputError, match="draws nothing"):
        beam_search(params, [1], eos_token_id=0, max_new_tokens=1, sampling=SamplingParams(temperature=0.5))
