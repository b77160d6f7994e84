"""Classification: a head or a token for each label, what is never cut, packed scoring, and what bad input brings."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from builders import ROOT, SharedData, same, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import fgpt
from experiments.bench.load import SHAPE
from fgpt.cli.evaluation.metrics.classes import majority, plot_confusion, scores
from fgpt.cli.inference.classifiers import (
    common_prefix_length,
    load_classifier,
    log_probabilities,
    predict,
    prompt_frame_of,
    with_head,
)
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.training.classification import build_trainable
from fgpt.cli.training.examples import load_classification_split, load_test_texts
from fgpt.data.classification_datasets import HUB_DATASETS, Columns, load_labeled_texts
from fgpt.data.classification_prompts import (
    LabeledText,
    Labels,
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
from fgpt.data.packing import collate, epoch_batches
from fgpt.data.prompt_templates import Example
from fgpt.errors import InputError
from fgpt.model import Config, abstract_params
from fgpt.recipes import RECIPES, ClassificationRecipe, find
from fgpt.tokenizers.tiktoken_bpe import from_ranks
from fgpt.tree import leaves

NANO = fgpt.tokenizer("nano")
BARE = PromptFrame((), (), (), ())


# ------------------------------------------------------------------------------------------------------------ the head


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
    with pytest.raises(InputError, match="num_classes is 1: expected 2 or more"):
        fgpt.with_classification_head(base, 1, fgpt.key(0))


def test_logits_are_those_of_transformers(tmp_path: Path):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=24, vocab_size=31, pad_token_id=0)
    config.num_labels = 5
    theirs = GPT2ForSequenceClassification(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
    model = GPT2LMHeadModel(config)
    model.transformer.load_state_dict(theirs.transformer.state_dict())
    model.save_pretrained(tmp_path)
    params = fgpt.with_classification_head(fgpt.load(str(tmp_path)), 5, fgpt.key(0))
    params = fgpt.adapt(params, {"head.w": theirs.score.weight.detach()})
    lengths = (7, 24, 1)
    texts = [torch.randint(1, 31, (n,), generator=rng).tolist() for n in lengths]
    padded = torch.tensor([text + [0] * (24 - len(text)) for text in texts])
    wanted = theirs(padded, attention_mask=torch.tensor([[1] * n + [0] * (24 - n) for n in lengths])).logits
    examples = [Example(tuple(text), len(text), 0) for text in texts]
    found = log_probabilities(params, examples, class_labels("abcde"), 24)
    torch.testing.assert_close(found, wanted.detach().log_softmax(-1), atol=1e-5, rtol=0)


def test_gradient_is_that_of_cross_entropy_at_the_last_tokens():
    params = fgpt.with_classification_head(tiny(), 3, fgpt.key(0))
    texts = [((1, 2, 3), 0), ((4, 5), 2), ((6, 7, 8, 9), 1)]
    batch = collate([[Example(tokens, len(tokens), label) for tokens, label in texts]])
    trained = fgpt.trainable_leaves(params, r"head\..*") | fgpt.trainable_leaves(params, r".*ln_.*")
    got = torch.func.grad(lambda a: fgpt.loss(fgpt.adapt(params, a), batch))(trained)

    def plainly(a: fgpt.Adapters) -> torch.Tensor:
        each = [fgpt.apply(fgpt.adapt(params, a), torch.tensor([tokens]))[0, -1] for tokens, _ in texts]
        return torch.nn.functional.cross_entropy(torch.stack(each), torch.tensor([label for _, label in texts]))

    wanted = torch.func.grad(plainly)(trained)
    for path, x in got.items():
        torch.testing.assert_close(x, wanted[path], atol=1e-6, rtol=1e-4)


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
    said = NANO.decode(list(example.tokens))
    assert said.startswith("Sort into joy, fear.\nText:\n")
    assert said.endswith("\nCategory:")
    assert NANO.decode([example.label or 0]) == " fear"
    assert len(example.tokens) <= width
    batch = collate([[example]])
    assert batch.weights.sum() == 1
    assert batch.weights[0, len(example.tokens) - 1] == 1
    assert batch.targets[0, len(example.tokens) - 1] == example.label


def test_the_end_is_read_and_the_separator_is_attended():
    around = prompt_frame(PromptWording(), ["a", "b"], NANO, append_eos=True)
    (pair,), cut = encode([LabeledText("A fox.", "A dog.", "b")], class_labels(["a", "b"]), around, NANO, 40)
    assert pair.tokens == (*NANO.encode("A fox."), NANO.eos, *NANO.encode("A dog."), NANO.eos)
    assert (pair.label, cut) == (1, 0)
    params = fgpt.load("nano")
    other = list(pair.tokens)
    other[len(NANO.encode("A fox."))] = 11  # another token where the separator was
    a, b = (fgpt.hidden(params, torch.tensor([x]))[0, -1] for x in (list(pair.tokens), other))
    assert not torch.allclose(a, b, atol=1e-3)


labeled = st.builds(
    lambda tokens, label: Example(tuple(tokens), len(tokens), label),
    st.lists(st.integers(0, 30), min_size=1, max_size=9),
    st.integers(0, 2),
)


@given(st.lists(labeled, min_size=1, max_size=12), st.integers(0, 5))
def test_packing_keeps_every_label_at_its_text_s_end(examples: list[Example], seed: int):
    seen: Counter[tuple[int, ...]] = Counter()
    for rows_ in epoch_batches(examples, 12, 2, fgpt.key(seed)):
        batch = collate(rows_)
        assert batch.weights.sum() == sum(len(row) for row in rows_)
        ends = [
            (r, sum(len(x.tokens) for x in row[: i + 1]) - 1) for r, row in enumerate(rows_) for i in range(len(row))
        ]
        assert batch.weights.nonzero().tolist() == [list(end) for end in ends]
        for (r, at), x in zip(ends, (x for row in rows_ for x in row), strict=True):
            assert batch.targets[r, at] == x.label
            seen[(*x.tokens, x.label or 0)] += 1
    assert seen == Counter((*x.tokens, x.label or 0) for x in examples)


@given(st.lists(labeled, min_size=1, max_size=20), st.integers(9, 24))
def test_packed_scoring_is_scoring_one_by_one(examples: list[Example], width: int):
    params = fgpt.with_classification_head(tiny(), 3, fgpt.key(1))
    packed = log_probabilities(params, examples, class_labels("abc"), width)
    with torch.no_grad():
        alone = torch.stack([fgpt.apply(params, torch.tensor([x.tokens]))[0, -1].log_softmax(-1) for x in examples])
        few = torch.stack(
            [fgpt.apply(tiny(), torch.tensor([x.tokens]))[0, -1, [7, 3]].log_softmax(-1) for x in examples]
        )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        log_probabilities(tiny(), examples, Labels(("x", "y"), (7, 3)), width), few, atol=1e-5, rtol=0
    )


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 99))
def test_what_all_begin_with_is_read_once(common: int, rows: int, seed: int):
    """As shots are: the scores are those of each alone, and fewer tokens are read where it pays."""
    head = tokens(31, common, seed=seed).tolist()
    tails = [tokens(31, 1 + (seed + i) % 5, seed=seed + i + 1).tolist() for i in range(rows)]
    examples = [Example((*head, *tail), common + len(tail), 0) for tail in tails]
    assert common_prefix_length([x.tokens for x in examples]) >= min(common, min(len(x.tokens) for x in examples) - 1)
    params, read = fgpt.with_classification_head(tiny(), 3, fgpt.key(1)), []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for name in ("hidden", "forward_with_cache"):
            real = getattr(fgpt, name)
            patch.setattr(
                f"fgpt.cli.inference.classifiers.{name}",
                lambda p, x, *rest, real=real: read.append(x.numel()) or real(p, x, *rest),
            )
        found = log_probabilities(params, examples, class_labels("abc"), 24)
        alone = torch.stack([fgpt.apply(params, torch.tensor([x.tokens]))[0, -1].log_softmax(-1) for x in examples])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    if common > 5:
        assert sum(read) <= common + 5 * rows
    assert common_prefix_length([(1, 2, 3), (1, 2)]) == 1
    assert common_prefix_length([(1, 2, 3), (1, 3, 3)]) == 1
    assert common_prefix_length([(1,), (1,)]) == 0


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


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand(tmp_path: Path):
    """Of 6 rows 3 are told right; F1 is 2·2/(2·2+1+1) for a, 2·1/(2·1+1+1) for b, and 0 for c."""
    truth, told = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 0]
    found = scores(truth, told, 3)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx([2 / 3, 1 / 2, 0])
    assert found["macro_f1"] == pytest.approx(7 / 18)
    assert found["confusion"] == [[2, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert majority([1, 1, 0, 2], truth, 3)["accuracy"] == pytest.approx(2 / 6)
    assert majority([0, 1], truth, 3)["confusion"] == [[3, 0, 0], [2, 0, 0], [1, 0, 0]]
    plot_confusion(found, ["a", "b", "c"], tmp_path / "c.png", "by hand")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_scores_are_scikit_learn_s(pairs: list[tuple[int, int]]):
    truth, told = [a for a, _ in pairs], [b for _, b in pairs]
    found = scores(truth, told, 4)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, told, average="macro"))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert all(found["confusion"][a][b] == pairs.count((a, b)) for a in range(4) for b in range(4))


# ------------------------------------------------------------------------------------------------------------- sources


def test_files_of_labeled_texts(tmp_path: Path):
    (tmp_path / "a.txt").write_text("i am; sad;sadness\n\n hooray ;joy\n", encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.txt")) == [
        LabeledText("i am; sad", "", "sadness"),
        LabeledText("hooray", "", "joy"),
    ]
    assert load_labeled_texts(str(tmp_path / "a.txt"))[1].where == f"{tmp_path / 'a.txt'}, line 3"
    (tmp_path / "a.csv").write_text('label,text\n2,"so, ""so"""\n', encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.csv")) == [LabeledText('so, "so"', "", "2")]
    (tmp_path / "a.tsv").write_text('index\ts1\ts2\tlabel\n0\t"We know\tIt "is"\tyes\n', encoding="utf-8")
    assert load_labeled_texts(str(tmp_path / "a.tsv"), columns=Columns("s1", "s2")) == [
        LabeledText('"We know', 'It "is"', "yes")
    ]


