"""The measured example of shuffled answers, in a small form, and its parts against independent computations."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

import fgpt
from experiments.research.shuffled_answers import (
    auc,
    features_of,
    main,
    random_prompts,
    shuffle_answers,
    weights_of,
)
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.cli.training.nano_rows import Task, read_tasks
from fgpt.data.prompt_templates import PLAIN, encode


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_auc_is_scikit_learns(pairs: list[tuple[int, bool]]):
    scores, labels = torch.tensor([float(x) for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    if labels.any() and not labels.all():
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()), abs=1e-6)


@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 3))
def test_shuffled_rows_have_the_answers_of_one_another(count: int, share: float, seed: int):
    tasks = [Task(f"Q{i}", "", f"A{i}") for i in range(count)]
    rows, shuffled = shuffle_answers(tasks, share, fgpt.key(seed))
    chosen = round(share * count)
    assert int(shuffled.sum()) == (chosen if chosen > 1 else 0)
    assert sorted(row.output for row in rows) == sorted(task.output for task in tasks)
    assert [row.instruction for row in rows] == [task.instruction for task in tasks]


def test_features_are_differences_of_log_probabilities():
    """Of two rows each one is compared with the other's prompt."""
    base, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    rows = [task for task in read_tasks(NANO_TASKS) if task.kind == "who"][:2]

    def loss(prompt: Task, answer: Task) -> float:
        example = encode(replace(prompt, output=answer.output), PLAIN, tokenizer)
        log_probs = fgpt.apply(base, torch.as_tensor(np.array(example.tokens))[None])[0].log_softmax(-1)
        count = len(tokenizer.encode(answer.output)) + 1
        last = example.tokens[-count:]
        return -sum(float(log_probs[i - count - 1, token]) for i, token in enumerate(last))

    with torch.no_grad():
        losses, above = features_of(base, rows, [0, 1], torch.tensor([[1, 0], [0, 1]]))
        for i, row in enumerate(rows):
            own, other = loss(row, row), loss(rows[1 - i], row)
            length = len(tokenizer.encode(row.output)) + 1
            difference = own + math.log((math.exp(-own) + math.exp(-other)) / 2)
            assert float(losses[i]) == pytest.approx(own / length, rel=1e-4)
            assert above[i].tolist() == pytest.approx([difference, difference / length], rel=1e-3, abs=1e-3)


def test_random_prompts_are_those_of_others():
    prompts = random_prompts(9, 4, fgpt.key(0))
    assert prompts.shape == (9, 4)
    for i, others in enumerate(prompts.tolist()):
        assert i not in others
        assert len(set(others)) == 4


def test_weights_are_between_0_and_1_and_a_half_at_first():
    z = torch.randn(5, 2, generator=fgpt.key(0))
    assert torch.equal(weights_of(z, torch.zeros(3)), torch.full((5,), 0.5))
    assert torch.allclose(weights_of(z, torch.tensor([1.0, -2.0, 3.0])), torch.sigmoid(z[:, 0] - 2 * z[:, 1] + 3))


@pytest.mark.slow
def test_the_tiny_form_prints_every_figure(capsys: pytest.CaptureFixture[str]):
    sizes = "--rows 8 --clean 2 --rounds 3 --steps 2 --meta-rounds 1 --meta-steps 2 --batch-size 4"
    results = main([*sizes.split(), *["--folds", "2", "--prompts", "1", "--tune", "1"]])
    printed = capsys.readouterr().out
    assert set(results) == {
        "row by row",
        "weights",
        *(f"{name} points" for name in ("clean", "shuffled", "weighted", "kept")),
    }
    assert "8 rows, of which 3 have the answer of another" in printed
    assert f"AUC by the weights {results['weights']:.3f}" in printed
    assert printed.count("tuned on") == 4
