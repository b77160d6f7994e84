"""`fgpt quantize`: the table against the library, the folder against the params, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same

import fgpt
from fgpt.cli import quantize_command
from fgpt.cli.quantize_command import QuantizeOptions, run
from fgpt.evaluation.quantization_cost import measure_base, quantization_cost
from fgpt.kernels.quantized_linear import Rotated

SENTENCE = "Once upon a time there was a little fox named {} who had {} red hats. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("".join(SENTENCE.format(name, i) for i in range(60) for name in ("Tim", "Lucy", "Ben")))
    return path


def windows(path: Path, seq: int) -> list[fgpt.Batch]:
    tokens = torch.tensor(fgpt.tokenizer("nano").encode(path.read_text()))
    tokens = tokens[len(tokens) % (seq + 1) :].view(-1, 1, seq + 1)
    return [fgpt.Batch(x[:, :-1], x[:, 1:], torch.ones(1, seq)) for x in tokens]


@pytest.mark.slow
def test_the_table_and_the_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = run(QuantizeOptions("nano", text, "rotated-int8", tmp_path / "small", max_seq_len=48, windows=2))
    assert folder == tmp_path / "small"
    plain = fgpt.load("nano")
    expected = fgpt.quantize(plain, "int8", rotate=True)
    assert isinstance(expected.blocks[0].mlp.up.w, Rotated)
    assert same(fgpt.load(folder), expected)
    assert fgpt.tokenizer(str(folder)).encode("a fox") == fgpt.tokenizer("nano").encode("a fox")
    measured = windows(text, 48)[-2:]
    cost = quantization_cost(measure_base(plain, measured), measure_base(expected, measured))
    manifest = json.loads((folder / "quantize.json").read_text())
    assert manifest["loss"] == pytest.approx(cost.loss, rel=1e-5)
    assert manifest["gradient_error"] == pytest.approx(cost.gradient_error, rel=1e-3)
    printed = capsys.readouterr().err
    rows = {line.split("│")[1].strip(): line.split("│") for line in printed.splitlines() if line.startswith("│")}
    assert [*rows] == ["full", "int8", "rotated-int8", "gptq-rotated-int8", "blockwise8", "nf4", "gptq-nf4"]
    assert rows["rotated-int8"][3].strip() == f"{cost.loss:.4f}"
    assert rows["rotated-int8"][5].strip() == f"{100 * cost.gradient_error:.1f} %"
    fast = min(("int8", "rotated-int8", "gptq-rotated-int8"), key=lambda name: float(rows[name][5].strip(" %")))
    assert fast != "int8"
    assert f"recommended: {fast} (" in printed


@pytest.mark.slow
def test_gptq_reads_the_windows_before(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr(
        quantize_command, "quantize_gptq", lambda params, batches, *_, **__: calls.append(batches) or params
    )
    run(QuantizeOptions("nano", text, "gptq-nf4", tmp_path / "small", max_seq_len=48, windows=2))
    assert len(calls) == len(quantize_command.CALIBRATED)  # once each, for the table and the folder
    expected = windows(text, 48)[:-2][-quantize_command.CALIBRATION_WINDOWS :]
    for batches in calls:
        assert torch.equal(torch.cat([x.tokens for x in batches]), torch.cat([x.tokens for x in expected]))


def test_without_a_text_it_only_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for layout, name in (("fgpt", "fgpt.safetensors"), ("bitsandbytes", "model.safetensors")):
        folder = run(QuantizeOptions("nano", to="int8", out=tmp_path / layout, layout=layout))
        assert folder
        assert (folder / name).is_file()
        assert same(fgpt.load(folder), fgpt.quantize(fgpt.load("nano"), "int8"))
    assert "│" not in capsys.readouterr().err


@pytest.mark.slow
def test_too_little_text_for_gptq_leaves_out_its_row(text: Path, capsys: pytest.CaptureFixture[str]):
    text.write_text(text.read_text()[:2000])
    run(QuantizeOptions("nano", text, max_seq_len=48))
    printed = " ".join(capsys.readouterr().err.split())
    assert "gptq-nf4 is left out:" in printed
    assert "recommended:" in printed


def test_too_little_text_for_the_chosen_gptq_is_known_before_the_comparison(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text.write_text(text.read_text()[:2000])
    monkeypatch.setattr(quantize_command, "measure_base", None)
    with pytest.raises(fgpt.InputError, match="give batches with at least as many positions"):
        run(QuantizeOptions("nano", text, "gptq-nf4", tmp_path / "small", max_seq_len=48))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to do: give --text FILE to compare formats, --to FORMAT to write one, or both"),
        ({"to": "gptq-nf4"}, "gptq-nf4 is calibrated on text: give --text FILE"),
        ({"text": "TEXT", "out": Path("x")}, r"--out x has nothing to write: give --to int8\|rotated-int8"),
        ({"to": "nf4", "out": "FOLDER"}, "exists: give another --out, or remove it"),
        (
            {"text": "TEXT", "layout": "bitsandbytes"},
            "--layout bitsandbytes is of a folder that is written: give --to",
        ),
        ({"to": "rotated-int8", "layout": "bitsandbytes"}, "bitsandbytes' files hold no rotated-int8: expected int8"),
        ({"text": "TEXT", "max_seq_len": 5000}, "tokens: expected two windows of 513 at least; give a longer text"),
        ({"text": Path("missing.txt")}, "missing.txt"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time.")
    places = {"TEXT": short, "FOLDER": tmp_path}
    with pytest.raises(fgpt.InputError, match=message):
        run(QuantizeOptions("nano", **{k: places.get(v, v) if isinstance(v, str) else v for k, v in options.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: fgpt.with_classification_head(p, 3, fgpt.key(0)),
            "is a classifier of 3 classes: expected a languag",
        ),
        (lambda p: fgpt.quantize(p, "nf4"), "is quantized already: give the full base"),
    ],
)
def test_a_base_that_is_no_full_language_model_is_named(change: Any, message: str, text: Path, tmp_path: Path):
    fgpt.save(change(fgpt.load("nano")), tmp_path / "base", like="nano")
    with pytest.raises(fgpt.InputError, match=message):
        run(QuantizeOptions(str(tmp_path / "base"), text, max_seq_len=48))
