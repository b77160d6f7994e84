"""A data-to-text run from training to its scores: texts by beam search, against several references each."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders.command_line import ODD_NAME

from fgpt.cli import run_dir
from fgpt.cli.evaluation import data_to_text
from fgpt.cli.evaluation.metrics import reference_scores
from fgpt.cli.evaluation.metrics.reference_scores import corpus_bleu
from fgpt.cli.main import main
from fgpt.cli.training.build import load_base
from fgpt.cli.training.private import check_private_options
from fgpt.cli.training.row_gradients import check_per_example_options
from fgpt.cli.training.shared_update import check_shared_update
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.prompt_templates import encode_prompt, template
from fgpt.generation.beam import beam_search_batch
from fgpt.generation.sampling import SamplingParams
from fgpt.recipes import Adapter, DataToTextRecipe, Privacy, find

ROWS = [f"name[{name}],{name} is a {kind}." for name in ("Zizzi", "Aromi", "Cotto") for kind in ("pub", "café")]


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("e2e")
    (at / "rows.csv").write_text("\n".join(["mr,ref", *ROWS, ""]))
    files = ["--base", str(project / "base"), "--data", str(at / "rows.csv"), "--test", str(at / "rows.csv")]
    assert main(["train", "e2e-nano", *files, "--steps", "2", "--max-new-tokens", "6", "--out", str(at)]) == 0
    return at / "e2e-nano"


@pytest.fixture(autouse=True)
def no_java(monkeypatch: pytest.MonkeyPatch):
    """METEOR takes seconds to start; `test_reference_scores` has it."""
    monkeypatch.setattr(reference_scores, "missing_for_meteor", lambda: ["java"])


def test_the_texts_are_those_of_a_search_for_each_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["eval", "run", str(run), "--outputs", str(tmp_path / "texts.txt"), "--out", str(tmp_path)]
    assert main([*command, "--batch-size", "2", "--num-beams", "3"]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["settings"]["num_beams"] == 3
    assert {name: result["test"][name] for name in ("inputs", "references", "beams")} == {
        "inputs": 3,
        "references": 6,
        "beams": 3,
    }
    assert "METEOR is left out: it needs java" in capsys.readouterr().err
    recipe = run_dir.read_run(run)
    assert isinstance(recipe, DataToTextRecipe)
    params, tokenizer = run_dir.load_tuned(run, load_base(recipe)), load_tokenizer(recipe).tokenizer
    test = data_to_text.load_references(str(recipe.test), recipe)
    expected = []
    for row in test.rows:
        prompt = encode_prompt(row, template("data-to-text"), tokenizer)
        ((best, *_),) = beam_search_batch(
            params,
            [prompt],
            eos_token_id=tokenizer.eos_token_ids,
            max_new_tokens=6,
            num_beams=3,
            length_penalty=0.8,
            sampling=SamplingParams(no_repeat_ngram=4),
            prompt_counts=False,
        )
        expected.append(tokenizer.decode(best.tokens).strip())
    assert (tmp_path / "texts.txt").read_text().splitlines() == [" ".join(text.split()) for text in expected]
    assert result["test"]["BLEU"] == pytest.approx(corpus_bleu(expected, test.references))


def test_a_limit_is_of_inputs(run: Path, tmp_path: Path):
    assert main(["eval", "run", str(run), "--limit", "1", "--num-beams", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())["test"]
    assert (result["inputs"], result["references"]) == (1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mr,txt\nname[A],b\n", "no column 'ref'; there are 'mr', 'txt'"),
        (
            "mr,ref\nname[A],b\nname[B],\n",
            "the input 'name[B]' has a row without a reference: fill it, or remove the row",
        ),
        ("text\nsome text\n", "expected inputs and references, such as columns mr and ref; got other rows"),
        ("mr,ref\n", "it holds no rows, expected at least one"),
    ],
)
def test_a_test_set_that_cannot_be_scored(
    text: str, expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Before the model is loaded, by an evaluation and by a training alike."""
    (tmp_path / "test.csv").write_text(text)
    recipe = run_dir.read_run(run)
    files = ["--base", recipe.to_json()["base"], "--data", *recipe.to_json()["data"]]
    for command in (["eval", "run", str(run)], ["train", "e2e-nano", *files, "--out", str(tmp_path / "runs")]):
        assert main([*command, "--test", str(tmp_path / "test.csv")]) == 2
        assert expected in capsys.readouterr().err


def test_options_of_another_kind_of_run(run: Path, project: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "run", str(run), "--num-generations", "3"]) == 2
    assert "leave out --columns, --labels and --num-generations" in capsys.readouterr().err
    assert main(["eval", "run", str(project / "runs" / "it[b]"), "--length-penalty", "0.8"]) == 2
    assert "--length-penalty is of a data-to-text run" in " ".join(capsys.readouterr().err.split())


def test_an_input_longer_than_the_context(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "test.csv").write_text(f"mr,ref\n{'name[A] ' * 99},b {ODD_NAME}\n")
    assert main(["eval", "run", str(run), "--test", str(tmp_path / "test.csv")]) == 2
    assert "tokens: expected at most 95, the context without one new token" in capsys.readouterr().err


def test_a_training_by_targets_has_what_instruction_tuning_has():
    """Differential privacy, gradients of rows, and a base in parts ask for no more than that."""
    recipe = find("e2e-nano")
    assert isinstance(recipe, DataToTextRecipe)
    check_private_options(replace(recipe, privacy=Privacy(epsilon=8, delta=1e-5)))
    check_per_example_options(replace(recipe, per_example=True))
    check_shared_update(replace(recipe, shard_base=True, grad_accumulation_steps=2), num_processes=2)


def test_the_papers_settings():
    """Hu et al. 2021, table 11, and the commands of its code."""
    recipe = find("e2e-medium")
    assert isinstance(recipe, DataToTextRecipe)
    assert recipe.base == "gpt2-medium"
    assert recipe.adapter == Adapter("lora", rank=4, alpha=32, dropout=0.1, target=r"blocks\..*\.(q|v)")
    assert (recipe.optimizer, recipe.weight_decay) == ("adamw", 0.01)
    assert (recipe.peak_lr, recipe.lr_scheduler_type, recipe.warmup_steps) == (2e-4, "linear", 500)
    assert (recipe.epochs, recipe.rows_per_update, recipe.label_smoothing_factor) == (5, 8, 0.1)
    assert (recipe.num_beams, recipe.length_penalty, recipe.no_repeat_ngram) == (10, 0.8, 4)
    assert (recipe.max_seq_len, recipe.max_new_tokens, recipe.packing) == (512, 64, False)
