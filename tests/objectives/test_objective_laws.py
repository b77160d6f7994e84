"""Objectives are sums over pairs or answers, under every transform, over quantized bases, and against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import close, same, tiny, tokens, with_noise
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

import fgpt
from fgpt.data.examples import Example
from fgpt.data.packing import collate
from fgpt.objectives.distillation import distillation, kl_divergences
from fgpt.objectives.dpo import dpo, dpo_losses
from fgpt.objectives.grpo import RolloutBatch, group_advantages, grpo, grpo_losses
from fgpt.objectives.kto import JudgedBatch, kto, kto_losses
from fgpt.objectives.kto import with_reference as judged_with_reference
from fgpt.objectives.label_smoothing import smoothed_nll
from fgpt.objectives.logprobs import sequence_logprobs
from fgpt.objectives.orpo import log1mexp, odds_ratio_losses, orpo
from fgpt.objectives.pairs import PairBatch, with_reference
from fgpt.objectives.reward import bradley_terry
from fgpt.objectives.simpo import simpo, simpo_losses
from fgpt.tree import astype, tree_leaves, tree_map

BASE = tiny(d_model=64, d_mlp=64)
REWARD_BASE = fgpt.with_classification_head(BASE, 1, fgpt.key(9))
ADAPTERS: Any = with_noise(fgpt.lora(BASE, fgpt.key(0), 2), seed=1)
N = 3


def answers(lengths: list[tuple[int, int]], at_end: bool = False) -> list[Example]:
    """Random prompts with answers, by their lengths; with `at_end` the last token alone is weighted."""
    made = []
    for i, (prompt, answer) in enumerate(lengths):
        text = tuple(tokens(31, prompt + answer, seed=i).tolist())
        made.append(Example.classification(text, 0) if at_end else Example.completion(text, prompt))
    return made


LENGTHS = [(2, 3), (4, 1), (1, 6), (2, 5), (4, 2), (1, 2)]


def rows(examples: list[Example], positions: bool = True) -> fgpt.Batch:
    batch = collate([[example] for example in examples], 9)
    return batch if positions else fgpt.Batch(batch.tokens, batch.targets, batch.weights)


def pair_batch(positions: bool = True, at_end: bool = False) -> PairBatch:
    return PairBatch(rows(answers(LENGTHS, at_end), positions))


Objective = Callable[[Any, Any], Any]
OBJECTIVES: dict[str, Objective] = {
    "dpo": dpo,
    "ipo": lambda p, x: dpo(p, x, loss_type="ipo"),
    "orpo": orpo,
    "simpo": simpo,
    "reward": bradley_terry,
}


def batch_for(name: str, positions: bool) -> PairBatch:
    pairs = pair_batch(positions, at_end=name == "reward")
    return with_reference(BASE, pairs) if name in ("dpo", "ipo") else pairs


def one_by_one(pairs: PairBatch) -> Any:
    """The same pairs with a leading axis: each is a batch of two rows."""
    return tree_map(lambda x: torch.stack([x[:N], x[N:]], 1), pairs)


@pytest.mark.parametrize("kind", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_batch_is_its_pairs_one_by_one(name: str, kind: Any):
    """Values, gradients, vmap(grad) and jvp(grad), with positions and without."""
    base = REWARD_BASE if name == "reward" else BASE
    frozen = base if kind == "fp32" else fgpt.quantize(base, kind)

    def total(adapters: Any, pairs: PairBatch) -> torch.Tensor:
        return OBJECTIVES[name](fgpt.adapt(frozen, adapters), pairs)[0]

    with_positions, plain = batch_for(name, True), batch_for(name, False)
    together = grad(total)(ADAPTERS, with_positions)
    assert max(float(x.abs().max()) for x in tree_leaves(together)) > 1e-3
    singles = one_by_one(plain)
    each = vmap(grad(total), in_dims=(None, 0))(ADAPTERS, singles)
    size = max(float(x.abs().max()) for x in tree_leaves(together))
    tolerance = 4e-3 if kind == "int8" else 1e-4  # int8's backward multiplies in bf16, whose precision is 4e-3
    close(tree_map(lambda x: x.sum(0) / size, each), tree_map(lambda x: x / size, together), tolerance)
    close(total(ADAPTERS, plain), total(ADAPTERS, with_positions), 1e-4, 1e-4)
    if kind != "fp32":
        return
    direction = tree_map(torch.ones_like, ADAPTERS)
    forward = jvp(lambda a: grad(total)(a, plain), (ADAPTERS,), (direction,))[1]
    eps = 1e-4
    double, doubled = astype(ADAPTERS, torch.float64), astype(frozen, torch.float64)
    exact_pairs = astype(plain, torch.float64)

    def gradient(a: Any) -> Any:
        return grad(lambda a: OBJECTIVES[name](fgpt.adapt(doubled, a), exact_pairs)[0])(a)

    up = gradient(tree_map(lambda x: x + eps, double))
    down = gradient(tree_map(lambda x: x - eps, double))
    close(forward, tree_map(lambda a, b: ((a - b) / (2 * eps)).float(), up, down), 2e-3, 2e-3)


def test_sequence_logprobs_are_those_of_apply():
    batch = rows(answers(LENGTHS))
    found = sequence_logprobs(BASE, batch)
    logp = fgpt.apply(BASE, batch.tokens).log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    close(found.sums, (logp * batch.weights).sum(-1), 1e-5, 1e-5)
    close(found.lengths, batch.weights.sum(-1), 0)


def test_the_reference_is_the_params_without_the_adapter():
    """At the start every pair has loss log 2 and every KL is 0; the gradient is not 0."""
    fresh = fgpt.lora(BASE, fgpt.key(0), 2)
    pairs = with_reference(BASE, pair_batch())
    total, count = dpo(fgpt.adapt(BASE, fresh), pairs)
    close(total / count, torch.tensor(2.0).log(), 1e-6)
    grads: Any = grad(lambda a: dpo(fgpt.adapt(BASE, a), pairs)[0])(fresh)
    assert max(float(x.b.abs().max()) for x in grads.values()) > 1e-3
    with pytest.raises(fgpt.InputError, match="add them by `with_reference`"):
        dpo(BASE, pair_batch())


finite = st.floats(-20, -1e-3)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=5), st.floats(0.01, 3), st.floats(0, 0.45))
def test_losses_are_their_equations_in_float64(pairs: list[tuple[float, float]], beta: float, epsilon: float):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    h = chosen - rejected

    def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
        return -torch.log1p(torch.exp(-x.clamp(-700, 700)))

    plain = -(1 - epsilon) * log_sigmoid(beta * h) - epsilon * log_sigmoid(-beta * h)
    robust = (epsilon * log_sigmoid(-beta * h) - (1 - epsilon) * log_sigmoid(beta * h)) / (1 - 2 * epsilon)
    close(dpo_losses(chosen, rejected, beta=beta, label_smoothing=epsilon), plain, 1e-9, 1e-9)
    close(dpo_losses(chosen, rejected, beta=beta, loss_type="robust", label_smoothing=epsilon), robust, 1e-9, 1e-9)
    close(dpo_losses(chosen, rejected, beta=beta, loss_type="ipo"), (h - 0.5 / beta) ** 2, 1e-9, 1e-9)
    odds = chosen - torch.log(-torch.expm1(chosen)) - rejected + torch.log(-torch.expm1(rejected))
    close(odds_ratio_losses(chosen, rejected), -log_sigmoid(odds), 1e-9, 1e-9)
    close(simpo_losses(chosen, rejected, beta=beta, gamma=0.3), -log_sigmoid(beta * h - 0.3), 1e-9, 1e-9)


def test_log1mexp_has_finite_gradients_everywhere():
    x = torch.tensor([-1e-7, -0.6931, -0.7, -100.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    close(x.grad, (-1 / torch.expm1(-x.detach().double())).float(), 0, 1e-4)


def test_kto_is_its_answers_one_by_one_for_a_given_divergence():
    batch, labels = rows(answers(LENGTHS), positions=False), torch.tensor([True, False, True, True, False, False])
    judged = judged_with_reference(BASE, JudgedBatch(batch, labels))

    def total(adapters: Any, judged: JudgedBatch) -> torch.Tensor:
        return kto(fgpt.adapt(BASE, adapters), judged)[0]

    together = grad(total)(ADAPTERS, judged)
    each = vmap(grad(total), in_dims=(None, 0))(ADAPTERS, tree_map(lambda x: x[:, None], judged))
    close(tree_map(lambda x: x.sum(0), each), together, 1e-4, 1e-4)
    ratios, z = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    found = kto_losses(ratios, torch.tensor([True, False]), z, beta=0.4, undesirable_weight=2.0)
    expected = [1 - torch.sigmoid(0.4 * (ratios[0] - z)), 2 * (1 - torch.sigmoid(0.4 * (z - ratios[1])))]
    close(found, torch.stack(expected), 1e-12)
    same_as_zero = kto_losses(ratios, torch.tensor([True, False]), -z, beta=0.4)
    assert same(same_as_zero, kto_losses(ratios, torch.tensor([True, False]), torch.zeros_like(z), beta=0.4))


def test_a_group_of_equal_rewards_gives_no_gradient():
    advantages = group_advantages(torch.tensor([[0.3] * 3, [0.0, 1.0, 0.5]]))
    close(advantages[0], torch.zeros(3), 0)
    batch = rows(answers(LENGTHS))

    def total(adapters: Any, advantages: torch.Tensor) -> torch.Tensor:
        return grpo(fgpt.adapt(BASE, adapters), RolloutBatch(batch, advantages))[0]

    still = grad(total)(ADAPTERS, torch.zeros(6))
    assert all(not x.a.any() and not x.b.any() for x in still.values())  # pyright: ignore
    moved: Any = grad(total)(ADAPTERS, advantages.flatten())
    assert max(float(x.b.abs().max()) for x in moved.values()) > 1e-3


def test_the_first_update_of_grpo_is_a_policy_gradient():
    """With the policy itself as the old one, the ratio is 1 and its gradient that of log π."""
    batch, advantages = rows(answers(LENGTHS)), torch.tensor([1.0, -2.0, 0.5, 0.0, 1.0, -0.3])
    ours = grad(lambda a: grpo(fgpt.adapt(BASE, a), RolloutBatch(batch, advantages))[0])(ADAPTERS)

    def surrogate(adapters: Any) -> torch.Tensor:
        return -(sequence_logprobs(fgpt.adapt(BASE, adapters), batch).sums * advantages).sum()

    close(ours, grad(surrogate)(ADAPTERS), 1e-5, 1e-5)


@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_grpo_is_its_equation(advantage: float, logprob: float, old: float, reference: float):
    x, a, o, r = (torch.tensor([v], dtype=torch.float64) for v in (logprob, advantage, old, reference))
    ratio = (x - o).exp()
    clipped = ratio.clamp(0.9, 1.3)
    expected = -torch.minimum(ratio * a, clipped * a) + 0.2 * ((r - x).exp() - (r - x) - 1)
    found = grpo_losses(x, a, o, r, beta=0.2, clip_low=0.1, clip_high=0.3)
    close(found, expected, 1e-12)
    assert float(grpo_losses(x, torch.zeros_like(a), o, r, beta=1.0)) >= 0  # the divergence


@given(st.integers(2, 17), st.floats(-1e3, 1e3, width=32), st.booleans())
def test_equal_rewards_have_no_advantage(count: int, reward: float, scale: bool):
    """Nor one by rounding, in groups of which the mean is inexact."""
    assert not group_advantages(torch.full((2, count), reward), scale=scale).any()


def test_an_answer_of_probability_one_has_a_finite_loss_in_orpo():
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0)):
        values = torch.tensor([chosen]), torch.tensor([rejected])
        losses = odds_ratio_losses(*values)
        grads = grad(lambda x: odds_ratio_losses(*x).sum())(values)
        assert all(bool(x.isfinite().all()) for x in (losses, *grads))


def test_bad_rewards_are_errors():
    with pytest.raises(fgpt.InputError, match="2 or more answers"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(fgpt.InputError, match="not a finite number"):
        group_advantages(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("positions", [True, False])
def test_distillation_is_torchs_kl_divergence(positions: bool):
    batch, teacher = rows(answers(LENGTHS), positions), with_noise(BASE, seed=5)
    total, weight = distillation(BASE, batch, teacher, temperature=2.0)
    p, q = (fgpt.apply(x, batch.tokens).double() / 2 for x in (teacher, BASE))
    each = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    close(total, (4 * each * batch.weights).sum().float(), 1e-5, 1e-5)
    close(weight, batch.weights.sum(), 0)
    close(distillation(BASE, batch, BASE)[0], torch.zeros(()), 1e-6)
    assert not any(x.any() for x in tree_leaves(grad(lambda t: distillation(BASE, batch, t)[0])(teacher)))


@pytest.mark.parametrize("kind", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("objective", ["distillation", "smoothing"])
def test_soft_targets_under_transforms_and_over_quantized_bases(objective: str, kind: Any):
    """Values and gradients against torch's losses, and vmap(grad) against the batch, over the same base."""
    frozen = BASE if kind == "fp32" else fgpt.quantize(BASE, kind)
    teacher = with_noise(BASE, seed=5)

    def ours(adapters: Any, batch: fgpt.Batch) -> torch.Tensor:
        student = fgpt.adapt(frozen, adapters)
        if objective == "smoothing":
            return smoothed_nll(student, batch, label_smoothing=0.1)[0]
        return distillation(student, batch, teacher, temperature=1.5, kd_ratio=0.3)[0]

    def theirs(adapters: Any, batch: fgpt.Batch) -> torch.Tensor:
        logits, targets = (
            x.flatten(0, 1) for x in (fgpt.apply(fgpt.adapt(frozen, adapters), batch.tokens), batch.targets)
        )
        if objective == "smoothing":
            losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
        else:
            log_p, log_q = (
                (x / 1.5).log_softmax(-1) for x in (fgpt.apply(teacher, batch.tokens).flatten(0, 1), logits)
            )
            divergence = 1.5**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            losses = 0.3 * divergence + 0.7 * F.cross_entropy(logits, targets, reduction="none")
        return (losses * batch.weights.flatten()).sum()

    with_positions, plain = rows(answers(LENGTHS)), rows(answers(LENGTHS), positions=False)
    tolerance = 4e-3 if kind == "int8" else 1e-4
    close(ours(ADAPTERS, with_positions), theirs(ADAPTERS, plain), 1e-4, 1e-4)
    expected = grad(theirs)(ADAPTERS, plain)
    size = max(float(x.abs().max()) for x in tree_leaves(expected))
    assert size > 1e-3
    expected = tree_map(lambda x: x / size, expected)
    close(tree_map(lambda x: x / size, grad(ours)(ADAPTERS, with_positions)), expected, tolerance)
    singles: Any = tree_map(lambda x: x[:, None], plain)
    each: Any = vmap(grad(ours), in_dims=(None, 0))(ADAPTERS, singles)
    close(tree_map(lambda x: x.sum(0) / size, each), expected, tolerance)


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_share_of_the_loss_is_from_0_to_1(ratio: float):
    with pytest.raises(fgpt.InputError, match="expected 0 to 1"):
        distillation(BASE, rows(answers(LENGTHS)), BASE, kd_ratio=ratio)


