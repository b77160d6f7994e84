"""Several processes take the step of one: trained leaves to 1e-6 over 20 ragged steps with dropout, all ranks alike;
to the bit the same with the optimizer's state in parts.
"""

import json

import pytest
import torch
from builders import close
from builders.torchrun import run_together

import fgpt
from fgpt.distributed import World, sum_over_ranks


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_are_one_process(count: int) -> None:
    done = run_together(count, "data_parallel.py")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 12 + 3 * 14 + 4
    for name, error in report.items():
        assert error <= {"leaves": 1e-6, "metrics": 1e-5}.get(name.split(",")[0], 0.0), name
    assert report["leaves, fp32, 4"] > 0  # another order of summation: they were not all on one rank


def test_a_state_of_whole_matrices_is_not_split() -> None:
    two = World(0, 2)
    for optimizer in (fgpt.muon(0.1), fgpt.adamw8bit(0.1), fgpt.with_ema(fgpt.muon(0.1), 0.9)):
        assert fgpt.zero_redundancy(optimizer) is optimizer  # a process by itself
        with pytest.raises(fgpt.InputError, match="muon and adamw8bit is of whole matrices"):
            fgpt.zero_redundancy(optimizer, world=two)


def test_shares_are_all_items_once() -> None:
    items = [*range(7)]
    shares = [World(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_rank_without_micro_batches_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step is that of the others: here, of sums that it receives."""
    optimizer = fgpt.adamw(0.1)
    state = fgpt.init_state({"w": torch.ones(2)}, optimizer)
    sums = {"w": torch.tensor([3.0, -4.0])}, torch.tensor(6.0), torch.tensor(2.0)
    sent: list[object] = []

    def receive(own: object) -> object:
        sent.append(own)
        return sums

    def loss(trainable: dict[str, torch.Tensor], *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return (trainable["w"] * sums[0]["w"]).sum() + 7, torch.tensor(2.0)  # Σ weight · nll = 6 at w = 1

    expected, of_one = fgpt.make_step(loss, optimizer)(state, None, [None])
    monkeypatch.setattr("fgpt.train_step.sum_grads_over_ranks", receive)
    after, metrics = fgpt.make_step(loss, optimizer, world=World(1, 2))(state, None, [None])
    close(sent, [({"w": torch.zeros(2)}, torch.zeros(()), torch.zeros(()))], 0)
    close(after, expected, 0)
    close(metrics, of_one, 0)


def test_a_process_by_itself_sums_nothing() -> None:
    tree = {"w": torch.ones(2)}
    assert sum_over_ranks(tree) is tree


@pytest.mark.parametrize("compile", [False, True])
def test_what_a_rank_computes_for_the_others_alone_is_not_counted(
    compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a base in parts a rank without micro-batches multiplies with those of another one."""
    calls: list[object] = []

    def loss(trainable: dict[str, torch.Tensor], *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(None)
        return trainable["w"].sum(), torch.tensor(2.0)

    def interpret(fn: object, *_: object, **options: object) -> object:
        return options["fallback"]

    monkeypatch.setattr("fgpt.train_step.compile_or_warn", interpret)
    optimizer = fgpt.adamw(0.1)
    state = fgpt.init_state({"w": torch.ones(2)}, optimizer)
    frozen = fgpt.shard({"layer": fgpt.model.Linear(torch.eye(2))}, world=World(1, 2), target="layer")
    step = fgpt.make_step(loss, optimizer, world=World(1, 2), compile=compile)
    after, metrics = step(state, frozen, [torch.zeros(1)])
    assert len(calls) == 1
    close((after.trainable, metrics.weight, metrics.grad_norm), (state.trainable, torch.zeros(()), torch.zeros(())), 0)
