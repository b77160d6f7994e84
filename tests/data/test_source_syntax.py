"""How a source is written: its parts, paths that exist first, weights and splits that are none."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fgpt.data.source_syntax import Source, parse_source
from fgpt.errors import InputError

WORDS = st.from_regex(r"[A-Za-z][A-Za-z0-9_.-]{0,8}", fullmatch=True)
NUMBERS = st.sampled_from(["0.5", "3", "1e3", "nan", "2.0"])
SPLITS = ["train", "train[:1000]", "train[:10%]+test[-5:]", ":1000", "10%:", "a.b[3:4]"]
SOURCES = st.builds(
    Source,
    name=st.one_of(WORDS, st.tuples(WORDS, WORDS).map("/".join), WORDS.map("C:\\data\\{}.jsonl".format)),
    config=st.none() | WORDS | NUMBERS,
    revision=st.none() | WORDS | st.just("refs/convert/parquet"),
    split=st.none() | st.sampled_from(SPLITS),
    weight=st.none() | st.floats(min_value=1e-9, max_value=1e9),
)


@given(SOURCES)
@example(Source("owner/name", "0.5"))
def test_a_source_is_read_as_it_is_written(source: Source):
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("alpaca", Source("alpaca")),
        ("alpaca:0.7", Source("alpaca", weight=0.7)),
        ("mine.jsonl:2", Source("mine.jsonl", weight=2)),
        ("data/*.parquet", Source("data/*.parquet")),
        ("data/part[0-9].csv[:100]:3", Source("data/part[0-9].csv", split=":100", weight=3)),
        ("data/part[0-9]", Source("data/part[0-9]")),
        ("owner/name:config@v1[train[:1000]]", Source("owner/name", "config", "v1", "train[:1000]")),
        ("owner/name:3:", Source("owner/name", "3")),
        ("owner/name:3:1", Source("owner/name", "3", weight=1)),
        ("C:\\data\\mine.jsonl:0.3", Source("C:\\data\\mine.jsonl", weight=0.3)),
        ("C:/data/mine", Source("C:/data/mine")),
        ("", Source("")),
    ],
)
def test_parts(text: str, source: Source):
    assert parse_source(text) == source


@pytest.mark.parametrize("name", ["a:0.7", "b[train].jsonl", "c[train]", "d@e:f", "g:h"])
def test_a_path_that_exists_as_written_comes_first(name: str, tmp_path: Path):
    path = tmp_path / name
    assert parse_source(str(path)) != Source(str(path)) or name == "b[train].jsonl"
    path.write_text("x")
    assert parse_source(str(path)) == Source(str(path))
    assert parse_source(f"{path}[:10%]:0.5") == Source(str(path), split=":10%", weight=0.5)
    assert parse_source(f"{path}:config") == Source(str(path), "config")
    assert parse_source(str(parse_source(f"{path}:0.5"))) == Source(str(path), weight=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpaca:-1", r"source 'alpaca:-1': its weight is -1, expected a positive number, such as 0\.7"),
        ("alpaca:0", "its weight is 0, expected"),
        ("alpaca:NaN", "its weight is NaN, expected"),
        ("alpaca:inf", "its weight is inf, expected"),
        ("alpaca[train[:10x]]", r"split 'train\[:10x\]': expected a split such as train, train\[:1000\]"),
        ("alpaca[train[:10%]+]", "expected a split such as"),
        ("alpaca[train[10%:20]]", "expected a split such as"),
        ("alpaca[:101%]", "expected a split such as"),
        ("https://example.org/a.jsonl", "expected a path, or the name of a dataset on the hub, not a URL"),
    ],
)
def test_bad_sources_are_one_line(text: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)
