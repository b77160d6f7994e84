"""What counts as a checkpoint, what is deleted, and what a training is taken up from; on states of a few numbers."""

import json
import os
from pathlib import Path

import pytest
import torch

import fgpt
from fgpt.cli.training import checkpoints
from fgpt.cli.training.job import fingerprint
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.io.files import remove_leftovers
from fgpt.recipes import find
from fgpt.train_step import State, init_state

INPUTS = {"base config": "a", "training rows": "b"}


def state(step: int) -> State:
    adapters = fgpt.lora(fgpt.init(fgpt.Config(1, 1, 8, 16, 11, 16), fgpt.key(0)), fgpt.key(0), rank=2)
    first = init_state(adapters, fgpt.adamw(lambda _: 1e-3))
    return State(first.trainable, first.opt_state, torch.tensor(step, dtype=first.step.dtype))


def steps(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())


def torn(out: Path, step: int) -> None:
    """As a kill between the state and its manifest left it."""
    (out / "checkpoints" / f"step-{step:06d}").mkdir()
    (out / "checkpoints" / f"step-{step:06d}" / "state.safetensors").write_bytes(b"half of it")


def save_steps(out: Path, **losses: float | None) -> None:
    for name, loss in losses.items():
        checkpoints.save(out, state(int(name[1:])), INPUTS, loss)


def step_of(found: State | None) -> int | None:
    return None if found is None else int(found.step)


# ------------------------------------------------------------------------------------------------------------ pruning


def test_torn_checkpoints_of_later_steps_cost_no_whole_one(tmp_path: Path):
    """Two of them counted as the last two: every whole one was deleted."""
    save_steps(tmp_path, s2=1.0, s4=None, s6=None)
    torn(tmp_path, 8)
    torn(tmp_path, 9)
    checkpoints.prune(tmp_path, keep=2)
    assert {2, 4, 6} <= set(steps(tmp_path))
    assert step_of(checkpoints.load_latest(tmp_path, state(0), INPUTS)) == 6


def test_a_part_that_was_cut_off_is_not_whole(tmp_path: Path):
    save_steps(tmp_path, s1=0.5, s2=1.0, s3=None, s4=None)
    for step in (1, 4):
        part = tmp_path / "checkpoints" / f"step-{step:06d}" / "state.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
    checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [2, 3]  # the best of those that are whole, and the last


def test_what_lies_after_the_state_that_is_gone_on_from_is_deleted(tmp_path: Path):
    save_steps(tmp_path, s2=None, s4=None, s6=None)
    part = tmp_path / "checkpoints" / "step-000006" / "state.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1  # as long as it was
    part.write_bytes(data)
    torn(tmp_path, 9)
    assert step_of(checkpoints.resume(tmp_path, state(0), INPUTS)) == 4
    assert steps(tmp_path) == [2, 4]


def test_nothing_is_deleted_where_the_inputs_are_others(tmp_path: Path):
    save_steps(tmp_path, s2=None)
    torn(tmp_path, 9)
    with pytest.raises(InputError, match=r"changed: base config\. Restore them"):
        checkpoints.resume(tmp_path, state(0), INPUTS | {"base config": "c"})
    assert steps(tmp_path) == [2, 9]


