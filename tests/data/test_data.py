"""Rows, templates, packing: what reaches the loss is what the files say, once, and no document sees another."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from builders import ROOT, SharedData
from hypothesis import given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.cli.evaluation.compare import prompt_file
from fgpt.cli.training.documents import read as read_documents
from fgpt.cli.training.examples import num_heldout
from fgpt.data import classification_datasets
from fgpt.data.conversations import Message
from fgpt.data.instruction_datasets import Columns, load_rows
from fgpt.data.packing import DropCounts, collate, epoch_batches, filter_by_length, pack
from fgpt.data.prompt_templates import ALPACA, PLAIN, TEMPLATES, Example, InstructionRow, Turn, encode, encode_prompt
from fgpt.errors import InputError
from fgpt.io.files import read_text
from fgpt.losses import nll
from fgpt.model import Config, hidden, init
from fgpt.rng import key
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

TOKENIZER = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
VOCAB = 40
GPT = init(Config(n_layer=2, n_head=2, d_model=16, n_ctx=64, vocab_size=VOCAB, d_mlp=32), key(0))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
row_texts = st.builds(InstructionRow, texts, texts, texts.filter(str.strip))


@st.composite
def documents(draw: st.DrawFn) -> Example:
    length = draw(st.integers(2, 20))
    tokens = draw(st.lists(st.integers(1, VOCAB - 1), min_size=length, max_size=length))
    return Example(tuple(tokens), draw(st.integers(0, length - 2)))


# --------------------------------------------------------------------------------------------------------- templates


def test_alpaca_is_stanfords_text():
    assert ALPACA.prompt(InstructionRow("Add.", "1 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert ALPACA.prompt(InstructionRow("Add.")) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert PLAIN.prompt(InstructionRow("Add.", " \n")) == "Instruction: Add.\n\nResponse:\n"


@given(row_texts, st.sampled_from(["alpaca", "plain", "tulu"]))
def test_training_and_generation_share_the_prompt(row: InstructionRow, name: str):
    example = encode(row, TEMPLATES[name], TOKENIZER)
    assert example.tokens[: example.prompt_length] == encode_prompt(
        InstructionRow(row.instruction, row.input), TEMPLATES[name], TOKENIZER
    )
    assert TOKENIZER.decode(list(example.tokens[: example.prompt_length])) == TEMPLATES[name].prompt(row)
    assert TOKENIZER.decode(list(example.tokens[example.prompt_length : -1])) == row.output
    assert example.tokens[-1] == TOKENIZER.eos
    assert example.tokens.count(TOKENIZER.eos) == 1


@pytest.mark.parametrize("text", ["{input}", "{", "{0}", "}{instruction}", "<|endoftext|>", "a {{b}}"])
def test_users_text_is_only_text(text: str):
    example = encode(InstructionRow(text, text, text), ALPACA, TOKENIZER)
    assert TOKENIZER.decode(list(example.tokens[:-1])).count(text) == 3
    assert example.tokens.count(TOKENIZER.eos) == 1


# ----------------------------------------------------------------------------------------------------------- packing


@given(st.lists(st.integers(0, 12), max_size=60))
def test_pack_is_first_fit(lengths: list[int]):
    bins: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = (b for b in bins if sum(lengths[j] for j in b) + length <= 12)
        home = next(room, None)
        bins.append([i]) if home is None else home.append(i)
    assert pack(lengths, 12) == bins


def test_pack_is_fast_and_tight():
    lengths = (torch.randn(52_000, generator=key(0)) * 0.6 + 4.6).exp().clamp(1, 512).long().tolist()
    begin = time.perf_counter()
    bins = pack(lengths, 512)
    assert time.perf_counter() - begin < 10  # 0.4 s alone on one core
    assert len(bins) < 1.02 * sum(lengths) / 512


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(InputError, match=r"^row 2 has 9 tokens, the limit is 8: .*"):
        pack([8, 9], 8)


@given(st.lists(documents(), min_size=1, max_size=40), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_an_epoch_loses_and_repeats_nothing(examples: list[Example], rows: int, packed: bool, seed: int):
    rng = key(seed)
    before = rng.get_state()
    batches = epoch_batches(examples, 24, rows, rng, packed)
    assert Counter(e for batch in batches for row in batch for e in row) == Counter(examples)
    assert all(sum(len(e.tokens) for e in row) <= 24 for batch in batches for row in batch)
    assert all(1 <= len(batch) <= rows for batch in batches)
    assert packed or all(len(row) == 1 for batch in batches for row in batch)
    assert batches == epoch_batches(examples, 24, rows, key(seed), packed)
    assert torch.equal(before, rng.get_state())


def test_keys_shuffle_and_unpacked_batches_pad_little():
    lengths = torch.randint(2, 200, (4096,), generator=key(1)).tolist()
    examples = [Example(tuple(range(n)), 0) for n in lengths]
    batches = epoch_batches(examples, 200, 8, key(0), packed=False)
    assert batches != epoch_batches(examples, 200, 8, key(1), packed=False)
    padded = sum(len(batch) * max(len(row[0].tokens) for row in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)  # in random batches of 8 it is about 1.75
    firsts = [len(batch[0][0].tokens) for batch in batches[:100]]
    assert firsts != sorted(firsts)


@given(st.lists(st.lists(documents(), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 5))
def test_collate_against_its_definition(rows: list[list[Example]], extra: int):
    width = max(sum(len(e.tokens) for e in row) for row in rows) + extra
    batch = collate(rows, width)
    assert batch.tokens.shape == (len(rows), width)
    assert batch.loss_positions is not None
    positive = set()
    for r, row in enumerate(rows):
        owner = [(n, i) for n, e in enumerate(row) for i in range(len(e.tokens))]
        owner += [(-1, 0)] * (width - len(owner))
        for c, (n, i) in enumerate(owner):
            if batch.segments is not None:
                assert batch.segments[r, c] == n + 1
            else:
                assert n <= 0
            assert batch.tokens[r, c] == (row[n].tokens[i] if n >= 0 else 0)
            inside = n >= 0 and i + 1 < len(row[n].tokens)
            asked = inside and i + 1 >= row[n].prompt_length
            assert batch.weights[r, c] == float(asked)
            if inside:
                assert batch.targets[r, c] == row[n].tokens[i + 1]
            if asked:
                positive.add(r * width + c)
    assert batch.loss_positions.tolist() == sorted(positive)
    assert batch.loss_positions.dtype == torch.int64
    assert (batch.segments is None) == all(len(row) == 1 for row in rows)


@given(st.lists(row_texts, min_size=1, max_size=4))
def test_the_end_of_each_answer_carries_loss_and_no_prompt_does(given_rows: list[InstructionRow]):
    examples = [encode(row, PLAIN, TOKENIZER) for row in given_rows]
    batch = collate([examples])
    asked = batch.targets[batch.weights > 0].tolist()
    assert asked == [token for e in examples for token in e.tokens[e.prompt_length :]]
    assert asked.count(TOKENIZER.eos) == len(examples)


@settings(max_examples=20, deadline=None)
@given(st.lists(documents(), min_size=1, max_size=8), st.integers(0, 4))
def test_packing_and_padding_change_no_loss(examples: list[Example], extra: int):
    alone = [nll(GPT, collate([[e]])) for e in examples]
    bins = pack([len(e.tokens) for e in examples], 40)
    packed = [[examples[i] for i in b] for b in bins]
    total, weight = nll(GPT, collate(packed, 40 + extra))
    assert weight == sum(w for _, w in alone)
    torch.testing.assert_close(total / weight, sum(v for v, _ in alone) / weight, atol=1e-5, rtol=0)
    for row, indices in zip(packed, bins, strict=True):  # a sum could hide what one row takes from another
        value, weight = nll(GPT, collate([row], 40 + extra))
        torch.testing.assert_close(value / weight, sum(alone[i][0] for i in indices) / weight, atol=1e-5, rtol=0)
    for example, (value, weight) in zip(examples, alone, strict=True):
        padded, _ = nll(GPT, collate([[example]], 50))
        torch.testing.assert_close(padded / weight, value / weight, atol=1e-5, rtol=0)


def test_no_document_sees_another():
    a, b, other = Example((1, 2, 3, 4), 1), Example((5, 6, 7), 1), Example((9, 8, 9, 8), 1)
    one, two = collate([[a, b]]), collate([[other, b]])
    assert one.segments is not None
    left, right = (hidden(GPT, batch.tokens, batch.segments)[0, 4:] for batch in (one, two))
    assert torch.equal(left, right)
    assert not torch.equal(*(hidden(GPT, batch.tokens)[0, 4:] for batch in (one, two)))


def test_fit_refuses_or_counts():
    good, long, empty = Example((1, 2, 3), 1), Example(tuple(range(9)), 1), Example((1, 2), 1)
    assert filter_by_length([good], 8) == ([good], DropCounts(0, 0))
    assert filter_by_length([long, good, empty, long], 8, drop=True) == ([good], DropCounts(2, 1))
    with pytest.raises(InputError, match=r"^row 2 has 9 tokens, the limit is 8: shorten it, raise the limit, or drop"):
        filter_by_length([good, long], 8)
    with pytest.raises(InputError, match=r"^row 3 has no response: give it one, or drop empty rows$"):
        filter_by_length([good, good, empty], 8)
    with pytest.raises(
        InputError, match=r"^no row with .* fits: 2 rows came, 1 above the limit of 8 tokens and 1 without"
    ):
        filter_by_length([long, empty], 8, drop=True)
    with pytest.raises(InputError, match=r"^no row with a response"):
        filter_by_length([], 8)
    with pytest.raises(InputError, match=r"^row 2 has no response"):
        epoch_batches([good, empty], 8, 1, key(0))
    with pytest.raises(InputError, match=r"^row 1 of the batch has 9 tokens, the limit is 8"):
        collate([[long]], 8)


@pytest.mark.parametrize("output", ["", " \n\t"])
def test_a_blank_answer_is_no_answer(output: str):
    with pytest.raises(InputError, match="row 1 has no response"):
        filter_by_length([encode(InstructionRow("Say nothing.", "", output), PLAIN, TOKENIZER)], 512)


# ----------------------------------------------------------------------------------------------------- sources: files

OBJECTS = [
    {"instruction": "a", "input": "b", "output": "c\n\u2028d"},
    {"instruction": "é", "input": "", "output": "{x}"},
]
WANTED = [InstructionRow("a", "b", "c\n\u2028d"), InstructionRow("é", "", "{x}")]


def test_every_format_gives_the_same_rows(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(OBJECTS, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps(o, ensure_ascii=False) for o in OBJECTS), encoding="utf-8-sig"
    )
    (tmp_path / "a.CSV").write_text(
        'instruction,input,output\na,b,"c\n\u2028d"\n\né,,{x}\n', encoding="utf-8", newline=""
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OBJECTS), tmp_path / "a.parquet")
    for name in ("a.json", "a.jsonl", "a.CSV", "a.parquet"):
        assert load_rows(tmp_path / name) == WANTED, name
        assert load_rows(str(tmp_path / name), limit=1) == WANTED[:1]


def test_columns(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"q": 1, "a": 2.5, "input": null}')
    assert load_rows(file, Columns("q", output="a")) == [InstructionRow("1", "", "2.5")]
    assert load_rows(file, Columns("a", "q", "a")) == [InstructionRow("2.5", "1", "2.5")]
    file.write_text('{"conversations": ["hello", "good day", "more", "later"], "source": "x"}')
    asked = (Message("user", "hello"), Message("assistant", "good day"), Message("user", "more"))
    assert next((row.instruction, row.output) for row in load_rows(file)) == ("hello", "good day")
    assert [(row.messages, row.output) for row in load_rows(file) if isinstance(row, Turn)] == [
        (asked[:1], "good day"),
        (asked, "later"),
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
            '[{"a": 1},\n {"a" 2}]',
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
            "a.txt",
            "hello",
            Columns(),
            r"a\.txt: cannot tell its format; expected .* \.jsonl, ",
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
        ("lima/lima.json", None, 1082),  # 1,029 rows, 29 of them with 53 exchanges before
        ("alpaca_demo/alpaca_en_demo.json", None, 999),
        ("davidson/train.csv", TL, 1000),
        ("davidson/labeled_data.csv", Columns("tweet", output="class"), 24783),
    ],
)
def test_real_files(name: str, columns: Columns | None, count: int, shared_data: SharedData):
    found = load_rows(shared_data(name), columns)
    assert len(found) == count
    kept, dropped = filter_by_length([encode(row, ALPACA, TOKENIZER) for row in found[:200]], 512, drop=True)
    assert len(kept) + dropped.long + dropped.empty == 200


# -------------------------------------------------------------------------------------------- sources: folders, the hub


def elsewhere(home: Path, source: str, **env: str) -> str:
    """The rows of `source`, or the error, printed by another process: the libraries read their environment once."""
    code = f"""
