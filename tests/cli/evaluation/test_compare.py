"""Base and several runs side by side: scores worked out by hand, sides that differ where they should, bad input."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.evaluation.compare import contenders as compare_sides
from fgpt.cli.evaluation.compare import prompt_file
from fgpt.cli.evaluation.compare.html import page
from fgpt.cli.evaluation.compare.results import Answer, Comparison, best
from fgpt.cli.evaluation.compare.scores import rouge_scores
from fgpt.cli.evaluation.compare.scores import text_scores as of_texts
from fgpt.cli.evaluation.metrics import text as text_scores
from fgpt.cli.main import main
from fgpt.cli.training.build import load_base
from fgpt.data.prompt_templates import PLAIN, Example, InstructionRow, encode_prompt
from fgpt.errors import InputError
from fgpt.io import models

SHORT = [
    "--steps",
    "4",
    "--micro-batch-size",
    "2",
    "--warmup-steps",
    "1",
    "--compare-prompts",
    "3",
    "--max-new-tokens",
    "16",
]
NAMES = ["lora-nano", "ia3-nano"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs, compared after training on three prompts each."""
    out = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        assert main(["train", name, *SHORT, "--out", str(out)]) == 0
    return out


def told(path: Path) -> dict:
    return json.loads(path.read_text())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0]


# ----------------------------------------------------------------------------------------------------- scores by hand


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),  # no four words
        ("one two three four", 0.0),
        ("a b c d a b c d", 20.0),  # abcd bcda cdab dabc abcd: the last of 5 was there before
        ("la la la la la la la la", 80.0),  # 5 of one kind
        ("A b, c d. a B c; D!", 20.0),  # case and punctuation are no words
    ],
)
def test_repeated(text: str, share: float):
    assert text_scores.repeated_ngrams(text) == pytest.approx(share)


def test_distinct():
    texts = ["the cat sat", "the cat ran", ""]
    assert text_scores.distinct(texts, 1) == pytest.approx(100 * 4 / 6)  # the cat sat ran, of 6 words
    assert text_scores.distinct(texts, 2) == pytest.approx(100 * 3 / 4)  # the-cat twice; none from text to text
    assert text_scores.distinct(["one", ""], 2) == 0.0


def test_mean_and_perplexity():
    assert text_scores.mean([1.0, 2.0, 6.0]) == 3.0
    assert text_scores.perplexity(math.log(7)) == pytest.approx(7)
    assert text_scores.perplexity(1e4) == math.inf
    with pytest.raises(InputError, match="no values"):
        text_scores.mean([])


def test_nats_count_every_answer_token_alike():
    """Against plain log-softmax over each text alone."""
    params = fgpt.init(fgpt.Config(1, 1, 8, 16, 11, 16), fgpt.key(0))
    examples = [Example((1, 2, 3, 4), 2), Example((5, 6, 7, 8, 9, 10), 1)]
    each = []
    for e in examples:
        logp = fgpt.apply(params, torch.tensor([e.tokens]))[0].log_softmax(-1)
        each += [-float(logp[i - 1, e.tokens[i]]) for i in range(e.prompt_length, len(e.tokens))]
    assert len(each) == 7
    assert text_scores.nats(params, examples) == pytest.approx(sum(each) / 7, rel=1e-5)
    with pytest.raises(InputError, match="no answer token"):
        text_scores.nats(params, [Example((1, 2), 2)])


def test_text_scores_of_a_side():
    """Perplexity under the base is what generation itself has seen, where the base has written the answers."""
    params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "The sun", "Tim said")]
    made = fgpt.generate(params, prompts, eos_token_id=tokenizer.eos, max_new_tokens=8, logprobs=True)
    found = [Answer(tokenizer.decode(x.tokens), tuple(x.tokens), x.finished) for x in made]
    scores = of_texts(params, prompts, found, tokenizer.eos)
    logprobs = [p for x in made for p in x.logprobs]
    assert scores["perplexity of the answers under the base"] == pytest.approx(
        math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4
    )
    by_hand = [Answer("a b c d a b c d", (1, 2, 3), True), Answer("a b", (4,), False)]
    scores = of_texts(params, prompts[:2], by_hand, tokenizer.eos)
    assert scores["answers finished with EOS (%)"] == 50
    assert scores["mean answer length (tokens)"] == 2
    assert scores["repeated 4-grams (%)"] == pytest.approx(10)  # of 20 and 0
    assert scores["distinct-1 (%)"] == pytest.approx(40)  # 4 of 10
    assert scores["distinct-2 (%)"] == pytest.approx(50)  # ab bc cd da, of 7 and 1
    empty = of_texts(params, prompts[:1], [Answer("", (), True)], tokenizer.eos)  # its end of text is what was written
    assert empty["perplexity of the answers under the base"] > 1


