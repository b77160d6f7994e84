"""Regular expressions, typed or from files: they select as Python's own engine does, and none takes for ever."""

import json
import re
import time
from pathlib import Path

import pytest
from builders import ROOT, tiny
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.main import main
from fgpt.patterns import matching
from fgpt.tree import leaves, select

SLOW = r"(?:\w|\w\w|\.|\w\.)+[^\w.]"
"""A few characters that take for ever over a path of forty."""
PATHS = list(leaves(tiny()))
LONG = "x" * 60

pieces = st.sampled_from(
    ["blocks", r"\.", r"\d+", "[01]", ".*", "attn", "(q|k|v)", "(?!q)", "(?:mlp|attn)", r"\w+", "(w|b)", "ln_[12]", "?"]
)


@given(st.lists(pieces, max_size=7).map("".join))
def test_selects_what_python_selects(pattern: str):
    try:
        expected = [path for path in PATHS if re.fullmatch(pattern, path)]
    except re.error:
        with pytest.raises(fgpt.InputError, match="is not a regular expression"):
            matching(pattern, PATHS)
        return
    assert matching(pattern, PATHS) == expected


@pytest.mark.parametrize("pattern", [SLOW, r"(x|xx)+y?\W", r"(?:(?:x|xx)+\.?)*\W", r"(?:x|xx)+(?:x|xx)+\d"])
def test_what_would_take_for_ever_is_one_line(pattern: str):
    start = time.monotonic()
    with pytest.raises(fgpt.InputError, match="takes longer than 1 s to match") as caught:
        select([LONG, *PATHS], pattern)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a{1000000}", "repeats too often"),
        ("((a{9999}){9999}){9999}", "repeats too often"),
        ("(?x)a{9 9 9 9 9 9 9}", "repeats too often"),
        ("a{" + "9" * 5000 + "}", "repeats too often"),
        ("a" * 20_000, "has 20,000 characters; expected at most 10,000"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        ("[", "not a regular expression"),
    ],
)
def test_what_would_fill_the_memory_is_one_line(pattern: str, expected: str):
    start = time.monotonic()
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        select(PATHS, pattern)
    assert time.monotonic() - start < 10
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("patterns", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_an_adapter_share_one_second(patterns: str, tmp_path: Path):
    params = tiny(n_layer=4)
    fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 2), params, tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    slow = {r"h\.0\.attn\.c_attn": config["r"]} | {rf"(?:\w|\w\w|\.|\w\.){{{n},}}[^\w.]": 4 for n in range(2, 60)}
    path.write_text(json.dumps(config | {patterns: slow}))
    start = time.monotonic()
    with pytest.raises(fgpt.InputError, match=rf"adapter_config.json: {patterns} .* takes longer than 1 s"):
        fgpt.load_peft(tmp_path, params)
    assert time.monotonic() - start < 10


def test_patterns_of_an_adapter_may_look_around(tmp_path: Path):
    """As PEFT's may: `re` reads them."""
    params = tiny()
    adapters = fgpt.lora(params, fgpt.key(0), 2, 4)
    fgpt.save_peft(adapters, params, tmp_path, "base")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"alpha_pattern": {r"(?!transformer\.h\.0).*c_attn": 3 * config["lora_alpha"]}})
    )
    reloaded = fgpt.load_peft(tmp_path, params)
    x, y = (reloaded[f"blocks.{i}.attn.q"] for i in range(2))
    assert isinstance(x, fgpt.LoRA)
    assert isinstance(y, fgpt.LoRA)
    first = adapters["blocks.1.attn.q"]
    assert isinstance(first, fgpt.LoRA)
    assert x.scale == y.scale == first.scale  # the file's own scale is B's, which is zero here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run that classifies, trained for one step: its options, and its folder."""
    at = tmp_path_factory.mktemp("run")
    (at / "a.txt").write_text("i am glad;joy\ni am sad;fear\n" * 8)
    options = ["--base", "nano", "--train", str(at / "a.txt"), "--num-heldout", "4", "--steps", "1"]
    options += ["--max-seq-len", "24", "--out", str(at / "runs")]
    assert main(["train", "emotion-small", *options]) == 0
    return options, at / "runs" / "emotion-small"


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["((.*)*)*!", "(((.?)+)+)+!", "(?:(?:.|..|...|....|.....)+)+[^qkv]"])
def test_a_selector_from_a_run_s_file_ends(pattern: str, run: tuple[list[str], Path]):
    at = run[1] / "run.json"
    values = json.loads(at.read_text())
    values["adapter"]["target"] = pattern
    at.write_text(json.dumps(values))
    start = time.monotonic()
    assert main(["classify", str(run[1]), "i am glad"]) in (0, 2)  # it is answered, or refused
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("option", ["--adapter.target", "--tune-also"])
def test_a_selector_that_is_typed_ends_with_one_line(
    option: str, run: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
):
    start = time.monotonic()
    assert main(["train", "emotion-small", *run[0], option, SLOW]) == 2
    assert time.monotonic() - start < 10
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1
    assert re.search("takes longer than 1 s to match|matches no path", output[0])


def test_regex_is_declared():
    assert re.search(r'"regex>=', (ROOT / "pyproject.toml").read_text())
    assert re.search(r"^regex==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
