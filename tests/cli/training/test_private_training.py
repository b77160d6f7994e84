"""`--privacy.epsilon`: the budget is spent and told, runs repeat to the bit, and what would leak is refused."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.processes import run_processes
from builders.runs import copy_interrupted, one_line
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import fgpt
from fgpt.cli import report
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.options import parse
from fgpt.cli.tasks import build_job
from fgpt.cli.training.build import batches
from fgpt.cli.training.private import check_private_options, with_private_seed
from fgpt.cli.training.row_order import LotOrder
from fgpt.data.examples import Example
from fgpt.io import models
from fgpt.kernels.rotary import DynamicScaling
from fgpt.recipes import RECIPES, FineTuningRecipe, InstructionRecipe, Privacy, find
from fgpt.recipes.tuning import Adapter
from fgpt.tree import leaves

EXAMPLES = [Example.completion(tuple(range(1, 4 + i % 6)), prompt_length=1) for i in range(30)]
BUDGET = ["--privacy.epsilon", "3", "--privacy.delta", "1e-3"]
SEED = ["--privacy.seed", "7"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of seconds on a tiny base and 28 rows."""
    at = tmp_path_factory.mktemp("private")
    cfg = replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=32, d_mlp=64, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
    rows = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(32)]
    (at / "rows.json").write_text(json.dumps(rows))
    data = ["--base", str(at / "base"), "--data", str(at / "rows.json"), "--num-heldout", "4", "--max-seq-len", "64"]
    sizes = ["--micro-batch-size", "2", "--grad-accumulation-steps", "2", "--steps", "6"]
    often = ["--eval-every", "3", "--checkpoint-every-minutes", "0", "--keep-checkpoints", "9"]
    return ["train", "lora-nano", *data, *sizes, *often, "--compare-prompts", "0", "--adapter.dropout", "0.2"]


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("dp_accounting")
    out = tmp_path_factory.mktemp("runs")
    assert main([*command, *BUDGET, *SEED, "--out", str(out)]) == 0
    return out / "lora-nano"


