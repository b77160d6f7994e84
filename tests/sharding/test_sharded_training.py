"""Training over a base in parts is training over the whole base, to the bit: on 2 and on 3 processes, which do not
divide its rows. So is what is loaded, merged and saved. With outputs gathered it is so up to rounding.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from builders.torchrun import run_together


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_parts_compute_what_the_whole_does(count: int, tmp_path: Path) -> None:
    done = run_together(count, "sharded_base.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    kinds = Counter(name.partition(",")[0] for name in report)
    assert kinds["train"] == 8
    assert kinds["jvp(grad) of vmap"] == 4
    assert kinds["load"] == kinds["part"] == kinds["merge"] == 3
    assert kinds["save"] == 6
    assert kinds["parallel jvp(grad) of vmap"] == kinds["parallel train"] == kinds["ranks"] == 5
    assert not {name: error for name, error in report.items() if error and not name.startswith("parallel")}
    # Sums over parts are in another order, and of int8 each is rounded to bf16; AdamW divides them by their own size
    for name, error in report.items():
        if name.startswith("parallel"):
            kind, base = name.split(", ")[0].removeprefix("parallel "), name.split(", ")[-1]
            bar = 1e-6 if base in ("fp32", "nf4 with plain scales") else 0.02
            assert error <= {"merge": 0.0, "train": 20 * bar}.get(kind, bar), name
