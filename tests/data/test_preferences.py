"""Preference pairs and judged answers, in every format; rows that teach nothing are refused by their place."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from builders import SharedData
from builders.conversations import TALK, messages_row, write_json_rows
from datasets import Dataset
from trl.data_utils import unpair_preference_dataset

from fgpt.data.conversations import Message
from fgpt.data.preferences import (
    PreferenceColumns,
    load_judgments,
    load_preferences,
    read_judgments,
    read_preferences,
)
from fgpt.errors import InputError

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("4", "5"))
GPT_GOOD, GPT_BAD = {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
        {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"messages": [ASK], "chosen": "4", "rejected": "5"},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": GPT_GOOD, "rejected": GPT_BAD},
        {"conversations": json.dumps([ASK]), "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "system": "Be kind."},
        {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "system": "Be kind."},
        {"prompt": "2 + 2?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, BAD]},
        {"prompt": "2 + 2?", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
    ],
)
def test_pairs_of_every_format(record: dict[str, Any], tmp_path: Path):
    (pair,) = load_preferences(write_json_rows(tmp_path / "a.jsonl", record))
    assert pair.prompt == messages_row(*([SYSTEM] if "Be kind." in json.dumps(record) else []), ASK)
    assert (pair.chosen, pair.rejected) == (messages_row(GOOD), messages_row(BAD))
    assert pair.where.endswith("a.jsonl, line 1")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2 + 2?", "completion": "4", "label": True},
        {"prompt": [ASK], "completion": [GOOD], "label": "true"},
        {"messages": [ASK, GOOD], "label": 1},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, GPT_GOOD], "kto_tag": True},
    ],
)
def test_judgments_of_every_format(record: dict[str, Any], tmp_path: Path):
    other = record | {name: False for name in ("label", "kto_tag") if name in record}
    good, bad = load_judgments(write_json_rows(tmp_path / "a.jsonl", record, other))
    assert (good.messages, good.answer) == (messages_row(ASK), messages_row(GOOD))
    assert (good.label, bad.label) == (True, False)


def test_pairs_are_judgments_as_trl_takes_them_apart(tmp_path: Path):
    """The same answers with the same labels; TRL puts the good ones first."""
    pairs = [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [ASK | BAD]},
    ]
    path = write_json_rows(tmp_path / "a.jsonl", *pairs)
    theirs = unpair_preference_dataset(Dataset.from_list(pairs))
    expected = [(messages_row(*x["prompt"]), messages_row(*x["completion"]), x["label"]) for x in theirs.to_list()]
    got = [(row.messages, row.answer, row.label) for row in load_judgments(path)]
    assert sorted(got, key=repr) == sorted(expected, key=repr)
    assert [row[2] for row in got] == [True, False] * 2
    assert read_judgments(path).format == (
        f"{path}: preference pairs, each a good and a bad answer (columns prompt, chosen, rejected), 2 rows"
    )


def test_a_label_beside_a_pair_makes_it_a_judgment(tmp_path: Path):
    record = PAIR | {"completion": "4", "label": True}
    judgments = load_judgments(write_json_rows(tmp_path / "a.jsonl", record, record | {"label": False}))
    assert [(row.answer[0].content, row.label) for row in judgments] == [("4", True), ("4", False)]


def test_pairs_and_judgments_in_one_source_are_refused(tmp_path: Path):
    judged = {"prompt": "2 + 2?", "completion": "4", "label": True}
    for rows, message in [
        ((PAIR, judged), r"line 2: no column 'chosen'"),
        ((judged, PAIR), r"line 2: no column 'label'"),
    ]:
        with pytest.raises(InputError, match=message):
            load_judgments(write_json_rows(tmp_path / "a.jsonl", *rows))


def test_a_pair_without_a_difference_is_no_judgment(tmp_path: Path):
    with pytest.raises(InputError, match=r"line 1: chosen and rejected are the same answer: remove the row$"):
        load_judgments(write_json_rows(tmp_path / "a.jsonl", PAIR | {"rejected": "4"}))


def test_columns_by_other_names(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", {"q": "2 + 2?", "yes": "4", "no": "5"})
    (pair,) = load_preferences(path, PreferenceColumns(prompt="q", chosen="yes", rejected="no"))
    assert pair.chosen == (Message("assistant", "4"),)
    rows = [{"chat": [ASK, GOOD], "good": good} for good in (1, 0)]
    path = write_json_rows(tmp_path / "b.jsonl", *rows)
    assert len(load_judgments(path, PreferenceColumns(messages="chat", label="good"))) == 2


def test_real_files(shared_data: SharedData):
    pairs = load_preferences(shared_data("preference/dpo_en_demo.json"))
    assert len(pairs) == 300
    assert Counter(len(pair.prompt) for pair in pairs)[5] == 57
    assert all(pair.prompt[-1].role == "user" and len(pair.chosen) == len(pair.rejected) == 1 for pair in pairs)
    judgments = load_judgments(shared_data("preference/kto_en_demo.json"))
    assert (len(judgments), sum(row.label for row in judgments)) == (300, 150)


PAIR = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PAIR | {"rejected": "4"}, r"line 2: chosen and rejected are the same answer: remove the row"),
        (PAIR | {"chosen": ""}, r"line 2: chosen is empty: expected an answer"),
        (PAIR | {"rejected": None}, r"line 2: rejected is empty: expected an answer"),
        (PAIR | {"rejected": []}, r"line 2: rejected holds no answer of the assistant"),
        (PAIR | {"chosen": [ASK]}, r"line 2: chosen holds no answer of the assistant"),
        (PAIR | {"prompt": " "}, r"line 2: the prompt is empty: expected a message of the user"),
        (PAIR | {"prompt": TALK}, r"line 2: the prompt ends with an answer of the assistant"),
        (PAIR | {"chosen": [TALK[0], GOOD]}, r"line 2: chosen begins with a message of the user"),
        (PAIR | {"chosen": [{"role": "narrator", "content": "x"}]}, r"line 2, column 'chosen', message 1: unknown"),
        (PAIR | {"chosen": True}, r"line 2: column 'chosen' should hold text, got bool"),
        ({"chosen": "4", "rejected": "5"}, r"line 2: no column 'prompt'; there are 'chosen', 'rejected'"),
        ({"prompt": "a", "chozen": "4", "rejected": "5"}, r"line 2: no column 'chosen'; .*\(the nearest is 'chozen'\)"),
        (PAIR | {"chosen": [GOOD, ASK]}, r"line 2: chosen ends with a message of the user: expected an answer"),
        (PAIR | {"chosen": [{"role": "assistant", "content": ""}, ASK, GOOD]}, r"line 2: chosen is empty"),
        (PAIR | {"chosen": GOOD | {"weight": 0.5}}, r"line 2: chosen has a loss weight of 0.5: .*leave weights out"),
        (PAIR | {"chosen": GOOD | {"train": False}}, r"line 2: chosen has a loss weight of 0"),
        ({"messages": TALK}, r"line 2: no column 'chosen'; there are 'messages'"),
        ([TALK], r"line 2: expected an object of columns, got list"),
    ],
)  # fmt: skip
def test_bad_pairs_are_refused_by_their_row(record: Any, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as caught:
        load_preferences(write_json_rows(tmp_path / "a.jsonl", PAIR, record))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [ASK, GOOD], "label": "maybe"}, r"line 2: column 'label' is 'maybe', expected true or false"),
        ({"messages": [ASK, GOOD], "label": None}, r"line 2: column 'label' is None, expected true or false"),
        ({"messages": [ASK], "label": True}, r"line 2: the end of the conversation holds no answer"),
        ({"prompt": "a", "completion": "", "label": True}, r"line 2: completion is empty"),
        ({"completion": "a", "label": True}, r"line 2: no column 'prompt'"),
        ({"prompt": "a", "label": True}, r"line 2: no column 'completion'"),
        ({"messages": [ASK, GOOD]}, r"line 2: no column 'label'; there are 'messages'"),
        ({"messages": [ASK, GOOD], "label": False}, r"a\.jsonl: all 2 labels are false: expected both good and bad"),
    ],
)
def test_bad_judgments_are_refused_by_their_row(record: Any, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as caught:
        load_judgments(write_json_rows(tmp_path / "a.jsonl", {"messages": [ASK, GOOD], "label": False}, record))
    assert "\n" not in str(caught.value)


def test_columns_of_instructions_and_columns_that_are_not_there(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", PAIR)
    for columns, message in [
        (PreferenceColumns(text="prompt"), r"`columns\.text` is of instruction data"),
        (PreferenceColumns(prompt="question"), r"no column 'question'; there are"),
        (PreferenceColumns(messages="talk"), r"no column 'talk'; there are"),
        (PreferenceColumns(chosen="better"), r"no column 'better'; there are"),
    ]:
        with pytest.raises(InputError, match=message):
            load_preferences(path, columns)


def test_the_format_names_what_is_not_read(tmp_path: Path):
    path = write_json_rows(tmp_path / "a.jsonl", PAIR | {"score": 3, "system": "Be kind."})
    assert read_preferences(path).format == (
        f"{path}: preference pairs (columns {', '.join(x for x in [*PAIR, 'system'])}; not read: score), 1 row"
    )
    path = write_json_rows(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b", "label": True, "id": 1})
    assert read_judgments(path).format.endswith("(columns prompt, completion, label; not read: id), 1 row")


def test_an_empty_file(tmp_path: Path):
    (tmp_path / "a.json").write_text("[]")
    for load in (load_preferences, load_judgments):
        with pytest.raises(InputError, match=r"a\.json: it holds no rows, expected at least one$"):
            load(tmp_path / "a.json")