import time
from fgpt.data.instruction_datasets import load_rows
from fgpt.errors import InputError
begin = time.perf_counter()
try:
    print(load_rows({source!r}))
except InputError as err:
    print("InputError", err)
assert time.perf_counter() - begin < 15
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def test_folder_in_the_hubs_layout(tmp_path: Path):
    data = tmp_path / "mine" / "data"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OBJECTS), data / f"{split}-00000-of-00001.parquet")
    assert elsewhere(tmp_path, str(data.parent), HF_HUB_OFFLINE="1") == str(WANTED)
    (tmp_path / "void").mkdir()
    error = elsewhere(tmp_path, str(tmp_path / "void"), HF_HUB_OFFLINE="1")
    assert error.startswith(f"InputError {tmp_path / 'void'}: expected a folder in the layout of a dataset: ")
    assert "\n" not in error


def test_the_hub_from_the_cache_alone(tmp_path: Path):
    """What was fetched once is read with the network away."""
    snapshot = tmp_path / "hub" / "datasets--databricks--databricks-dolly-15k" / "snapshots" / "abc"
    blob, ref = snapshot.parent.parent / "blobs" / "123", snapshot.parent.parent / "refs" / "main"
    for folder in (snapshot, blob.parent, ref.parent):
        folder.mkdir(parents=True)
    ref.write_text("abc")
    blob.write_text(json.dumps({"instruction": "a", "context": "b", "response": "c", "category": "d"}))
    (snapshot / "databricks-dolly-15k.jsonl").symlink_to("../../blobs/123")
    assert elsewhere(tmp_path, "dolly", HF_HUB_OFFLINE="1") == str([InstructionRow("a", "b", "c")])


