"""Processes sample the answers of one, and take its steps: trained leaves to 1e-6, all ranks alike."""

import json

import pytest
from builders.torchrun import run_together


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_are_one_process(count: int):
    """Of the sampled answers, 20 in each of 3 steps, rounding may turn one or two."""
    done = run_together(count, "shared_rollouts.py")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report.keys() == {"4", "1"}
    for prompts, result in report.items():
        assert result["ranks"] == 1
        assert result["leaves"] < 1e-6
        assert max(result["flops"]) < 0.8 * result["alone"]
        equal = [x for step in result["answers"] for x in step]
        assert len(equal) == 3 * 4 * int(prompts)
        assert equal.count(False) <= 2
        for step, expected in zip(result["figures"], result["expected"], strict=True):
            assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert result["expected"][0]["frac_reward_zero_std"] < 1  # there is something to learn
