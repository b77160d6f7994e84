"""Full tuning of parameters in parts is that of whole parameters in one process, on 2 and on 3 processes, which do not
divide the rows: in values, in derivatives of every order, and in what is saved.
"""

import json
from collections import Counter

import pytest
from builders.torchrun import run_together

BARS = {"fp64": 1e-13, "fp32": 1e-6, "bf16": 2e-3}
"""In bf16 a tied table's two gradients are added in bf16 if it is whole, and in fp32 if it is in parts."""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_parameters_in_parts_are_trained_as_whole_ones(count: int) -> None:
    done = run_together(count, "sharded_parameters.py")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    kinds = Counter(name.partition(",")[0] for name in report)
    assert kinds["train"] == 18 + 1
    assert kinds["figures"] == kinds["share"] == 18
    assert kinds["whole model"] == 1
    assert kinds["grad"] == kinds["jvp"] == kinds["jvp(grad)"] == kinds["jvp(jvp(grad))"] == 3
    assert kinds["grad of a squared grad"] == 3
    for name, error in report.items():
        if name.partition(",")[0] in ("train", "figures"):
            assert error <= next(bar for dtype, bar in BARS.items() if dtype in name), name
        elif "grad" in name or name.startswith("jvp"):
            assert error <= 1e-12, name
        else:
            assert error == 0, name