@pytest.fixture
def free_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accounting, which is neither installed everywhere nor quick."""
    monkeypatch.setattr("fgpt.cli.training.private.find_noise_multiplier", lambda *_, **__: 1.0)
    monkeypatch.setattr("fgpt.cli.training.private.spent_epsilon", lambda *_, **__: 1.0)
    monkeypatch.setattr("fgpt.cli.training.private.require_extra", lambda *_: None)


def final_state(run: Path) -> bytes:
    return (run / "checkpoints" / "step-000006" / "state.safetensors").read_bytes()


@pytest.mark.slow
def test_processes_add_one_noise(command: list[str], run: Path, tmp_path: Path) -> None:
    """That of the seed that is given, as one process does; without one it is a secret that they share."""
    runs = []
    for name, seed in (("given", SEED), ("secret", [])):
        whole = [*command, *BUDGET, *seed, "--out", str(tmp_path / name)]
        assert run_processes(whole, 2, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
        runs.append(tmp_path / name / "lora-nano")
    one, given, secret = (
        torch.cat([x.flatten() for x in load_file(at / "adapter" / "adapter_model.safetensors").values()])
        for at in (run, *runs)
    )
    assert (one - given).norm() <= 1e-6 * one.norm()
    assert (one - secret).norm() > 0.1 * one.norm()


@pytest.mark.slow
def test_the_budget_is_spent_and_told(run: Path):
    from fgpt.transforms.privacy_accounting import find_noise_multiplier, spent_epsilon

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "epsilon" in line] == [3, 6]
    plan = {"delta": 1e-3, "sampling_rate": 4 / 28}
    sigma = find_noise_multiplier(3.0, steps=6, **plan)
    for step in (3, 6):
        assert lines[step - 1]["epsilon"] == pytest.approx(spent_epsilon(sigma, steps=step, **plan), abs=1e-3)
    assert lines[5]["epsilon"] == pytest.approx(3.0, abs=1e-3)
    page = report.run(str(run)).read_text()
    assert "privacy spent after step 6" in page


def test_adapters_move_and_the_norm_is_that_of_the_noise(run: Path):
    """A norm of N(0, σ²C²) / L in all elements, beside which the clipped gradients are small."""
    from fgpt.transforms.privacy_accounting import find_noise_multiplier

    adapters = fgpt.load_peft(run / "adapter", fgpt.load(run.parents[0] / json_of(run)["base"]))
    assert all(bool(x.b.abs().max() > 1e-4) for x in adapters.values())
    sigma = find_noise_multiplier(3.0, delta=1e-3, sampling_rate=4 / 28, steps=6)
    noise = sigma * 0.1 / 4 * math.sqrt(fgpt.num_trainable(adapters))
    for line in read_metrics(run / "metrics.jsonl"):
        assert line["grad_norm"] == pytest.approx(noise, rel=0.1)


def json_of(run: Path) -> dict[str, Any]:
    local = json.loads((run / "local.json").read_text())["paths"]
    return json.loads((run / "run.json").read_text()) | local


@pytest.mark.slow
@pytest.mark.usefixtures("free_noise")
def test_equal_seeds_give_equal_bits(command: list[str], tmp_path: Path):
    states: list[bytes] = []
    for name, options in (("first", SEED), ("second", SEED), ("another", ["--privacy.seed", "8"])):
        assert main([*command, *BUDGET, *options, "--out", str(tmp_path / name)]) == 0
        states.append(final_state(tmp_path / name / "lora-nano"))
    assert states[0] == states[1] != states[2]


@pytest.mark.slow
@pytest.mark.usefixtures("free_noise")
def test_a_seed_that_nobody_gave_is_secret(command: list[str], tmp_path: Path):
    """It is in no file but local.json, and a resumed run goes on with it, to the bit."""
    assert main([*command, *BUDGET, "--out", str(tmp_path)]) == 0
    whole, resumed = tmp_path / "lora-nano", tmp_path / "resumed" / "lora-nano"
    seed = json_of(whole)["privacy"]["seed"]
    assert seed > 2**32  # of 63 bits
    report.run(str(whole))
    texts = [path for path in whole.rglob("*") if path.suffix in (".json", ".jsonl", ".html", ".md")]
    assert [path.name for path in texts if str(seed) in path.read_text()] == ["local.json"]
    copy_interrupted(whole, resumed, after=2)
    assert main(["train", str(resumed), "--resume", "--out", str(resumed.parent)]) == 0
    assert final_state(resumed) == final_state(whole)
    assert with_private_seed(private_recipe(command)) != with_private_seed(private_recipe(command))


@given(st.integers(0, 40), st.integers(0, 99), st.sampled_from([(6, 1), (2, 3), (1, 6)]))
def test_lots_follow_from_the_seed_from_any_update_on(begin: int, seed: int, sizes: tuple[int, int]):
    """In micro-batches of any size, each example a row by itself, and at most once."""
    order, other = (LotOrder(EXAMPLES, recipe_of(*each, seed), 12) for each in ((6, 1), sizes))
    expected = list(itertools.islice(order.updates(), begin, begin + 4))
    assert list(itertools.islice(other.updates(begin), 4)) == expected
    for lot, parts in zip(expected, batches(other, sizes[0], begin=begin), strict=False):
        assert [len(row) for row in lot] == [1] * len(lot)
        assert sum(len(batch.tokens) for batch in parts) == len(lot)
        assert all(batch.segments is None for batch in parts)


def recipe_of(micro_batch_size: int, grad_accumulation_steps: int, seed: int) -> FineTuningRecipe:
    recipe = find("lora-nano")
    assert isinstance(recipe, FineTuningRecipe)
    sizes = {"micro_batch_size": micro_batch_size, "grad_accumulation_steps": grad_accumulation_steps}
    return replace(recipe, steps=None, epochs=2.0, privacy=Privacy(3.0, 1e-3, seed=seed), **sizes)


def test_epochs_are_expected_reads():
    order = LotOrder(EXAMPLES, recipe_of(3, 2, 0), 12)
    assert (order.sampling_rate, order.num_steps()) == (0.2, 10)
    sizes = [len(lot) for lot in itertools.islice(order.updates(), 500)]
    assert sum(sizes) / 500 == pytest.approx(6, abs=5 * math.sqrt(30 * 0.2 * 0.8 / 500))
    assert len(set(sizes)) > 6
    assert [row[0].tokens for row in order.first_rows(32)] == [x.tokens for x in [*EXAMPLES, *EXAMPLES[:2]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--privacy.epsilon", "8"], "--privacy.epsilon 8 is a budget with --privacy.delta: give one below 1 / exampl"),
        (["--privacy.delta", "1e-5"], "are of --privacy.epsilon: give it, or leave them out"),
        (["--privacy.max-norm", "1"], "are of --privacy.epsilon: give it, or leave them out"),
        (["--privacy.epsilon", "0", "--privacy.delta", "1e-5"], "--privacy.epsilon is 0.0: expected a number above 0"),
        (
            ["--privacy.epsilon", "-3", "--privacy.delta", "1e-5"],
            "--privacy.epsilon is -3.0: expected a number",
        ),
        (["--privacy.epsilon", "inf", "--privacy.delta", "1e-5"], "--privacy.epsilon is inf: expected"),
        (["--privacy.epsilon", "3", "--privacy.delta", "1"], "--privacy.delta is 1.0: expected"),
        (["--privacy.epsilon", "3", "--privacy.delta", "0"], "--privacy.delta is 0.0: expected"),
        ([*BUDGET, "--privacy.max-norm", "0"], "--privacy.max-norm is 0.0: expected a number above 0"),
        (["--privacy.epsilon", "much", "--privacy.delta", "0"], "--privacy.epsilon is 'much': expected a number"),
        ([*BUDGET, "--neftune-noise-alpha", "5"], "--neftune-noise-alpha scales noise by the longest row of a batch"),
        ([*BUDGET, "--cuda-graphs"], "--cuda-graphs records steps of few shapes"),
        ([*BUDGET, "--streaming"], "--streaming does not know"),
        ([*BUDGET, "--forget", "rows.json"], "the difference of both runs would show the rows"),
    ],
)
def test_what_is_refused_before_anything_is_read(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", *options]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("name", ["dpo-nano", "kto-nano", "reward-nano", "grpo-nano"])
def test_losses_that_are_no_sums_over_examples(name: str, capsys: pytest.CaptureFixture[str]):
    """The kinds that can be private are all that are not refused."""
    assert main(["train", name, *BUDGET, "--data", "pairs.json"]) == 2
    assert "training has no private form here, leave it out" in one_line(capsys)
    kinds = {make().kind for make in RECIPES.values() if isinstance(make(), FineTuningRecipe)}
    assert kinds == {"instruction", "data-to-text", "classification", "preference", "reward", "grpo"}


def test_a_pretraining_has_no_such_option(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "pretrain-nano", *BUDGET]) == 2
    assert "no option --privacy.epsilon" in one_line(capsys)


def test_without_the_accountant_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fgpt.extras.find_spec", lambda package: None)
    with pytest.raises(fgpt.InputError, match=r"private trainings need dp_accounting: pip install 'fgpt\[privacy\]'"):
        check_private_options(recipe_of(2, 1, 0))


def private_recipe(command: Sequence[str], *options: str) -> InstructionRecipe:
    return parse(InstructionRecipe, [*command[2:], *BUDGET, *options], find("lora-nano"), "fgpt train lora-nano")


@pytest.mark.usefixtures("free_noise")
def test_what_is_refused_of_the_data(command: list[str], tmp_path: Path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Say {i}.", "output": "It is."} for i in range(9)]))
    long_text = tmp_path / "long.json"
    long_text.write_text(json.dumps([{"text": f"A fox ran {i} miles. " * 40} for i in range(9)]))
    cases = (
        (["--micro-batch-size", "30"], "are 60 rows in a step, and there are 28 examples: lower one of them"),
        (["--privacy.delta", "0.04"], r"--privacy.delta 0.04 is not below 1 / 28 examples \(0.036\)"),
        (["--data", f"{rows}:0.7", f"{rows}:0.3"], "leave out the weights of --data"),
        (["--data", str(rows), str(rows)], "twice, and --privacy.epsilon protects one example"),
        (["--data", str(long_text), "--template", "none"], r"examples of .*long.json are further parts of their rows"),
    )
    for options, message in cases:
        with pytest.raises(fgpt.InputError, match=message):
            build_job(private_recipe(command, *options))


@pytest.mark.usefixtures("free_noise")
def test_a_long_row_that_would_turn_the_angles_of_others(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cfg = fgpt.Config(1, 2, 32, 96, 4096, 64, rope_scaling=DynamicScaling(2.0, 48))
    base = replace(fgpt.init(replace(cfg, rope_scaling=None), fgpt.key(0)), cfg=cfg)
    monkeypatch.setattr("fgpt.cli.tasks.instruction_tuning.load_base", lambda recipe: base)
    with pytest.raises(fgpt.InputError, match="beyond 48 tokens a long row turns the angles"):
        build_job(private_recipe(command))
    build_job(private_recipe(command, "--max-seq-len", "48"))


@pytest.mark.usefixtures("free_noise")
@pytest.mark.parametrize(
    "options",
    [
        ["--adapter.kind", "dora"],
        ["--quantize", "int8"],
        ["--label-smoothing-factor", "0.1"],
        ["--optimizer", "adamw8bit", "--ema-decay", "0.9"],
        ["--remat"],
    ],
)
def test_other_options_of_a_tuning(options: list[str], command: list[str]):
    """Every leaf moves in two steps, which the same seed repeats to the bit."""
    states = []
    for _ in range(2):
        job = build_job(private_recipe(command, *options, *SEED))
        before = state = job.initial_state.take()
        for step, micro_batches in zip(range(2), job.batches(0), strict=False):
            state, _ = job.train_step(state, micro_batches, step)
        states.append(leaves(state.trainable))
        assert all((x != leaves(before.trainable)[path]).any() for path, x in states[-1].items())
    assert all(torch.equal(x, states[1][path]) for path, x in states[0].items())


@pytest.mark.usefixtures("free_noise")
def test_a_classifier_is_private_too_with_the_labels_given(tmp_path: Path, command: list[str]):
    base, texts = command[command.index("--base") + 1], tmp_path / "texts.txt"
    texts.write_text("".join(f"I am so {('glad', 'sad')[i % 2]} {i};{('joy', 'woe')[i % 2]}\n" for i in range(24)))
    recipe = replace(
        find("emotion-small"),
        base=base,
        train=str(texts),
        test=None,
        num_heldout=4,
        steps=2,
        labels=("joy", "woe"),
        adapter=Adapter(rank=2),
        privacy=Privacy(3.0, 1e-3, seed=1),
    )
    job = build_job(recipe)
    assert all(batch.segments is None for parts in itertools.islice(job.batches(0), 5) for batch in parts)
    state = job.initial_state.take()
    after, _ = job.train_step(state, next(filter(None, job.batches(0))), 0)
    assert all((x != leaves(state.trainable)[path]).any() for path, x in leaves(after.trainable).items())
    with pytest.raises(fgpt.InputError, match=r"--privacy\.epsilon needs --labels"):
        build_job(replace(recipe, labels=()))
    with pytest.raises(fgpt.InputError, match="--num-fewshot shows training examples"):
        build_job(replace(recipe, head="lm", num_fewshot=2))
    with pytest.raises(fgpt.InputError, match=r"1 of \d+ trained leaves have no gradient \(wte/"):
        build_job(replace(recipe, new_tokens=("<|never|>",)))  # noise alone would move its row


@pytest.mark.parametrize("name", ["sweep", "lr-range"])
def test_commands_that_would_read_outside_of_the_budget(name: str, capsys: pytest.CaptureFixture[str]):
    several = ["--lr", "1e-3", "3e-3"] if name == "sweep" else []
    assert main([name, "lora-nano", *BUDGET, *several]) == 2
    assert "--privacy" in one_line(capsys)