@pytest.mark.parametrize(
    ("name", "split", "columns", "count", "labels"),
    [
        ("emotion/train.txt", "train", None, 16000, {"sadness", "joy", "love", "anger", "fear", "surprise"}),
        ("davidson/val.csv", "test", None, 200, {"hate", "offensive", "neutral"}),
        ("davidson/labeled_data.csv", "train", Columns("tweet", label="class"), 24783, {"0", "1", "2"}),
        ("rte/dev.tsv", "test", Columns("sentence1", "sentence2"), 277, {"entailment", "not_entailment"}),
    ],
)
def test_real_files(
    name: str, split: str, columns: Columns | None, count: int, labels: set[str], shared_data: SharedData
):
    found = load_labeled_texts(str(shared_data(name)), split, columns)  # pyright: ignore[reportArgumentType]
    assert len(found) == count
    assert {row.label for row in found} == labels


def put(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the format of the file's name, as pandas and json write them."""
    texts = [{name: "" if x is None else str(x) for name, x in record.items()} for record in records]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{record['text']};{record['label']}\n" for record in texts))
    elif path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        table = [{"text": "text", "label": "label"}, *texts]
        path.write_text("".join(f"{row['text']}{mark}{row['label']}\n" for row in table))
    else:
        lines = [json.dumps(record) for record in records]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


@pytest.mark.parametrize("end", FORMATS)
@pytest.mark.parametrize(
    ("given_labels", "labels"),
    [
        ([1, 0, 12], ["1", "0", "12"]),
        ([1.0, 0.0, -2.0], ["1", "0", "-2"]),
        (["1", "1.0", "0.00"], ["1", "1", "0"]),
        ([0.5, 2.25, 1e3], ["0.5", "2.25", "1000"]),
        ([True, False, True], ["True", "False", "True"]),
        (["01", "v1.0", "none"], ["01", "v1.0", "none"]),
    ],
)
def test_labels_have_one_rule(given_labels: list[Any], labels: list[str], end: str, tmp_path: Path):
    records = [{"text": f"text {i}", "label": label} for i, label in enumerate(given_labels)]
    assert [row.label for row in load_labeled_texts(str(put(tmp_path / f"a{end}", records)))] == labels


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [None, float("nan"), "", "nan", "NaN", "<NA>"])
@pytest.mark.parametrize("end", FORMATS)
def test_a_row_without_a_text_or_a_label_is_refused(end: str, value: Any, column: str, tmp_path: Path):
    records = [{"text": "a", "label": "b"}, {"text": "a", "label": "b"} | {column: value}]
    if end == ".parquet" and isinstance(value, float):
        records = [{"text": "a", "label": 1.0}, {"text": "a", "label": value}]
        column = "label"
    with pytest.raises(
        InputError, match=rf"(line|row) [23]: column '{column}' (is empty|holds .* means a missing value)"
    ):
        load_labeled_texts(str(put(tmp_path / f"a{end}", records)))