@given(st.integers(0, 99), st.floats(0.3, 4), st.sampled_from([1e-7, 1e-5, 1e-3, 1.0, 300.0]))
def test_a_divergence_is_not_negative(seed: int, temperature: float, size: float):
    """In fp32 too, of distributions that are nearly equal; and as in fp64 where they differ."""
    teacher, noise = torch.randn(2, 40, 7, generator=fgpt.key(seed)).unbind(0)
    student = teacher + size * noise
    divergences = kl_divergences(teacher, student, temperature=temperature)
    assert bool((divergences >= 0).all())
    p, q = ((x.double() / temperature).log_softmax(-1) for x in (teacher, student))
    exact = temperature**2 * (p.exp() * (p - q)).sum(-1)
    close(divergences.double(), exact, 1e-12 + 1e-6 * temperature * size, 1e-4)  # logits are rounded to 1e-7
    ours: Any = grad(lambda x: kl_divergences(teacher, x, temperature=temperature).sum())(student)
    close(ours, (temperature * (q.exp() - p.exp())).float(), 1e-5, 1e-4)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(epsilon: float, positions: bool):
    batch = rows(answers(LENGTHS), positions)
    ours = grad(lambda a: smoothed_nll(fgpt.adapt(BASE, a), batch, label_smoothing=epsilon)[0])(ADAPTERS)

    def theirs(adapters: Any) -> torch.Tensor:
        logits = fgpt.apply(fgpt.adapt(BASE, adapters), batch.tokens).flatten(0, 1)
        losses = F.cross_entropy(logits, batch.targets.flatten(), reduction="none", label_smoothing=epsilon)
        return (losses * batch.weights.flatten()).sum()

    close(smoothed_nll(fgpt.adapt(BASE, ADAPTERS), batch, label_smoothing=epsilon)[0], theirs(ADAPTERS), 1e-4, 1e-5)
    close(ours, grad(theirs)(ADAPTERS), 1e-4, 1e-4)
