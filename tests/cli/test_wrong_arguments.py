"""Arguments that are missing, unknown or contradict each other: one line says which, and what to do."""

import importlib.metadata
import shlex
from pathlib import Path

import pytest

import fgpt
from fgpt.cli.main import main
from fgpt.recipes import KINDS, describe


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("generate lora-nano", "expected PROMPT (The instruction, or - for standard input); see fgpt generate --help"),
        ("generate", "expected RUN (The name of a run, or its folder; or a model as it is: nano, smollm2, a folder, "),
        ("classify", "expected RUN (The name of a run, or its folder); see fgpt classify --help"),
        ("eval text", "expected FILE (A UTF-8 file, or - for standard input); see fgpt eval text --help"),
    ],
)
def test_a_missing_argument(typed: str, expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(shlex.split(typed)) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_the_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fgpt {importlib.metadata.version('fgpt')}\n"


def test_a_gguf_file_that_is_not_there():
    with pytest.raises(fgpt.InputError, match=r"^nosuch\.gguf: no such file$"):
        fgpt.load("nosuch.gguf")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--min_lr", "in fgpt it is --min-lr-ratio, which fgpt train lora-nano does not have"),
        ("--scheduler_kwargs", "no option --scheduler_kwargs; fgpt train lora-nano --help"),
    ],
)
def test_an_option_that_the_recipe_lacks_is_not_answered_by_another(
    option: str, expected: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "lora-nano", option, "x"]) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "did you mean" not in printed


def test_summaries_are_whole_sentences():
    for kind in KINDS:
        for name, summary in describe(kind):
            assert summary.endswith("."), (name, summary)


def test_the_best_state_needs_a_held_out_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(["train", "lora-nano", "--steps", "1", "--eval-every", "None", "--keep-best", "--out", str(tmp_path)]) == 2
    )
    assert "--keep-best keeps the state of least held-out loss: give --eval-every N" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--temperature", "0.8"], "leave --temperature out"),
        (["--num-return-sequences", "4"], "--num-return-sequences is 4: expected at most --num-beams 2"),
    ],
)
def test_beam_search_ignores_no_option(
    options: list[str], expected: str, lora_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", str(lora_run), "Hi", "--num-beams", "2", "--max-new-tokens", "2", *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_longer_than_the_context_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--steps", "1", "--max-seq-len", "4096", "--compare-prompts", "0", "--out", str(tmp_path)]
    assert main(["train", "lora-nano", *options]) == 0
    expected = "rows have 512 tokens, the context of the model; --max-seq-len is 4096"
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("trian lora-nano", "no command 'trian'; did you mean train?"),
        ("generate nano hi --top-p 0.9", "--top-p is of samples, and temperature 0 takes none"),
        ("generate nano hi --length-penalty 2", "--length-penalty is of beam search"),
        ("generate nano hi --temperature 1 --top-p 3", "--top-p is 3.0: expected a probability above 0"),
        ("generate nope hi", "a model is nano, smollm2, a folder, a GGUF file or a name on the Hub"),
        ("train lora-nano --steps 1 --adapter.init piza", "--adapter.init piza is none of default, pissa, olora"),
        ("train lora-nano --resume --config a.yaml", "--resume goes on with the options that the run has"),
    ],
)
def test_what_a_newcomer_types(
    typed: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(typed)) == 2
    assert expected in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
