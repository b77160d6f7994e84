"""What is shown of an example is what is trained on."""

import re
from pathlib import Path

import pytest
from builders.conversations import ASSISTANT, TALK, USER, write_json_rows
from hypothesis import given
from hypothesis import strategies as st

import fgpt
from fgpt.cli.main import main
from fgpt.cli.training import preview
from fgpt.data.conversations import Message
from fgpt.data.examples import Example, Span, truncate
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import PLAIN, pieces
from fgpt.data.rows import conversation_row
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
words = st.text("abc \n日é«", min_size=1, max_size=9).filter(str.strip)


@given(st.lists(st.tuples(words, words, st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=3), st.integers(4, 40))
def test_the_parts_are_the_example(exchanges: list[tuple[str, str, float]], max_seq_len: int):
    messages = []
    for question, answer, weight in [*exchanges, ("q", "a", 1.0)]:
        messages += [Message("user", question), Message("assistant", answer, weight)]
    of_row = pieces(conversation_row(messages), PLAIN, NANO)
    (example,) = encode_pieces([of_row], NANO)
    text = preview.text_with_mask(example, NANO, colored=True)
    assert re.sub(r"\[x 0\.5\]", "", text.plain) == "".join(piece.text for piece in of_row)
    loss = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == preview.LOSS)
    assert re.sub(r"\[x 0\.5\]", "", loss) == "".join(piece.text for piece in of_row if piece.weight)
    for shown in (example, truncate(example, max_seq_len)):
        parts = list(preview.parts(shown))
        assert [token for part in parts for token in part.tokens] == list(shown.tokens)
        assert sum(len(part.tokens) for part in parts if part.weight) == shown.num_loss_tokens


def test_without_colors_there_are_marks():
    tokens = tuple(NANO.encode("Hi.Yes.No."))
    example = Example(tokens, (Span(len(NANO.encode("Hi.")), len(NANO.encode("Hi.Yes.")), 0.5),))
    text = preview.text_with_mask(example, NANO, colored=False)
    assert text.plain == "Hi.«[x 0.5]Yes.»No."
    assert not text.spans


def test_a_long_example_is_shown_in_a_few_lines():
    messages = []
    for number in range(20):
        messages += [Message("user", f"q{number} " * 200), Message("assistant", f"a{number} " * 200)]
    (example,) = encode_pieces([pieces(conversation_row(messages), PLAIN, NANO)], NANO)
    short = preview.text_with_mask(example, NANO, colored=False, short=True).plain
    assert len(short) < 1600
    assert short.startswith("Instruction: q0")
    assert short.endswith("a19 <|endoftext|>»")
    assert "[.. 34 parts ..]" in short
    assert len(preview.text_with_mask(example, NANO, colored=False).plain) > 10_000


def test_no_color_means_marks(monkeypatch: pytest.MonkeyPatch):
    assert not preview.has_colors()  # a test has no terminal
    monkeypatch.setattr(preview.console, "_force_terminal", True)
    monkeypatch.setattr(preview.console, "no_color", True)
    assert not preview.has_colors()


def test_a_preview_of_two_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    talks = write_json_rows(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": [USER, ASSISTANT]})
    long = {"instruction": "Go on.", "output": "on and " * 60}
    rows = write_json_rows(
        tmp_path / "b.jsonl", {"instruction": "a", "output": "b"}, long, {"instruction": "c", "output": " "}
    )
    options = ["lora-nano", "--data", str(talks), str(rows), "--max-seq-len", "64"]
    assert main(["data", "preview", *options, "--examples", "1"]) == 0
    shown = capsys.readouterr().err
    text = "Instruction: Hello.\n\nResponse:\n«Bonjour.<|endoftext|>»Instruction: Good night.\n\nResponse:\n"
    assert text + "«Bonne nuit.<|endoftext|>»" in shown
    assert "example 1, template plain" in shown
    assert "example 2" not in shown
    assert "training refuses to start with rows that are too long" in " ".join(shown.split())
    cells = [line.split("│")[1:-1] for line in shown.splitlines() if "│" in line]
    first, second = [row for row in cells if row[1].strip()]  # a long name takes several lines
    assert [int(x) for x in first[1:3]] == [2, 2]
    assert [int(x) for x in second[-3:]] == [0, 1, 1]
    assert main(["data", "preview", *options, "--examples=9", "--overlong", "cut"]) == 0
    shown = capsys.readouterr().err
    assert "example 4" in shown
    assert "example 5" not in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected preview after fgpt data; type: fgpt data preview RECIPE"),
        (["preview"], "expected a recipe: fgpt data preview RECIPE"),
        (["preview", "emotion-small"], "emotion-small is a recipe of classification: expected one of instruction"),
        (["preview", "lora-nano", "--examples", "0"], "--examples is 0: expected"),
        (["preview", "lora-nano", "--exampels", "2"], "no option --exampels"),
    ],
)
def test_what_cannot_be_previewed(args: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data", *args]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_its_help(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "--help"]) == 0
    assert "--examples N" in capsys.readouterr().out
    assert main(["data", "preview", "lora-nano", "--help"]) == 0
    assert "--assistant-turns" in capsys.readouterr().out


def test_what_a_terminal_obeys_is_shown_and_not_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_json_rows(tmp_path / "a.jsonl", {"instruction": "a\x9b2J", "output": "b\x1b[2Jc\r\x07"})
    assert main(["data", "preview", "lora-nano", "--data", str(path)]) == 0
    shown = "".join(capsys.readouterr())
    assert "b\\x1b[2Jc\\r\\x07" in shown
    assert not {"\x1b", "\x9b", "\x07"} & {*shown}