def test_a_kill_while_a_step_is_written_again_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At each call that writes the best one a second time: one of the two is always whole afterwards."""
    save_steps(tmp_path, s2=1.0)

    class Killed(BaseException):
        pass

    for at in range(20):
        left = at

        def count_and_call(call: str) -> None:
            original = getattr(os, call)

            def instead(*args: object, **more: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return original(*args, **more)

            patch.setattr(os, call, instead)

        with pytest.MonkeyPatch.context() as patch:
            for call in ("replace", "rename", "fsync"):
                count_and_call(call)
            try:
                save_steps(tmp_path, s2=1.0)
                ended = True
            except Killed:
                ended = False
        remove_leftovers(tmp_path / "checkpoints")  # as a run that is taken up does
        assert step_of(checkpoints.load_best(tmp_path, state(0), INPUTS)) == 2, at
        assert steps(tmp_path) == [2]
        if ended:
            return
    raise AssertionError("it never came to its end")


# -------------------------------------------------------------------------------------------------- the best, and steps


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_steps(tmp_path, s2=0.5, s4=0.75, s6=float("nan"), s8=None)
    assert step_of(checkpoints.load_best(tmp_path, state(0), INPUTS)) == 2
    for step, expected in ((2, 4), (4, None)):
        part = tmp_path / "checkpoints" / f"step-{step:06d}" / "state.safetensors"
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
        assert step_of(checkpoints.load_best(tmp_path, state(0), INPUTS)) == expected
        assert "is missing or damaged: it has the least held-out loss" in " ".join(capsys.readouterr().err.split())


def test_the_state_has_the_step_that_its_manifest_says(tmp_path: Path):
    """A state of another step under a manifest with its hash, as a copied folder that was edited has it."""
    save_steps(tmp_path, s2=None, s4=None)
    whole = tmp_path / "checkpoints" / "step-000004"
    manifest = json.loads((whole / "manifest.json").read_text())
    other = json.loads((tmp_path / "checkpoints" / "step-000002" / "manifest.json").read_text())
    (whole / "state.safetensors").write_bytes(
        (tmp_path / "checkpoints" / "step-000002" / "state.safetensors").read_bytes()
    )
    (whole / "manifest.json").write_text(json.dumps(manifest | {"parts": other["parts"]}))
    assert step_of(checkpoints.load_latest(tmp_path, state(0), INPUTS)) == 2


def test_a_checkpoint_of_an_earlier_version_is_one_line(tmp_path: Path):
    save_steps(tmp_path, s2=None)
    manifest = tmp_path / "checkpoints" / "step-000002" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"inputs": "0" * 64}))
    with pytest.raises(InputError, match="written by an earlier version"):
        checkpoints.load_latest(tmp_path, state(0), INPUTS)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"inputs": dict.fromkeys(INPUTS, "0" * 64)}))
    with pytest.raises(InputError, match="hashed its inputs by SHA-256: resume it with that version"):
        checkpoints.load_latest(tmp_path, state(0), INPUTS)


# -------------------------------------------------------------------------------------------------------------- links


def test_nothing_behind_a_link_is_deleted_or_written(tmp_path: Path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    save_steps(run, s4=None, s6=None)
    outside.mkdir()
    (outside / "manifest.json").write_text("mine")
    (outside / "thesis.txt").write_text("mine")
    for step in (1, 5):
        (run / "checkpoints" / f"step-{step:06d}").symlink_to(outside)
    checkpoints.prune(run, keep=2)
    checkpoints.save(run, state(1), INPUTS)
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"manifest.json": "mine", "thesis.txt": "mine"}
    assert not (run / "checkpoints" / "step-000001").is_symlink()


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_names_what_changed():
    run, tokenizer, cfg = find("lora-nano"), fgpt.tokenizer("nano"), fgpt.Config(1, 1, 8, 16, 11, 16)
    base, rows = fgpt.init(cfg, fgpt.key(0)), [Example.completion((1, 2, 3), 1)]
    heldout_rows = [InstructionRow("Say \ud83d.", "", "It is.")]

    def fingerprint_with(**other: object) -> list[str]:
        inputs: dict = {"recipe": run, "base": base, "tokenizer": tokenizer, "source": "nano"}
        inputs |= {"training_rows": rows, "heldout_rows": heldout_rows, "template": "{instruction}"}
        before, after = fingerprint(**inputs), fingerprint(**(inputs | other))
        return [name for name in after if before.get(name) != after[name]]

    from dataclasses import replace

    assert fingerprint_with() == []
    assert fingerprint_with(base=replace(base, cfg=replace(cfg, norm_eps=0.1))) == ["base config"]
    assert fingerprint_with(base=fgpt.init(cfg, fgpt.key(1))) == ["base weights"]
    assert fingerprint_with(heldout_rows=[InstructionRow("Say it.", "", "It was.")]) == ["heldout rows"]
    assert fingerprint_with(training_rows=[Example.completion((1, 2, 4), 1)]) == ["training rows"]
    assert fingerprint_with(template="{input}") == ["template"]
    assert fingerprint_with(recipe=replace(run, weight_decay=0.5)) == ["options"]
    assert (
        fingerprint_with(recipe=replace(run, keep_checkpoints=9, data=("elsewhere.json",), name="x")) == []
    )  # what lies there is what counts
    frozen = fgpt.quantize(fgpt.init(replace(cfg, d_model=64, d_mlp=64), fgpt.key(0)), "nf4")
    assert fingerprint_with(base=frozen) == ["base config", "base weights"]


def test_the_tokenizer_s_files_are_read(tmp_path: Path):
    import shutil

    from fgpt.io import models

    at = shutil.copytree(models.EMBEDDED["nano"], tmp_path / "base")
    run, params = find("lora-nano"), fgpt.init(fgpt.Config(1, 1, 8, 16, 11, 16), fgpt.key(0))

    def of() -> dict[str, str]:
        return fingerprint(run, params, fgpt.tokenizer("nano"), str(at))

    before = of()
    (at / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert [name for name, x in of().items() if before[name] != x] == ["tokenizer"]
