"""Instruction rows in every format; files that are bad."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from builders import SharedData
from builders.datasets import JSON_ROWS, ROWS

import fgpt
from fgpt.data.conversations import Message
from fgpt.data.instruction_datasets import Columns, load_rows
from fgpt.data.packing import filter_by_length
from fgpt.data.prompt_templates import ALPACA, InstructionRow, Turn, encode
from fgpt.data.rows import turns_of
from fgpt.errors import InputError
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

TOKENIZER = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)


def test_every_format_gives_the_same_rows(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(JSON_ROWS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps(o, ensure_ascii=False) for o in JSON_ROWS), encoding="utf-8-sig"
    )
    (tmp_path / "a.CSV").write_text(
        'instruction,input,output\na,b,"c\n\u2028d"\n\né,,{x}\n', encoding="utf-8", newline=""
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(JSON_ROWS), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.CSV", "a.parquet"):
        assert load_rows(tmp_path / name) == ROWS, name
        assert load_rows(str(tmp_path / name), limit=1) == ROWS[:1]


def test_columns(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": 1, "a": 2.5, "input": null}')
    assert load_rows(file, Columns("q", output="a")) == [InstructionRow("1", "", "2.5")]
    assert load_rows(file, Columns("a", "q", "a")) == [InstructionRow("2.5", "1", "2.5")]
    file.write_text('{"conversations": ["hello", "good day", "more", "later"], "source": "x"}')
    messages = (Message("user", "hello"), Message("assistant", "good day"), Message("user", "more"))
    (conversation,) = load_rows(file)
    assert (conversation.instruction, conversation.output) == ("more", "later")
    assert [(row.messages, row.output) for row in turns_of([conversation]) if isinstance(row, Turn)] == [
        (messages[:1], "good day"),
        (messages, "later"),
    ]


PR, TL = Columns("p", output="r"), Columns("text", output="label")


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.json", "", Columns(), r"a\.json: the file is empty, expected rows$"),
        ("a.json", "[]", Columns(), r"a\.json: it holds no rows, expected at least one$"),
        ("a.json", '{"a": 1}', Columns(), r"a\.json: expected a list of objects, got dict: wrap the rows in \[ \]$"),
        (
            "a.json",
            '[{"instruction": "a", "output": "b"},\n {"a" 2}]',
            Columns(),
            r"line 2: not JSON \(Expecting ':' delimiter, column 7\)",
        ),
        ("a.json", '{"a": 1}\n{"a": 2}', Columns(), r"a\.json, line 2: not JSON .*name it \.jsonl$"),
        ("a.json", '["x"]', Columns(), r"a\.json, row 1: expected an object of columns, got str$"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b"}\n{oops}\n',
            Columns(),
            r"line 2: not JSON .*one object per line$",
        ),
        (
            "a.jsonl",
            '{"p": 1, "r": 2}',
            Columns(),
            r"line 1: no column 'instruction'; there are 'p', 'r': name ",
        ),
        ("a.jsonl", '{"p": 1, "r": 2}', Columns("p", "x", "r"), r"line 1: no column 'x'; there are 'p', 'r'"),
        (
            "a.jsonl",
            '\n{"p": ["z"], "r": "y"}',
            PR,
            r"line 2: column 'p' should hold text, got list",
        ),
        (
            "a.jsonl",
            '{"p": "z", "r": null}',
            PR,
            r"line 1: column 'r' should hold text, got null",
        ),
        (
            "a.jsonl",
            '{"p": "z", "r": true}',
            PR,
            r"line 1: column 'r' should hold text, got bool",
        ),
        ("a.csv", "label,text\n", TL, r"a\.csv: it holds no rows"),
        ("a.csv", "\ufeff", Columns(), r"a\.csv: it holds no rows"),
        (
            "a.csv",
            "label,text\nx,y\nx,y,z\n",
            TL,
            r"csv, line 3: 3 fields, but the header names 2",
        ),
        (
            "a.csv",
            'label,text\nx,"y\nz\n',
            TL,
            r"csv, line 3: not CSV \(unexpected end of data\)",
        ),
        ("a.parquet", "PAR1 no, not really PAR1", Columns(), r"a\.parquet: not a Parquet file \("),
        (
            "a.md",
            "hello",
            Columns(),
            r"a\.md: cannot tell its format; expected .* \.jsonl, ",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, columns: Columns, message: str):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_rows(tmp_path / name, columns)
    assert "\n" not in str(caught.value)


def test_not_text_and_not_there(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(InputError, match=r"a\.jsonl: not UTF-8 text \(.* at byte 7\): save it as UTF-8$"):
        load_rows(tmp_path / "a.jsonl")
    with pytest.raises(
        InputError, match=r"gone\.json: no such file; expected .* one of alpaca, dolly, finqa, lima, tulu$"
    ):
        load_rows(tmp_path / "gone.json")
    for name in ("alpacca", ""):
        with pytest.raises(
            InputError,
            match=rf"^unknown source '{name}': expected one of alpaca, dolly, finqa, lima, tulu, or the path",
        ):
            load_rows(name)
    with pytest.raises(InputError, match=r"^limit is 0, expected at least 1$"):
        load_rows("alpaca", limit=0)


@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        ("dolly/dolly_hhrlhf_train_small.jsonl", Columns("prompt", output="response"), 1000),
        ("dolly/dolly_finqa_val.jsonl", None, 796),
        ("lima/lima.json", None, 1029),
        ("alpaca_demo/alpaca_en_demo.json", None, 999),
        ("davidson/train.csv", TL, 1000),
        ("davidson/labeled_data.csv", Columns("tweet", output="class"), 24783),
    ],
)
def test_real_files(name: str, columns: Columns | None, count: int, shared_data: SharedData):
    found = load_rows(shared_data(name), columns)
    assert len(found) == count
    examples, dropped = filter_by_length([encode(row, ALPACA, TOKENIZER) for row in found[:200]], 512, drop=True)
    assert len(examples) + dropped.long + dropped.empty == 200