def test_rouge_l():
    # the cat the mat: 4 in order, of 6 words and of 5; F1 = 2 (4/5) (4/6) / (4/5 + 4/6) = 8/11
    one = text_scores.rouge_l(["The cat sat on the mat."], ["the cat lay, the mat"])
    assert one == pytest.approx(100 * 8 / 11)
    both = text_scores.rouge_l(["The cat sat on the mat.", "a b"], ["the cat lay, the mat", "c"])
    assert both == pytest.approx(100 * 4 / 11)
    rows = [InstructionRow("Say.", "", "a b"), InstructionRow("No answer known.")]
    got = rouge_scores(rows, [Answer("a b", (1,), True), Answer("x", (1,), True)])
    assert got == {"ROUGE-L F1 (0 to 100)": 100.0}  # the row without an answer does not count
    assert rouge_scores(rows[1:], [Answer("x", (1,), True)]) == {}


def test_best():
    assert best("points (0 to 100)", ["1.00", "12.00", "12.00"]) == [False, True, True]
    assert best("held-out response loss (nats per token)", ["1,000.00", "2.00"]) == [False, True]
    assert best("mean answer length (tokens)", ["1.00", "2.00"]) == [False, False]
    assert best("points (0 to 100)", ["1.00", "1.00"]) == [False, False]


# -------------------------------------------------------------------------------------------------------------- sides


def test_labels_tell_sides_apart():
    paths = [Path(p) for p in ("/a/x/run", "/a/y/run", "/a/y/other")]
    assert compare_sides.labels(paths[1:]) == ["run", "other"]
    assert compare_sides.labels(paths) == ["x/run", "y/run", "y/other"]
    assert compare_sides.labels([Path("/a/base"), Path("/a/tuned")]) == ["a/base", "a/tuned"]


def test_several_runs(trained: Path):
    lora, ia3 = (str(trained / name) for name in NAMES)
    assert main(["compare", lora, ia3]) == 0
    out = trained / "compare-lora-nano-ia3-nano"
    assert {p.name for p in out.iterdir()} == {"compare.md", "compare.html", "compare.json"}
    found = told(out / "compare.json")
    assert list(found["scores"]) == ["base", *NAMES]
    assert len({tuple(some) for some in found["scores"].values()}) == 1  # the same scores, in the same order
    assert found["settings"]["templates"] == dict.fromkeys(["base", *NAMES], "plain")
    alone = {name: told(trained / name / "compare.json") for name in NAMES}
    for name in NAMES:  # a side is what it is, whatever stands beside it
        assert alone[name]["scores"]["base"] == found["scores"]["base"]
        assert alone[name]["scores"]["tuned"] == found["scores"][name]
        for one, all_of_them in zip(alone[name]["answers"], found["answers"], strict=True):
            assert one["base"] == all_of_them["base"]
            assert one["tuned"] == all_of_them[name]
    assert len({json.dumps(found["scores"][side]) for side in ("base", *NAMES)}) == 3
    texts = {side: [row[side]["text"] for row in found["answers"]] for side in ("base", *NAMES)}
    assert texts["base"] != texts["lora-nano"] != texts["ia3-nano"]
    html, text = (out / "compare.html").read_text(), (out / "compare.md").read_text()
    for side in ("base", *NAMES):
        assert text.count(f"**{side}**") == 3
        assert f">{side}</span>" in html
    assert "| | base | lora-nano | ia3-nano |" in text


def test_answers_are_those_of_the_run_itself(trained: Path):
    """From the files by hand: greedy, each prompt alone."""
    main(
        [
            "compare",
            str(trained / "lora-nano"),
            "--num-prompts",
            "2",
            "--max-new-tokens",
            "9",
            "--out",
            str(trained / "two"),
        ]
    )
    found = told(trained / "two" / "compare.json")
    assert len(found["answers"]) == 2
    run = run_dir.read_run(trained / "lora-nano")
    base, tokenizer = load_base(run), fgpt.tokenizer("nano")
    for side, params in (("base", base), ("tuned", run_dir.load_tuned(trained / "lora-nano", base))):
        for row in found["answers"]:
            prompt = encode_prompt(InstructionRow(row["instruction"], row["input"]), PLAIN, tokenizer)
            it = fgpt.generate(params, [prompt], eos_token_id=tokenizer.eos, max_new_tokens=9)[0]
            assert row[side] == {"text": tokenizer.decode(it.tokens).strip(), "finished": it.finished}


def test_no_comparison_is_written_over(trained: Path, tmp_path: Path):
    """One of other settings has another name; the same again has its own. Files of one name are told apart."""
    run = shutil.copytree(trained / "lora-nano", tmp_path / "lora-nano")
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
    assert told(run / "compare-own-max-new-tokens-2-2.json")["answers"][0]["instruction"] == "Say b."
    assert main(["report", str(run)]) == 0
    shown = (run / "report.html").read_text()
    assert shown.index("held-out prompts of lora-nano") < shown.index("<h3>compare-2-prompts</h3>")


