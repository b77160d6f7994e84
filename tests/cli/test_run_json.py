"""run.json of other versions is read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fgpt.adapter_defaults import ATTENTION
from fgpt.cli import run_dir
from fgpt.errors import InputError
from fgpt.recipes import find
from fgpt.recipes.tuning import Adapter


@pytest.mark.parametrize("name", ["lora-nano", "emotion-small", "pretrain-nano"])
def test_run_json_of_other_versions(name: str, tmp_path: Path):
    run = dataclasses.replace(find(name), lr=1e-3)  # pyright: ignore[reportCallIssue]
    run_dir.write_run(tmp_path, run)
    values = json.loads((tmp_path / "run.json").read_text())
    assert (values["kind"], values["version"]) == (run.kind, 1)

    def read(**changes: Any) -> Any:
        changed = {field: x for field, x in (values | changes).items() if x is not ABSENT}
        (tmp_path / "run.json").write_text(json.dumps(changed))
        return run_dir.read_run(tmp_path)

    assert read() == run
    assert read(seed=ABSENT, checkpoint_every_minutes=ABSENT, tracker=ABSENT) == run
    for changes, message in (
        ({"rows": 3, "swiglu": True}, "unknown field 'rows', 'swiglu': this version has no such option"),
        ({"name": ABSENT}, "no field name: expected a value"),
        ({"kind": "diffusion"}, "expected a kind, one of instruction, .*, got 'diffusion'"),
        ({"kind": ABSENT, "version": ABSENT}, "expected a kind, .*, got None; train it again"),
        ({"version": 2}, "version 2 is newer than this fgpt, which reads 1: upgrade fgpt"),
        ({"version": True}, "expected version 1, got True"),
        ({"seed": [1]}, r"seed is \[1\]: expected int"),
    ):
        with pytest.raises(InputError, match=rf"run\.json: {message}"):
            read(**changes)
    if name != "pretrain-nano":
        former = read(adapter={"rank": 4}, lr=None)  # from before `rs`, with what absent values meant then
        assert (former.adapter, former.lr) == (Adapter(rank=4, alpha=16.0, target=ATTENTION), 3e-4)
        assert read(adapter={"rank": 4, "rs": False}).adapter == Adapter(rank=4)
        with pytest.raises(InputError, match=r"unknown field 'adapter\.r'"):
            read(adapter={"r": 4})


ABSENT = object()