def test_a_file_to_train_on_is_scored_on_its_own_rows(tmp_path: Path):
    """A recipe's own test set is that of its own data."""
    path = put(tmp_path / "mine.csv", [{"text": f"text {i}", "label": i % 2} for i in range(400)])
    for name in ("emotion-small", "rte-small-lora"):
        run = find(name)
        assert isinstance(run, ClassificationRecipe)
        assert run.test is None
        mine = replace(run, train=str(path), columns=Columns(), labels=(), num_heldout=40)
        train, test = load_classification_split(mine)
        assert (len(train), len(test)) == (360, 40)
        assert {row.text for row in train} | {row.text for row in test} == {f"text {i}" for i in range(400)}
        given_test = replace(mine, test=str(put(tmp_path / "test.csv", [{"text": "x", "label": 0}])))
        assert [len(part) for part in load_classification_split(given_test)] == [400, 1]
        assert load_test_texts(given_test) == load_classification_split(given_test)[1]


def test_folders_and_the_hub_s_cache(tmp_path: Path):
    """A split of a local folder, and a dataset of the hub that was fetched before, its classes by name."""
    data = tmp_path / "mine" / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"text": split, "label": 1}])
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    snapshot = tmp_path / "hub" / "datasets--dair-ai--emotion" / "snapshots" / "abc"
    (snapshot / "split").mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"text": "oh", "label": 5}, {"text": "hm", "label": 0}]),
        snapshot / "split" / "test-00000-of-00001.parquet",
    )
    code = """
import sys
from fgpt.data.classification_datasets import load_labeled_texts
for source, split in (("mine", "test"), ("mine", "train"), ("emotion", "test"), ("emotion", "train")):
    try:
        print([(row.text, row.label) for row in load_labeled_texts(source, split)])
    except Exception as err:
        print(type(err).__name__, err)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:3] == ["[('test', '1')]", "[('train', '1')]", "[('oh', 'surprise'), ('hm', 'sadness')]"]
    assert said[3].startswith("InputError the hub gave no 'emotion' (")
    assert "give a file instead" in said[3]
    assert HUB_DATASETS["rte"].files["test"] == "rte/validation-*.parquet"


# ---------------------------------------------------------------------------------------------------------------- runs

GLAD = ("happy", "glad", "proud", "kind")
SAD = ("sad", "scared", "lost", "mean")
NEW = ("a dog", "Tim", "the bird", "Sue", "a fox", "her mom", "the cat", "Ben")


@pytest.fixture(scope="module")
def feelings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a task that a small model can learn: is somebody glad or not?"""
    path = tmp_path_factory.mktemp("feelings")
    said = [(f"One day, {who} was {how}.", "joy" if how in GLAD else "fear") for who in NEW for how in GLAD + SAD]
    (path / "test.txt").write_text("\n".join(f"{text};{label}" for text, label in said[:16]))
    (path / "train.txt").write_text("\n".join(f"{text};{label}" for text, label in said[16:]))
    return ["--base", "nano", "--train", str(path / "train.txt"), "--test", str(path / "test.txt")]


