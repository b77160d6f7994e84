"""Base and several runs side by side."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders.compare import RUN_NAMES, SHORT_TRAINING, comparison_of

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.evaluation.compare import prompt_file
from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.results import Answer, Comparison
from fgpt.cli.main import main
from fgpt.cli.training.build import load_base
from fgpt.data.prompt_templates import PLAIN, InstructionRow, encode_prompt
from fgpt.io import models

# -------------------------------------------------------------------------------------------------------------- sides


def test_labels_tell_sides_apart():
    paths = [Path(p) for p in ("/a/x/run", "/a/y/run", "/a/y/other")]
    assert compare_sides.labels(paths[1:]) == ["run", "other"]
    assert compare_sides.labels(paths) == ["x/run", "y/run", "y/other"]
    assert compare_sides.labels([Path("/a/base"), Path("/a/tuned")]) == ["a/base", "a/tuned"]


@pytest.mark.slow
def test_several_runs(compared_runs: Path):
    lora, ia3 = (str(compared_runs / name) for name in RUN_NAMES)
    assert main(["compare", lora, ia3]) == 0
    out = compared_runs / "compare-lora-nano-ia3-nano"
    assert {p.name for p in out.iterdir()} == {"compare.md", "compare.html", "compare.json"}
    found = comparison_of(out / "compare.json")
    assert list(found["scores"]) == ["base", *RUN_NAMES]
    assert len({tuple(names) for names in found["scores"].values()}) == 1  # the same scores, in the same order
    assert found["settings"]["templates"] == dict.fromkeys(["base", *RUN_NAMES], "plain")
    alone = {name: comparison_of(compared_runs / name / "compare.json") for name in RUN_NAMES}
    for name in RUN_NAMES:  # a side is what it is, whatever stands beside it
        assert alone[name]["scores"]["base"] == found["scores"]["base"]
        assert alone[name]["scores"]["tuned"] == found["scores"][name]
        for one, all_of_them in zip(alone[name]["answers"], found["answers"], strict=True):
            assert one["base"] == all_of_them["base"]
            assert one["tuned"] == all_of_them[name]
    assert len({json.dumps(found["scores"][side]) for side in ("base", *RUN_NAMES)}) == 3
    texts = {side: [row[side]["text"] for row in found["answers"]] for side in ("base", *RUN_NAMES)}
    assert texts["base"] != texts["lora-nano"] != texts["ia3-nano"]
    html, text = (out / "compare.html").read_text(), (out / "compare.md").read_text()
    for side in ("base", *RUN_NAMES):
        assert text.count(f"**{side}**") == 3
        assert f">{side}</span>" in html
    assert "| | base | lora-nano, 4 steps | ia3-nano, 4 steps |" in text


@pytest.mark.slow
def test_answers_are_those_of_the_run_itself(compared_runs: Path):
    """From the files by hand: greedy, each prompt alone."""
    main(
        [
            "compare",
            str(compared_runs / "lora-nano"),
            "--num-prompts",
            "2",
            "--max-new-tokens",
            "9",
            "--out",
            str(compared_runs / "two"),
        ]
    )
    found = comparison_of(compared_runs / "two" / "compare.json")
    assert len(found["answers"]) == 2
    run = run_dir.read_run(compared_runs / "lora-nano")
    base, tokenizer = load_base(run), fgpt.tokenizer("nano")
    for side, params in (("base", base), ("tuned", run_dir.load_tuned(compared_runs / "lora-nano", base))):
        for row in found["answers"]:
            prompt = encode_prompt(InstructionRow(row["instruction"], row["input"]), PLAIN, tokenizer)
            generated = fgpt.generate(params, [prompt], eos_token_id=tokenizer.eos_token_id, max_new_tokens=9)[0]
            assert row[side] == {"text": tokenizer.decode(generated.tokens).strip(), "finished": generated.finished}


@pytest.mark.slow
def test_no_comparison_is_written_over(compared_runs: Path, tmp_path: Path):
    """One of other settings has another name; the same again has its own. Files of one name are told apart."""
    run = shutil.copytree(compared_runs / "lora-nano", tmp_path / "lora-nano")
    before = {p.name: p.read_bytes() for p in run.glob("compare.*")}
    for folder_name, text in (("a", "Say a."), ("b", "Say b.")):
        (tmp_path / folder_name).mkdir()
        (tmp_path / folder_name / "own.json").write_text(json.dumps([text]))
    ways = [
        ["--num-prompts", "2"],
        ["--num-prompts", "2"],
        ["--max-new-tokens", "4", "--temperature", "0.5", "--seed", "3"],
    ]
    ways += [["--prompts", str(tmp_path / x / "own.json"), "--max-new-tokens", "2"] for x in ("a", "b", "a")]
    for how in ways:
        assert main(["compare", str(run), *how]) == 0
    assert {p.name: p.read_bytes() for p in run.glob("compare.*")} == before
    assert {p.stem for p in run.glob("compare*.json")} == {
        *(
            "compare",
            "compare-2-prompts",
            "compare-max-new-tokens-4-temperature-0.5-seed-3",
            "compare-own-max-new-tokens-2",
        ),
        "compare-own-max-new-tokens-2-2",
    }
    assert comparison_of(run / "compare-own-max-new-tokens-2-2.json")["answers"][0]["instruction"] == "Say b."
    assert main(["report", str(run)]) == 0
    shown = (run / "report.html").read_text()
    assert shown.index("held-out prompts of lora-nano") < shown.index("<h3>compare-2-prompts</h3>")


@pytest.mark.slow
def test_each_run_answers_in_its_own_template(compared_runs: Path, tmp_path: Path):
    assert main(["train", "lora-nano", *SHORT_TRAINING, "--template", "alpaca", "--out", str(tmp_path)]) == 0
    runs = [str(tmp_path / "lora-nano"), str(compared_runs / "lora-nano")]
    assert main(["compare", *runs, "--num-prompts", "2", "--out", str(tmp_path / "both")]) == 0
    found, alone = (
        comparison_of(tmp_path / "both" / "compare.json"),
        comparison_of(compared_runs / "lora-nano" / "compare.json"),
    )
    one, two = list(found["scores"])[1:]
    assert (one, two) == (f"{tmp_path.name}/lora-nano", f"{compared_runs.name}/lora-nano")
    assert found["settings"]["templates"] == {"base": "alpaca", one: "alpaca", two: "plain"}
    assert [row[two] for row in found["answers"]] == [row["tuned"] for row in alone["answers"][:2]]


@pytest.mark.slow
def test_the_same_key_for_every_side(compared_runs: Path, tmp_path: Path):
    """A run whose adapter changes nothing writes what the base writes, drawn or not; another seed writes otherwise."""
    still = tmp_path / "still"
    args = [
        "train",
        "ia3-nano",
        *SHORT_TRAINING,
        "--steps",
        "1",
        "--lr",
        "1e-12",
        "--compare-prompts",
        "0",
        "--out",
        str(still),
    ]
    assert main(args) == 0
    how = ["--temperature", "1.0", "--top-p", "0.95", "--num-prompts", "3", "--max-new-tokens", "12"]
    for seed in ("1", "2"):
        assert main(["compare", str(still / "ia3-nano"), *how, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    first, second = (comparison_of(tmp_path / seed / "compare.json") for seed in ("1", "2"))
    assert all(row["base"] == row["tuned"] for row in first["answers"])
    assert [row["base"] for row in first["answers"]] != [row["base"] for row in second["answers"]]
    assert "temperature 1.0, top-p 0.95, seed 1" in (tmp_path / "1" / "compare.md").read_text()


@pytest.mark.slow
def test_the_base_is_loaded_once(compared_runs: Path, monkeypatch: pytest.MonkeyPatch):
    loads = []
    load: Callable[..., object] = models.load
    monkeypatch.setattr(models, "load", lambda *args, **options: (loads.append(args), load(*args, **options))[1])
    sides = compare_sides.find([str(compared_runs / name) for name in RUN_NAMES])
    params = compare_sides.load_params(sides)
    assert len(loads) == 1
    assert list(params) == ["base", *RUN_NAMES]
    assert all(x.wte.w is params["base"].wte.w for x in params.values())


# ------------------------------------------------------------------------------------------------------------ prompts


def test_the_package_s_prompts():
    rows = prompt_file.read("general")
    assert len(rows) == len({row.instruction for row in rows}) == 32
    tokenizer = fgpt.tokenizer("nano")
    assert max(len(encode_prompt(row, PLAIN, tokenizer)) for row in rows) < 256  # room to answer in a small context
    assert any(row.input for row in rows)


@pytest.mark.slow
def test_prompts_of_a_file(compared_runs: Path, tmp_path: Path):
    """Texts and objects alike; a prompt's own answer, where it has one, is held against."""
    rows = ["Tell me of a <b>fox</b>.", {"instruction": "Say no.", "input": "To Tim & Sue.", "output": "No, Tim."}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    (tmp_path / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    expected = [InstructionRow("Tell me of a <b>fox</b>."), InstructionRow("Say no.", "To Tim & Sue.", "No, Tim.")]
    assert prompt_file.read(str(tmp_path / "own.json")) == prompt_file.read(str(tmp_path / "own.jsonl")) == expected
    before = (compared_runs / "lora-nano" / "compare.json").read_text()
    assert main(["compare", str(compared_runs / "lora-nano"), "--prompts", str(tmp_path / "own.json")]) == 0
    assert (compared_runs / "lora-nano" / "compare.json").read_text() == before  # the held-out comparison stays
    found = comparison_of(compared_runs / "lora-nano" / "compare-own.json")
    scores = found["scores"]["tuned"]
    assert "response loss (nats per token)" in scores
    assert not any(name.startswith(("points", "held-out")) for name in scores)
    run = run_dir.read_run(compared_runs / "lora-nano")
    tokenizer = fgpt.tokenizer("nano")
    prompt, answer = encode_prompt(expected[1], PLAIN, tokenizer), tokenizer.encode("No, Tim.")
    tuned = run_dir.load_tuned(compared_runs / "lora-nano", load_base(run))
    logp = fgpt.apply(tuned, torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]]))[0].log_softmax(-1)
    each = [-float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate([*answer, tokenizer.eos_token_id])]
    assert scores["response loss (nats per token)"] == pytest.approx(sum(each) / len(each), rel=1e-4)
    html = (compared_runs / "lora-nano" / "compare-own.html").read_text()
    assert "&lt;b&gt;fox" in html
    assert "<b>fox" not in html
    assert "Tim &amp; Sue" in html


def test_a_page_of_hostile_text():
    """Nothing of the texts is read as HTML, wherever it stands."""
    odd = '<script>"&'
    answer = Answer(odd, (1,), False)
    found = Comparison(odd, [odd], [InstructionRow(odd, odd, odd)], {odd: [answer]}, {odd: {odd: 1.0}}, {})
    assert "<script" not in page(found)
