"""A text in its frame: what is cut, what is asked for, and a token for each label."""

from collections import Counter

import pytest
import torch
from builders import SharedData
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.inference.classifiers import (
    prompt_frame_of,
)
from fgpt.data.classification_prompts import (
    LabeledText,
    PromptFrame,
    PromptWording,
    assemble,
    class_labels,
    encode,
    prompt_frame,
    resolve_labels,
    sample_shots,
    verbalizers,
)
from fgpt.data.packing import collate
from fgpt.errors import InputError
from fgpt.recipes import ClassificationRecipe, find
from fgpt.tokenizers.tiktoken_bpe import from_ranks

NANO = fgpt.tokenizer("nano")
BARE = PromptFrame((), (), (), ())


# -------------------------------------------------------------------------------------------------- laying out, packing


frames = st.builds(
    lambda b, m, a, g: PromptFrame(tuple(range(100, 100 + b)), (200,) * m, tuple(range(300, 300 + a)), (400,) * g),
    st.integers(0, 5), st.integers(1, 2), st.integers(0, 5), st.integers(1, 2),
)  # fmt: skip


@given(st.lists(st.integers(1, 60), min_size=1, max_size=2), frames, st.integers(24, 70))
def test_nothing_of_the_frame_is_lost_and_texts_keep_head_and_tail(lengths: list[int], around: PromptFrame, width: int):
    texts = [[1000 * (i + 1) + j for j in range(n)] for i, n in enumerate(lengths)]
    room = width - len(around.before) - len(around.after) - len(around.between) * (len(texts) - 1)
    if len(texts) == 2 and min(lengths) > room:
        with pytest.raises(InputError, match="both texts are too long"):
            assemble(texts, around, width)
        return
    tokens, whole = assemble(texts, around, width)
    assert whole == (sum(lengths) <= room)
    assert len(tokens) == width - room + (sum(lengths) if whole else room)
    assert tokens[: len(around.before)] == around.before
    assert tokens[len(tokens) - len(around.after) :] == around.after
    middle = tokens[len(around.before) : len(tokens) - len(around.after)]
    parts = [[t for t in middle if t // 1000 == i + 1] for i in range(len(texts))]
    assert len(middle) == sum(map(len, parts)) + middle.count(400) + middle.count(200)
    if len(texts) == 2:
        assert middle.count(200) == len(around.between)
        last, first = (middle.index(x) for x in (parts[0][-1], parts[1][0]))
        assert middle[last + 1 : first] == around.between  # the separator, whole, between the two
    for text, part in zip(texts, parts, strict=True):
        if part != text:
            head = next(i for i, (a, b) in enumerate(zip(text, part, strict=False)) if a != b)
            assert part[:head] == text[:head]
            assert part[head:] == text[len(text) - len(part) + head :]
            assert 0 <= head - (len(part) - head) <= 1  # as much of the head as of the tail
            at = middle.index(part[head - 1]) + 1
            assert middle[at : at + len(around.ellipsis)] == around.ellipsis
    if len(texts) == 2 and not whole and min(lengths) <= room // 2:
        assert texts[lengths.index(min(lengths))] in parts  # the shorter stays whole while the longer can give way


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.integers(30, 90))
def test_a_category_is_asked_for_after_any_text(text: str, width: int):
    wording = PromptWording("Sort into {labels}.\n", "Text:\n", "\nCategory:")
    around = prompt_frame(wording, ["joy", "fear"], NANO, append_eos=False)
    (example,), _ = encode(
        [LabeledText(text * 4, label="fear")], verbalizers(["joy", "fear"], NANO), around, NANO, width
    )
    output = NANO.decode(list(example.tokens))
    assert output.startswith("Sort into joy, fear.\nText:\n")
    assert output.endswith("\nCategory:")
    assert NANO.decode([example.label or 0]) == " fear"
    assert len(example.tokens) <= width
    batch = collate([[example]])
    assert batch.weights.sum() == 1
    assert batch.weights[0, len(example.tokens) - 1] == 1
    assert batch.targets[0, len(example.tokens) - 1] == example.label


def test_the_end_is_read_and_the_separator_is_attended():
    around = prompt_frame(PromptWording(), ["a", "b"], NANO, append_eos=True)
    (pair,), cut = encode([LabeledText("A fox.", "A dog.", "b")], class_labels(["a", "b"]), around, NANO, 40)
    assert pair.tokens == (*NANO.encode("A fox."), NANO.eos_token_id, *NANO.encode("A dog."), NANO.eos_token_id)
    assert (pair.label, cut) == (1, 0)
    params = fgpt.load("nano")
    other = list(pair.tokens)
    other[len(NANO.encode("A fox."))] = 11  # another token where the separator was
    a, b = (fgpt.hidden(params, torch.tensor([x]))[0, -1] for x in (list(pair.tokens), other))
    assert not torch.allclose(a, b, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- labels


@given(st.permutations([LabeledText("t", label=x) for x in ("b", "c", "a", "b")]))
def test_labels_are_sorted_or_as_given_whatever_the_rows_order(found: list[LabeledText]):
    assert resolve_labels((), found, found)[0] == ("a", "b", "c")
    names, train, _ = resolve_labels(("c", "a=fear", " b = joy "), found, found)
    assert names == ("c", "fear", "joy")
    assert [x.label for x in train] == [{"a": "fear", "b": "joy", "c": "c"}[x.label] for x in found]


def test_labels_as_tokens_are_one_each():
    assert verbalizers(["joy", "fear"], NANO).output_ids == (NANO.encode(" joy")[0], NANO.encode(" fear")[0])
    with pytest.raises(
        InputError, match=r"^label 'hate' is 2 tokens \(' h.*'\), expected one: .*hate=WORD in `labels`"
    ):
        verbalizers(["joy", "hate"], NANO)
    with pytest.raises(InputError, match="label 'joy' is the same token as one before it"):
        verbalizers(["joy", "joy"], NANO)


def test_gpt2_has_a_token_for_each_label_of_the_runs(shared_data: SharedData):
    gpt2 = from_ranks(shared_data("gpt2-bpe") / "gpt2.tiktoken")
    assert len(set(verbalizers(find("hate-gptj-ln").labels, gpt2).output_ids)) == 3  # pyright: ignore[reportAttributeAccessIssue]


def test_shots_are_balanced_and_a_function_of_the_key():
    found = [LabeledText(f"t{i}", label="a" if i % 5 else "b") for i in range(40)]
    shots = sample_shots(found, ("a", "b"), 7, fgpt.key(0))
    assert Counter(x.label for x in shots) == {"a": 4, "b": 3}
    assert len(set(shots)) == 7
    assert shots == sample_shots(found, ("a", "b"), 7, fgpt.key(0)) != sample_shots(found, ("a", "b"), 7, fgpt.key(1))
    with pytest.raises(InputError, match="20 shots need 10 of 'b', but there are 8: lower `num_fewshot`"):
        sample_shots(found, ("a", "b"), 20, fgpt.key(0))
    around = prompt_frame(
        PromptWording("Do.\n", "Text:\n", "\nSo:"), ("a", "b"), NANO, append_eos=False, shots=shots[:2]
    )
    one, two = shots[:2]
    assert NANO.decode(list(around.before)) == (
        f"Do.\nText:\n{one.text}\nSo: {one.label}\n\nText:\n{two.text}\nSo: {two.label}\n\nText:\n"
    )


# ----------------------------------------------------------------------------------------------------------- bad input


def test_texts_and_rows_that_code_gives():
    with pytest.raises(InputError, match=r"^the text is empty"):
        encode([LabeledText(" ")], class_labels("ab"), BARE, NANO, 9)


def test_a_run_s_frame_has_an_end_for_classes_alone():
    run = find("hate-smollm2-ln")
    assert isinstance(run, ClassificationRecipe)
    assert NANO.decode(list(prompt_frame_of(run, run.labels, NANO).after)) == "\nCategory:"
    small = find("emotion-small")
    assert isinstance(small, ClassificationRecipe)
    assert prompt_frame_of(small, ("a", "b"), NANO).after == (NANO.eos_token_id,)
