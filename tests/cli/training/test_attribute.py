"""`fgpt attribute`: effects of rows are those of trainings without them, and the page names them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import grad

import fgpt
from fgpt.cli import run_dir, tasks
from fgpt.cli.attribution.effects import EPS_ROOT, answer_loss, at_the_end, example_at, through_training
from fgpt.cli.main import main
from fgpt.cli.training.build import make_tuning_step
from fgpt.cli.training.job import TrainingJob
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.losses import nll
from fgpt.optim import adamw, global_norm
from fgpt.tree import tree_leaves

ROWS = [{"instruction": f"Say {i}.", "output": f"The number is {i}. " * (1 + i % 3)} for i in range(20)]
STEPS = 5


def train(at: Path, *others: str) -> Path:
    """Several examples in a row, and two micro-batches of other widths in a step."""
    (at / "rows.json").write_text(json.dumps(ROWS))
    data = ["--data", str(at / "rows.json"), "--num-heldout", "0", "--compare-prompts", "0", "--out", str(at / "runs")]
    size = ["--micro-batch-size", "1", "--grad-accumulation-steps", "2", "--max-seq-len", "64", "--steps", str(STEPS)]
    adapter = ["--adapter.target", r"blocks\.[01].*\.(q|down)", "--adapter.rank", "2", "--adapter.dropout", "0.1"]
    assert main(["train", "lora-nano", *data, *size, *adapter, *others]) == 0
    return at / "runs" / "lora-nano"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("attribute"))


def query_of(job: TrainingJob) -> fgpt.Batch:
    tokens = job.tokenizer.encode("Instruction: Say 3.\n\nResponse:\nThe number is 3.")
    return collate([[Example.completion(tuple(tokens), len(tokens) - 6)]])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_effects_are_slopes_of_trainings(kind: str, tmp_path: Path):
    """Of trainings by the smooth AdamW, whose loop is written out here, in weights of one example."""
    recipe = run_dir.instruction_run(train(tmp_path, "--adapter.kind", kind))
    job = tasks.build_job(recipe)
    query = query_of(job)
    step = make_tuning_step(adamw(job.schedule, eps_root=EPS_ROOT), nll)

    def ending(index: int, weight: float) -> float:
        state = fgpt.init_state(job.initial_state.peek().trainable, adamw(1.0))
        updates = zip(range(job.steps), job.batches(0), job.row_indices(0))
        for t, batches, rows in updates:
            weighted = []
            for batch, indices in zip(batches, rows, strict=True):
                factors = torch.where(example_at(batch, indices) == index, weight, 1.0)
                weighted.append(replace(batch, weights=batch.weights * factors))
            state, _ = step(state, job.frozen, weighted, fgpt.fold_in(job.rng, t))
        return float(answer_loss(job.frozen, state.trainable, query))

    result = through_training(recipe, job, query)
    assert result.loss == pytest.approx(ending(0, 1.0), abs=1e-4)
    for index in result.effects.abs().argsort(descending=True)[[0, 2]].tolist():
        slope = (ending(index, 1.005) - ending(index, 0.995)) / 0.01
        assert -float(result.effects[index]) == pytest.approx(slope, rel=0.01)
    assert int(result.effects.count_nonzero()) >= 10  # of those that are read in five steps


def test_each_position_is_of_its_example(trained: Path):
    job = tasks.build_job(run_dir.instruction_run(trained))
    packed = 0
    for batches, rows in zip(job.batches(0), job.row_indices(0), strict=False):
        for batch, indices in zip(batches, rows, strict=True):
            at = example_at(batch, indices)
            packed = max(packed, *map(len, indices))
            for row, of_row in enumerate(indices):
                end = 0
                for index in of_row:
                    tokens = [*job.examples[index].tokens]
                    begin, end = end, end + len(tokens)
                    assert batch.tokens[row, begin:end].tolist() == tokens
                    assert set(at[row, begin:end].tolist()) == {index}
        if packed > 1:
            return
    pytest.fail("no row holds two examples")


def test_cosines_are_those_of_a_loop(trained: Path):
    recipe = run_dir.instruction_run(trained)
    job = tasks.build_job(recipe)
    adapters, query = run_dir.load_adapters_of(trained, job.frozen), query_of(job)
    result = at_the_end(job, adapters, query)

    def gradient(batch: fgpt.Batch) -> dict:
        return grad(lambda a: nll(fgpt.adapt(job.frozen, a), batch)[0])(adapters)

    of_query = gradient(query)
    for index in (0, 7):
        of_example = gradient(collate([[job.examples[index]]]))
        pairs = zip(tree_leaves(of_example), tree_leaves(of_query), strict=True)
        cosine = sum((x * y).sum() for x, y in pairs) / (global_norm(of_example) * global_norm(of_query))
        assert float(result.effects[index]) == pytest.approx(float(cosine), abs=1e-4)


@pytest.mark.slow
def test_the_page_names_rows(trained: Path, capsys: pytest.CaptureFixture[str]):
    runs = ["--out", str(trained.parent)]
    assert main(["attribute", "lora-nano", "Say 3.", "--response", "The number is 3.", *runs]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "answer: The number is 3." in printed
    saved = json.loads((trained / "attribution-Say-3.json").read_text())
    effects = torch.tensor(saved["effects"])
    assert len(effects) == len(ROWS)
    page = (trained / "attribution-Say-3.html").read_text()
    best = int(effects.argmax())
    assert f'<th scope="row" class="number">{best + 1}</th>' in page
    assert page.count('<th scope="row"') == int(effects.count_nonzero())  # 20 rows, each on one side
    assert main(["attribute", "lora-nano", "Say 3.", "--method", "cosine", "--max-new-tokens", "4", *runs]) == 0
    other = json.loads((trained / "attribution-Say-3-2.json").read_text())
    assert other["settings"]["method"] == "cosine"
    assert json.loads((trained / "attribution-Say-3.json").read_text()) == saved


@pytest.mark.slow
def test_wrong_uses(trained: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = ["--out", str(trained.parent)]

    def error(*args: str) -> str:
        capsys.readouterr()
        assert main(["attribute", *args]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "the prompt is empty" in error("lora-nano", " ", *runs)
    assert "--response is empty" in error("lora-nano", "Say 3.", "--response", "", *runs)
    assert "the run's sequences 64: shorten one" in error("lora-nano", "Say 3. " * 40, *runs)
    assert "is not an instruction-tuned run" in error(str(project / "runs" / "told[b]"), "Say 3.")
    train(trained.parents[1], "--ema-decay", "0.9", "--name", "averaged")
    assert "give --method cosine" in error("averaged", "Say 3.", *runs)