@pytest.mark.parametrize("env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_the_hub_is_away(tmp_path: Path, env: dict[str, str]):
    """Nothing cached: one line that says what to do instead, and soon (`elsewhere` allows 15 s; alone it takes 1)."""
    error = elsewhere(tmp_path, "alpaca", **env)
    assert error.startswith("InputError the hub gave no 'alpaca' (")
    assert "give a file instead" in error
    assert "lora-nano" in error
    assert "\n" not in error


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub of one dataset, GAIR/lima, to be read with the token "hf_good"."""
    content = json.dumps({"conversations": ["hello", "good day"], "source": "x"}).encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            info = self.path.startswith("/api/datasets/GAIR/lima")
            body = json.dumps({"id": "GAIR/lima", "sha": "a" * 40, "siblings": [{"rfilename": "train.jsonl"}]}).encode()
            if "/tree/" in self.path:
                body = json.dumps(
                    [{"type": "file", "path": "train.jsonl", "size": len(content), "oid": "b" * 40}]
                ).encode()
            allowed = info or self.headers.get("Authorization") == "Bearer hf_good"
            body = body if info else content if allowed else b""
            self.send_response(200 if allowed else 401)
            if not allowed:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"0123456789"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer  # noqa: N815 (the library's names)

        def log_message(self, format: str, *args: object):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_gated_dataset(tmp_path: Path, hub: str):
    error = elsewhere(tmp_path, "lima", HF_ENDPOINT=hub)
    assert error.startswith(
        "InputError the hub refuses GAIR/lima (HTTP 401): accept its terms at https://huggingface.co/"
    )
    assert "\n" not in error
    assert elsewhere(tmp_path, "lima", HF_ENDPOINT=hub, HF_TOKEN="hf_good") == str(
        [InstructionRow("hello", "", "good day")]
    )
    assert elsewhere(tmp_path, "lima", HF_HUB_OFFLINE="1") == str([InstructionRow("hello", "", "good day")])


def test_importing_is_light():
    code = "import sys, fgpt.data.instruction_datasets; print({'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


# ------------------------------------------------------------------------------------------------- sources: text files

PANDAS = [("instruction", "output"), ('Say "hi" to her.', 'He said "hi".'), ("a\tb", "two\nlines"), ("plain", "'it'")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quoted_tsv(quoting: Any, end: str, tmp_path: Path):
    """As pandas and R write them: pandas hands its rows to this writer."""
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end).writerows(PANDAS)
    assert load_rows(tmp_path / "a.tsv") == [InstructionRow(a, "", b) for a, b in PANDAS[1:]]


@pytest.mark.parametrize("field", ['"We know', 'It "is"', 'so"', '"', '"quoted whole"', '""', '"a" and "b"'])
def test_a_plain_tsv(field: str, tmp_path: Path):
    """In a file whose writer quotes nothing a quotation mark is only itself, as in GLUE's."""
    (tmp_path / "a.tsv").write_text(f"instruction\toutput\nWho?\t{field}\n{field}\tx\n")
    assert load_rows(tmp_path / "a.tsv") == [InstructionRow("Who?", "", field), InstructionRow(field, "", "x")]


def test_fields_of_any_length_and_many_columns(tmp_path: Path):
    long = "word " * 60_000
    for end, mark in ((".csv", ","), (".tsv", "\t")):
        (tmp_path / f"a{end}").write_text(f"instruction{mark}output\n{long}{mark}x\n")
        assert load_rows(tmp_path / f"a{end}") == [InstructionRow(long, "", "x")]
    names = [f"c{i}" for i in range(200_000)]
    (tmp_path / "wide.csv").write_text("\n".join([",".join(names), ",".join(["1"] * len(names))]))
    begin = time.perf_counter()
    assert load_rows(tmp_path / "wide.csv", Columns("c7", output="c199999")) == [InstructionRow("1", "", "1")]
    with pytest.raises(InputError, match=r"there are 'c0', .* and 199,980 more: name the columns") as caught:
        load_rows(tmp_path / "wide.csv")
    assert len(str(caught.value)) < 600
    assert time.perf_counter() - begin < 10  # 0.2 s alone; comparing each name with all before it took minutes


PACK: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def packed(end: str, content: bytes) -> bytes:
    if end in PACK:
        return PACK[end](content)
    return pyarrow.compress(content, codec="zstd", asbytes=True)


CONTENTS = {
    ".json": json.dumps(OBJECTS),
    ".jsonl": "\n".join(map(json.dumps, OBJECTS)),
    ".csv": 'instruction,input,output\na,b,"c\n\u2028d"\né,,{x}\n',
    ".tsv": 'instruction\tinput\toutput\na\tb\t"c\n\u2028d"\né\t\t{x}\n',
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("end", CONTENTS)
def test_marks_and_compression_change_nothing(end: str, pack: str, mark: bytes, tmp_path: Path):
    content = mark + CONTENTS[end].encode()
    path = tmp_path / f"a{end}{pack}"
    path.write_bytes(packed(pack, content) if pack else content)
    assert load_rows(path) == WANTED
    assert prompt_file.read(str(path)) == WANTED


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_reader_of_texts_takes_marks_and_compression(pack: str, tmp_path: Path):
    def put(name: str, text: str) -> Path:
        content = b"\xef\xbb\xbf" + text.encode()
        (tmp_path / f"{name}{pack}").write_bytes(packed(pack, content) if pack else content)
        return tmp_path / f"{name}{pack}"

    assert read_documents(put("a.txt", "One day.<|endoftext|>Two days.")) == ["One day.", "Two days."]
    assert classification_datasets.load_labeled_texts(str(put("b.txt", "glad;joy\n"))) == [
        classification_datasets.LabeledText("glad", "", "joy")
    ]
    assert classification_datasets.load_labeled_texts(str(put("b.csv", "text,label\nglad,joy\n")))[0].text == "glad"
    if not pack:
        assert read_text(put("c.txt", "One day.")) == "One day."


def test_files_put_together_keep_their_marks(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    part = mark + b'{"instruction": "a", "output": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(part + part)
    assert load_rows(tmp_path / "a.jsonl") == [InstructionRow("a", "", "b")] * 2
    for end, comma in ((".csv", b","), (".tsv", b"\t")):
        (tmp_path / f"a{end}").write_bytes(
            b"instruction,output\na,b\n".replace(b",", comma) + mark + b'"a"' + comma + b"b\n"
        )
        assert [row.instruction.strip('"') for row in load_rows(tmp_path / f"a{end}")] == ["a", "a"]
    (tmp_path / "a.txt").write_bytes((mark + b"glad;joy\n") * 2)
    assert [row.text for row in classification_datasets.load_labeled_texts(str(tmp_path / "a.txt"))] == ["glad", "glad"]


@pytest.mark.parametrize("pack", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compression_is_one_line(pack: str, tmp_path: Path):
    whole = packed(pack, "\n".join(json.dumps({"instruction": str(i), "output": "x"}) for i in range(9_999)).encode())
    middle = len(whole) // 2
    for content in (
        b'{"instruction": "a", "output": "b"}',
        whole[:middle],
        whole[:middle] + bytes(40) + whole[middle:],
    ):
        (tmp_path / f"a.jsonl{pack}").write_bytes(content)
        with pytest.raises(
            InputError, match=rf"a\.jsonl\{pack}: damaged, or not compressed as its name says"
        ) as caught:
            load_rows(tmp_path / f"a.jsonl{pack}")
        assert "\n" not in str(caught.value)
    (tmp_path / f"a.parquet{pack}").write_bytes(whole)
    with pytest.raises(InputError, match="cannot tell its format"):
        load_rows(tmp_path / f"a.parquet{pack}")


def test_nothing_is_never_the_text_nan(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "input": NaN, "output": "b"}')
    assert load_rows(tmp_path / "a.jsonl") == [InstructionRow("a", "", "b")]
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": NaN}')
    with pytest.raises(InputError, match=r"line 1: column 'output' should hold text, got NaN"):
        load_rows(tmp_path / "a.jsonl")


# ----------------------------------------------------------------------------------------------- sources: local folders


@pytest.mark.parametrize(
    "files",
    [
        "https://127.0.0.1:9/train.csv",
        "hf://datasets/some/one/train.csv",
        "../secret.csv",
        "data/../../secret.csv",
        "{secret}",
        "file://{secret}",
        "[train.csv, ../secret.csv]",
        "[{{split: train, path: ../secret.csv}}]",
        "{{train: [../secret.csv]}}",
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_local_folder_stays_local(card: str, files: str, tmp_path: Path):
    (tmp_path / "secret.csv").write_text("instruction,output\nsecret,secret\n")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text("instruction,output\na,b\n")
    named = files.format(secret=tmp_path / "secret.csv")
    text = f"configs:\n- config_name: default\n  data_files: {named}\n"
    (folder / card).write_text(f"---\n{text}---\nMine.\n" if card.endswith(".md") else text)
    with pytest.raises(InputError, match=r"data outside the folder, .*: expected files in the folder") as caught:
        load_rows(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_s_own_words_on_its_files_count(tmp_path: Path):
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "one.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "mine" / "train.csv").write_text("instruction,output\nold,old\n")
    card = "---\nsource: https://example.org/..\nconfigs:\n- config_name: default\n  data_files: parts/*.csv\n---\n"
    (tmp_path / "mine" / "README.md").write_text(card)
    assert elsewhere(tmp_path, str(tmp_path / "mine"), HF_HUB_OFFLINE="1") == str([InstructionRow("a", "", "b")])
    (tmp_path / "mine" / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(InputError, match=r"README\.md: its YAML cannot be read"):
        load_rows(tmp_path / "mine")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library with an empty cache and no network."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TEXTS_LIKE_NUMBERS = ["NA", "None", "null", "NaN ", "007", "1", "True", "False", "1.50", "1e3", ""]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("end", "mark"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_text_in_a_folder_of_tables_stays_text(end: str, mark: str, tmp_path: Path):
    """No value is guessed to be a number, a truth value or missing: a folder holds what each of its files holds."""
    lines = [mark.join(("instruction", "input", "output")), *(mark.join(("Say:", x, "ok")) for x in TEXTS_LIKE_NUMBERS)]
    content = "\n".join(lines) + "\n"
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / f"train{end}").write_bytes(gzip.compress(content.encode()) if end.endswith(".gz") else content.encode())
    assert [row.input for row in load_rows(folder)] == TEXTS_LIKE_NUMBERS
    assert load_rows(folder) == load_rows(folder / f"train{end}")


@pytest.mark.usefixtures("offline")
def test_labels_in_a_folder_of_tables_stay_apart(tmp_path: Path):
    files = {"data/train.csv": "text,label\na,01\nb,1\n", "data/test.csv": "text,label\nNA,True\nnone,1\n"}
    folder = str(write_files(tmp_path / "mine", files))
    rows = classification_datasets.load_labeled_texts
    assert [row.label for row in rows(folder)] == ["01", "1"]
    assert [(row.text, row.label) for row in rows(folder, "test")] == [("NA", "True"), ("none", "1")]


@pytest.mark.usefixtures("offline")
def test_a_folder_of_tables_in_parts_and_with_a_separator(tmp_path: Path):
    parts = {f"data/train-{i}.csv": f"instruction,output\n{i},0{i}\n" for i in range(2)}
    assert [row.output for row in load_rows(write_files(tmp_path / "parts", parts))] == ["00", "01"]
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  {}\n---\n"
    for separator in (";", "|", "\t"):
        table = {"a.csv": f"instruction{separator}output\na,b{separator}007\n"}
        folder = write_files(tmp_path / "mine", table | {"README.md": card.format(f"sep: {json.dumps(separator)}")})
        assert load_rows(folder) == [InstructionRow("a,b", "", "007")]
    write_files(folder, {"README.md": card.format("skiprows: 1")})
    with pytest.raises(InputError, match=r"mine: its README\.md sets skiprows for its tables: expected `sep` alone"):
        load_rows(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("end", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("link", ["file", "folder", "card"])
def test_a_link_out_of_a_local_folder_is_refused(link: str, end: str, tmp_path: Path):
    secret, folder = tmp_path / "secret" / f"train{end}", tmp_path / "mine"
    secret.parent.mkdir()
    folder.mkdir()
    table = pyarrow.Table.from_pylist([{"instruction": "secret", "output": "secret"}])
    if end == ".parquet":
        pyarrow.parquet.write_table(table, secret)
    else:
        secret.write_text("instruction,output\na,b\n" if end == ".csv" else '{"instruction": "a", "output": "b"}\n')
    if link == "file":
        (folder / secret.name).symlink_to(secret)
    elif link == "folder":
        (folder / "data").symlink_to(secret.parent)
        (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train.*\n---\n")
    else:
        (folder / secret.name).write_bytes(secret.read_bytes())
        (tmp_path / "card.md").write_text("---\n---\n")
        (folder / "README.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(InputError, match=r"mine/.*: a link to a file outside the folder, .*: put the file itself"):
        load_rows(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("end", [".csv", ".parquet"])
def test_links_within_a_folder_and_into_the_hub_s_cache_are_followed(end: str, tmp_path: Path):
    """The files of a cache's snapshot are links into the blobs beside it."""
    repo = tmp_path / "hub" / "datasets--me--it"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    (snapshot / "data").mkdir(parents=True)
    blobs.mkdir()
    if end == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "a", "output": "b"}]), blobs / "123")
    else:
        (blobs / "123").write_text("instruction,output\na,b\n")
    (snapshot / "data" / f"train{end}").symlink_to("../../../blobs/123")
    for folder in (snapshot, snapshot / "data"):
        assert load_rows(folder) == [InstructionRow("a", "", "b")]
    folder = tmp_path / "mine"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / f"one{end}").write_bytes((blobs / "123").read_bytes())
    (folder / f"train{end}").symlink_to(f"parts/one{end}")
    (tmp_path / "link").symlink_to(folder)
    for at in (folder, tmp_path / "link"):
        assert load_rows(at) == [InstructionRow("a", "", "b")]
    stranger = tmp_path / "other" / "snapshots" / "abc"
    stranger.mkdir(parents=True)
    (tmp_path / "other" / "blobs").symlink_to(blobs)
    (stranger / f"train{end}").symlink_to("../../blobs/123")
    with pytest.raises(InputError, match="a link to a file outside the folder"):
        load_rows(stranger)


# ------------------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize(
    ("count", "wanted", "held"), [(60, 64, 6), (64, 64, 6), (127, 64, 12), (128, 64, 64), (2, 9, 1)]
)
def test_few_rows_are_shared(count: int, wanted: int, held: int, capsys: pytest.CaptureFixture[str]):
    assert num_heldout(range(count), wanted, "a.jsonl") == held
    message = " ".join(capsys.readouterr().err.split())
    hint = f"--num-heldout {wanted} would be more than half"
    assert message == ("" if held == wanted else f"held out {held} of {count} rows, a tenth: {hint}")


def test_one_row_cannot_be_shared():
    with pytest.raises(InputError, match=r"^a\.jsonl has 1 rows: expected 2 or more, one of them to be held out"):
        num_heldout(range(1), 1, "a.jsonl")