def test_each_run_answers_in_its_own_template(trained: Path, tmp_path: Path):
    assert main(["train", "lora-nano", *SHORT, "--template", "alpaca", "--out", str(tmp_path)]) == 0
    runs = [str(tmp_path / "lora-nano"), str(trained / "lora-nano")]
    assert main(["compare", *runs, "--num-prompts", "2", "--out", str(tmp_path / "both")]) == 0
    found, alone = told(tmp_path / "both" / "compare.json"), told(trained / "lora-nano" / "compare.json")
    one, two = list(found["scores"])[1:]
    assert (one, two) == (f"{tmp_path.name}/lora-nano", f"{trained.name}/lora-nano")
    assert found["settings"]["templates"] == {"base": "alpaca", one: "alpaca", two: "plain"}
    assert [row[two] for row in found["answers"]] == [row["tuned"] for row in alone["answers"][:2]]


def test_the_same_key_for_every_side(trained: Path, tmp_path: Path):
    """A run whose adapter changes nothing writes what the base writes, drawn or not; another seed writes otherwise."""
    still = tmp_path / "still"
    args = ["train", "ia3-nano", *SHORT, "--steps", "1", "--lr", "1e-12", "--compare-prompts", "0", "--out", str(still)]
    assert main(args) == 0
    how = ["--temperature", "1.0", "--top-p", "0.95", "--num-prompts", "3", "--max-new-tokens", "12"]
    for seed in ("1", "2"):
        assert main(["compare", str(still / "ia3-nano"), *how, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    first, second = (told(tmp_path / seed / "compare.json") for seed in ("1", "2"))
    assert all(row["base"] == row["tuned"] for row in first["answers"])
    assert [row["base"] for row in first["answers"]] != [row["base"] for row in second["answers"]]
    assert "temperature 1.0, top-p 0.95, seed 1" in (tmp_path / "1" / "compare.md").read_text()


def test_the_base_is_loaded_once(trained: Path, monkeypatch: pytest.MonkeyPatch):
    loads = []
    load: Callable[..., object] = models.load
    monkeypatch.setattr(models, "load", lambda *args: (loads.append(args), load(*args))[1])
    sides = compare_sides.find([str(trained / name) for name in NAMES])
    params = compare_sides.load_params(sides)
    assert len(loads) == 1
    assert list(params) == ["base", *NAMES]
    assert all(x.wte.w is params["base"].wte.w for x in params.values())


# ------------------------------------------------------------------------------------------------------------ prompts


def test_the_package_s_prompts():
    rows = prompt_file.read("general")
    assert len(rows) == len({row.instruction for row in rows}) == 32
    tokenizer = fgpt.tokenizer("nano")
    assert max(len(encode_prompt(row, PLAIN, tokenizer)) for row in rows) < 256  # room to answer in a small context
    assert any(row.input for row in rows)


def test_prompts_of_a_file(trained: Path, tmp_path: Path):
    """Texts and objects alike; a prompt's own answer, where it has one, is held against."""
    rows = ["Tell me of a <b>fox</b>.", {"instruction": "Say no.", "input": "To Tim & Sue.", "output": "No, Tim."}]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    (tmp_path / "own.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    expected = [InstructionRow("Tell me of a <b>fox</b>."), InstructionRow("Say no.", "To Tim & Sue.", "No, Tim.")]
    assert prompt_file.read(str(tmp_path / "own.json")) == prompt_file.read(str(tmp_path / "own.jsonl")) == expected
    before = (trained / "lora-nano" / "compare.json").read_text()
    assert main(["compare", str(trained / "lora-nano"), "--prompts", str(tmp_path / "own.json")]) == 0
    assert (trained / "lora-nano" / "compare.json").read_text() == before  # the held-out comparison stays
    found = told(trained / "lora-nano" / "compare-own.json")
    scores = found["scores"]["tuned"]
    assert "response loss (nats per token)" in scores
    assert not any(name.startswith(("points", "held-out")) for name in scores)
    run = run_dir.read_run(trained / "lora-nano")
    tokenizer = fgpt.tokenizer("nano")
    prompt, answer = encode_prompt(expected[1], PLAIN, tokenizer), tokenizer.encode("No, Tim.")
    tuned = run_dir.load_tuned(trained / "lora-nano", load_base(run))
    logp = fgpt.apply(tuned, torch.tensor([[*prompt, *answer, tokenizer.eos]]))[0].log_softmax(-1)
    each = [-float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate([*answer, tokenizer.eos])]
    assert scores["response loss (nats per token)"] == pytest.approx(sum(each) / len(each), rel=1e-4)
    html = (trained / "lora-nano" / "compare-own.html").read_text()
    assert "&lt;b&gt;fox" in html
    assert "<b>fox" not in html
    assert "Tim &amp; Sue" in html


def test_a_page_of_hostile_text():
    """Nothing of the texts is read as HTML, wherever it stands."""
    odd = '<script>"&'
    answer = Answer(odd, (1,), False)
    found = Comparison(odd, [odd], [InstructionRow(odd, odd, odd)], {odd: [answer]}, {odd: {odd: 1.0}}, {})
    assert "<script" not in page(found)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """And comes before any model is loaded; nothing is left half-made."""
    monkeypatch.setattr(compare_sides, "load_params", None)
    lora, ia3 = (str(trained / name) for name in NAMES)
    files = {
        "empty.json": "",
        "none.json": "[]",
        "broken.json": '["a", ',
        "object.json": '{"instruction": "a"}',
        "broken.jsonl": '"a"\n{"instruction": \n',
        "number.json": "[7]",
        "blank.json": '["a", " "]',
        "column.json": '[{"prompt": "a"}]',
        "null.json": '[{"instruction": null}]',
        "list.json": '[{"instruction": "a", "input": ["b"]}]',
        "long.json": json.dumps(["a fox", "ran " * 2000]),
        "prompts.txt": "a",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "file").write_text("")
    cases = [
        (["compare"], "expected one or more runs"),
        (["compare", lora, "nothing"], "no trained run 'nothing'"),
        (["compare", lora, ia3, lora + "/"], "lora-nano is given 2 times"),
        (["compare", lora, "--prompts", "missing.json"], "no prompt file 'missing.json'"),
        (["compare", lora, "--prompts", str(tmp_path)], "no prompt file"),
        (["compare", lora, "--prompts", "generl"], "one of general"),
        (["compare", lora, "--num-prompts", "0"], "--num-prompts is 0"),
        (["compare", lora, "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["compare", lora, "--temperature", "-1"], "temperature"),
        (["compare", lora, "--promts", "x"], "did you mean --prompts"),
        (["compare", lora, "--out", str(tmp_path / "file" / "below")], "is not a writable directory"),
    ]
    said = {
        "empty.json": "the file is empty",
        "none.json": "it holds no prompts",
        "broken.json": "not JSON",
        "object.json": "expected a list",
        "broken.jsonl": "line 2: not JSON",
        "number.json": "row 1: expected a text, or an object with an instruction, got int",
        "blank.json": "row 2: the prompt is empty",
        "column.json": "got columns 'prompt'",
        "null.json": "should hold text, got null",
        "list.json": "column 'input' should hold text, got list",
        "long.json": "prompt 2 has",
        "prompts.txt": "cannot tell its format",
    }
    cases += [(["compare", lora, "--prompts", str(tmp_path / name)], message) for name, message in said.items()]
    before = sorted(trained.rglob("*")), sorted(tmp_path.rglob("*"))
    for args, message in cases:
        assert main(args) == 2, args
        assert message in one_line(capsys), args
    assert (sorted(trained.rglob("*")), sorted(tmp_path.rglob("*"))) == before


def test_runs_of_different_bases(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = trained / "lora-nano"
    changes = {"quantize": "nf4", "dtype": "bfloat16", "base": "gpt2"}
    for field, value in changes.items():
        other = tmp_path / field
        (other / "adapter").mkdir(parents=True)
        (other / "run.json").write_text(json.dumps(told(lora / "run.json") | {field: value}))
        assert main(["compare", str(lora), str(other)]) == 2
        said = one_line(capsys)
        assert value in said
        assert "an adapter works on its own base only" in said
    assert not list(trained.glob("compare-*"))[1:]


def test_a_run_without_held_out_rows(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    own = ["--data", str(tmp_path / "rows.json"), "--num-heldout", "0", "--steps", "1", "--micro-batch-size", "1"]
    assert main(["train", "lora-nano", *own, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "lora-nano")]) == 2
    assert "held out no rows: give prompts with --prompts FILE" in one_line(capsys)


def test_rows_that_another_run_may_have_seen(trained: Path):
    run = run_dir.read_run(trained / "lora-nano")
    from dataclasses import replace

    first = replace(run, data="rows.json", seed=0, num_heldout=8)
    assert not compare_sides.may_have_seen(first, first)
    assert compare_sides.may_have_seen(replace(first, seed=1), first)
    assert compare_sides.may_have_seen(replace(first, num_heldout=4), first)
    assert not compare_sides.may_have_seen(replace(first, num_heldout=16), first)  # it held those out as well
    assert not compare_sides.may_have_seen(replace(run, seed=1), run)  # the embedded data has its own