SHORT = [
    "--steps",
    "25",
    "--micro-batch-size",
    "1",
    "--max-seq-len",
    "256",
    "--warmup-steps",
    "3",
    "--lr",
    "6e-3",
    "--adapter.kind",
]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_head_of_classes_learns(kind: str, feelings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rate = ["--lr", "1e-3"] if kind == "full" else []
    assert main(["train", "emotion-small", *feelings, *SHORT, kind, *rate, "--out", str(tmp_path)]) == 0
    out = tmp_path / "emotion-small"
    assert {p.name for p in out.iterdir()} == {
        *("run.json", "status.json", "environment.json", ".lock", "metrics.jsonl", "tensorboard", "loss.png"),
        *("checkpoints", "adapter", "metrics.json", "confusion.png", "local.json"),
    }
    assert len(read_metrics(out / "metrics.jsonl")) == 25
    found = json.loads((out / "metrics.json").read_text())
    assert found["labels"] == ["fear", "joy"]
    assert found["scores"]["tuned"]["accuracy"] > 0.9
    assert found["scores"]["majority-class baseline"]["accuracy"] == 0.5
    trained = load_classifier(out)  # from its files alone
    assert isinstance(trained.recipe, ClassificationRecipe)
    test = load_labeled_texts(feelings[-1])
    told = predict(trained, [LabeledText(row.text) for row in test]).argmax
    assert sum(a == b.label for a, b in zip(told, test, strict=True)) / 16 == found["scores"]["tuned"]["accuracy"]
    with pytest.raises(InputError, match="has a head of its own labels, fear, joy: leave --labels out"):
        predict(trained, test, ["yes", "no"])
    assert main(["generate", str(out), "hi"]) == 2
    assert "is no run of instructions: just classify tells its labels" in capsys.readouterr().err.splitlines()[-1]


def test_a_label_as_the_next_token_learns(feelings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wording = ["--prompt.instruction", "One of {labels}.\n", "--prompt.suffix", " It was"]
    labels = ["--labels", "joy=love", "fear"]
    run = ["emotion-small", "--head", "lm", "--num-fewshot", "4", *feelings, *wording, *labels]
    assert main(["train", *run, *SHORT, "lora", "--out", str(tmp_path)]) == 0
    out = tmp_path / "emotion-small"
    assert "base: accuracy" in capsys.readouterr().err
    found = json.loads((out / "metrics.json").read_text())
    assert found["labels"] == ["love", "fear"]
    assert found["scores"].keys() == {"majority-class baseline", "base", "base, 4 shots", "tuned"}
    assert found["scores"]["tuned"]["accuracy"] > 0.9 > found["scores"]["base"]["accuracy"]
    assert (out / "adapter" / "adapter_config.json").exists()  # PEFT's
    trained = load_classifier(out)
    texts = [LabeledText("One day, the king was happy."), LabeledText("One day, the king was scared.")]
    assert predict(trained, texts).argmax == ["love", "fear"]
    others = predict(trained, texts, ["yes", "no"])  # labels that it has not been trained on
    assert others.names == ("yes", "no")
    assert torch.allclose(others.probabilities.sum(-1), torch.ones(2))
    with pytest.raises(InputError, match="label 'hate' is 2 tokens"):
        predict(trained, texts, ["hate", "no"])


def test_pairs_train_over_a_quantized_base(tmp_path: Path):
    entails = [(f"{a} saw {b}.", f"{c} saw {b}.", "yes" if a == c else "no") for a in NEW for b in NEW[:2] for c in NEW]
    lines = ["sentence1\tsentence2\tlabel", *("\t".join(row) for row in entails)]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    options = ["--base", "nano", "--train", str(tmp_path / "a.tsv"), "--test", str(tmp_path / "a.tsv")]
    options += [
        "--labels",
        "yes",
        "no",
        "--quantize",
        "nf4",
        "--steps",
        "3",
        "--max-seq-len",
        "24",
        "--micro-batch-size",
        "4",
    ]
    assert main(["train", "rte-small-lora", *options, "--out", str(tmp_path / "out")]) == 0
    base = fgpt.with_classification_head(fgpt.load("nano"), 2, fgpt.key(0))
    assert "head.w" in fgpt.load_peft(tmp_path / "out" / "rte-small-lora" / "adapter", base)


GPT2 = Config(12, 12, 768, 1024, 50257, 3072)


@pytest.mark.parametrize(
    ("name", "cfg", "classes", "trained"),
    [
        ("emotion-small", GPT2, 6, 589_824 + 6 * 768),
        ("rte-small-lora", GPT2, 2, 589_824 + 2 * 768),
        ("hate-gptj-ln", SHAPE, 3, 861_408),
        ("hate-gptj-lora", SHAPE, 3, 2_696_416),
        ("hate-gptj-all", SHAPE, 3, 5_208_160),
    ],
)
def test_what_the_runs_train(name: str, cfg: Config, classes: int, trained: int):
    run = find(name)
    assert isinstance(run, ClassificationRecipe)
    assert fgpt.num_trainable(build_trainable(run, with_head(run, abstract_params(cfg), ["x"] * classes))) == trained
    assert f"{trained:,}" in (RECIPES[name].__doc__ or "")


# ----------------------------------------------------------------------------------------------------------- bad input

GOOD = "i am glad;joy\ni am sad;fear\n" * 4


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        ("i am glad\n", GOOD, [], r"train\.txt, line 1: no ';': expected text;label"),
        ("i am glad;joy\n\n  ;fear", GOOD, [], r"train\.txt, line 3: column 'text' is empty"),
        ("i am glad;", GOOD, [], r"train\.txt, line 1: column 'label' is empty"),
        ("", GOOD, [], r"train\.txt: the file is empty, expected rows"),
        ("\n\n", GOOD, [], r"train\.txt: it holds no rows"),
        (GOOD, "who;anger", [], r"test\.txt, line 1: label 'anger', expected one of fear, joy: fix the row"),
        (GOOD, GOOD, ["--labels", "joy"], r"labels are joy: expected at least two"),
        (GOOD, GOOD, ["--labels", "joy", "love"], r"line 2: label 'fear', expected one of joy, love"),
        (
            GOOD,
            GOOD,
            ["--labels", "joy", "fear", "love"],
            r"label 'love' has no training row: add some, or leave it out",
        ),
        (GOOD, GOOD, ["--labels", "joy", "fear", "joy"], r"one is there twice"),
        (GOOD, GOOD, ["--labels", "joy=x", "fear=x"], r"one is there twice"),
        ("i am glad;joy", GOOD, [], r"labels are joy: expected at least two"),
        (GOOD, GOOD, ["--head", "lm", "--labels", "joy", "fear=hate"], r"label 'hate' is 2 tokens \(' h"),
        (GOOD, GOOD, ["--num-fewshot", "2"], r"--num-fewshot 2 needs labels as next tokens: give --head tokens"),
        (
            GOOD,
            GOOD,
            ["--head", "lm", "--num-fewshot", "20"],
            r"20 shots need 10 of 'fear', but there are 4: lower --num-fewshot",
        ),
        (GOOD, GOOD, ["--head", "classy"], r"classy"),
        (
            GOOD,
            GOOD,
            ["--max-seq-len", "3"],
            r"line 1: the words around a text take 1 of 3 tokens, which leaves too few",
        ),
        (GOOD, GOOD, ["--columns.text2", "more"], r"line 1: no column 'more'; there are 'text', 'label': name the"),
        (GOOD, GOOD, ["--columns.label", "class"], r"line 1: no column 'class'; .*--columns\.label"),
        (GOOD, GOOD, ["--test", "davidson"], r"davidson has no test split on the hub: leave --test out"),
        (GOOD, GOOD, ["--test", "gone.txt"], r"gone\.txt: no such file; expected a path or one of emotion, "),
        (
            GOOD,
            GOOD,
            ["--train", "emotions"],
            r"unknown source 'emotions': expected one of emotion, rte, davidson, or ",
        ),
        (
            "i am glad;joy",
            GOOD,
            ["--test", "None"],
            r"train\.txt has 1 rows: expected 2 or more, one of them to be held",
        ),
        (GOOD, GOOD, ["--tune-also", "nothing"], r"'nothing' matches no path"),
        (GOOD, GOOD, ["--adapter.target", "nothing"], r"'nothing' matches no path"),
        (GOOD, GOOD, ["--device", "cuda:99"], r"device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_one_line(
    train: str, test: str, options: list[str], message: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text(train)
    Path("test.txt").write_text(test)
    files = ["--train", "train.txt", "--test", "test.txt"]
    assert main(["train", "emotion-small", "--base", "nano", *files, *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert re.search(message, said[0]), said[0]
    assert {p.name for p in tmp_path.iterdir()} == {"train.txt", "test.txt"}  # nothing half-made


def test_pairs_that_are_too_long_or_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    long = "a fox ran home " * 20
    (tmp_path / "a.tsv").write_text(f"sentence1\tsentence2\tlabel\na\tb\tyes\na\tb\tno\n{long}\t{long}\tno\n")
    run = ["train", "rte-small-lora", "--base", "nano", "--labels", "yes", "no", "--test", str(tmp_path / "a.tsv")]
    out = ["--train", str(tmp_path / "a.tsv"), "--out", str(tmp_path / "out"), "--max-seq-len", "40"]
    assert main([*run, *out]) == 2
    said = capsys.readouterr().err.strip()
    assert "a.tsv, line 4: both texts are too long, 80 and 80 tokens where there is room for 38 in all" in said
    assert "\n" not in said
    (tmp_path / "a.tsv").write_text("sentence1\tsentence2\tlabel\na\t\tyes\n")
    assert main([*run, *out]) == 2
    assert "line 2: column 'sentence2' is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_and_rows_that_code_gives():
    with pytest.raises(InputError, match=r"^the text is empty"):
        encode([LabeledText(" ")], class_labels("ab"), BARE, NANO, 9)


def test_a_run_s_frame_has_an_end_for_classes_alone():
    run = find("hate-smollm2-ln")
    assert isinstance(run, ClassificationRecipe)
    assert NANO.decode(list(prompt_frame_of(run, run.labels, NANO).after)) == "\nCategory:"
    small = find("emotion-small")
    assert isinstance(small, ClassificationRecipe)
    assert prompt_frame_of(small, ("a", "b"), NANO).after == (NANO.eos,)
