"""Training over a base in parts is training over the whole base, to the bit: on 2 and on 3 processes, which do not
divide its rows. So is what is loaded, merged and saved.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from builders import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_parts_compute_what_the_whole_does(count: int, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, str(ROOT / "tests" / "scripts" / "sharded_base.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    kinds = Counter(name.partition(",")[0] for name in report)
    assert kinds["train"] == 8
    assert kinds["jvp(grad) of vmap"] == 4
    assert kinds["load"] == kinds["part"] == kinds["merge"] == 3
    assert kinds["save"] == 6
    assert not {name: error for name, error in report.items() if error}
