"""`fgpt sweep`: each member is the run that `fgpt train` would make of it; pruned, broken and interrupted sweeps."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same
from builders.command_line import training_options
from filelock import FileLock
from safetensors.torch import load_file

import fgpt.cli.sweep.command as command
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.sweep import loop

STEPS = ["--steps", "6", "--warmup-steps", "2", "--compare-prompts", "0"]


def sweep(project: Path, out: Path, *options: str) -> int:
    return main(["sweep", *training_options(project), *STEPS, "--out", str(out), *options])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def states(folder: Path) -> dict[str, str]:
    return {member["name"]: member["state"] for member in results(folder)["members"]}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
def test_each_member_is_its_run_alone(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With a seed, that is data order, initial adapter and dropout, a rate, a rank and a strength of its own."""
    swept = ["--lr", "1e-2", "1e-3", "--seed", "0", "1", "--adapter.rank", "2", "4"]
    assert sweep(project, tmp_path, *swept, "--adapter.alpha", "3", "--eval-every", "3") == 0
    folder = tmp_path / "lora-nano-sweep"
    assert len(states(folder)) == 8
    assert set(states(folder).values()) == {"finished"}
    output = " ".join(capsys.readouterr().err.split())
    assert "8 members of lora-nano: 8 finished" in output
    for lr, seed, rank in (("1e-2", "0", "2"), ("1e-3", "1", "4"), ("1e-2", "1", "2")):
        options = ["--lr", lr, "--seed", seed, "--adapter.rank", rank, "--adapter.alpha", "3", "--eval-every", "3"]
        solo = ["train", *training_options(project), *STEPS, *options, "--out", str(tmp_path), "--name", "alone"]
        assert main(solo) == 0
        member = folder / f"lr-{lr}-seed-{seed}-rank-{rank}"
        for mine, alone in zip(
            read_metrics(member / "metrics.jsonl"), read_metrics(tmp_path / "alone" / "metrics.jsonl"), strict=True
        ):
            for name in ("loss", "grad_norm", "lr", "weight", "heldout_loss"):
                assert mine.get(name, 0.0) == pytest.approx(alone.get(name, 0.0), rel=1e-4), (name, mine["step"])
            assert mine["tokens"] == alone["tokens"]
        trained, expected = adapter(member), adapter(tmp_path / "alone")
        assert trained.keys() == expected.keys()
        for path, x in trained.items():
            assert x.shape == expected[path].shape
            assert torch.allclose(x, expected[path], atol=3e-4)
        settings = ("adapter_config.json",)
        for name in settings:
            assert (member / "adapter" / name).read_text() == (tmp_path / "alone" / "adapter" / name).read_text()
        shutil.rmtree(tmp_path / "alone")
    assert main(["generate", str(folder / "lr-1e-2-seed-0-rank-2"), "Say 1.", "--max-new-tokens", "2"]) == 0


@pytest.mark.slow
def test_what_it_prints_and_writes(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert sweep(project, tmp_path, "--lr", "1e-3", "1e-2", "--seed", "0", "1", "2", "--name", "mine") == 0
    output = " ".join(capsys.readouterr().err.split())
    best = min(results(tmp_path / "mine")["members"], key=lambda member: member["heldout_loss"])
    assert f"the best is {best['name']}" in output
    assert "over seeds" in output
    page = (tmp_path / "mine" / "report.html").read_text()
    assert page.count("<svg role") == 1  # no held-out losses were measured on the way
    for member in results(tmp_path / "mine")["members"]:
        assert f"{member['heldout_loss']:.4f}" in page
        assert f"{member['heldout_loss']:.4f}" in output
    means = [x.split("</td>") for x in page.split('id="seeds"')[1].split("<tr>")[2:4]]
    losses = [
        m["heldout_loss"]
        for m in results(tmp_path / "mine")["members"]
        if m["values"]["--lr"] == best["values"]["--lr"]
    ]
    assert f"{sum(losses) / 3:.4f}" in means[0][1]
    assert page.count("<script") == 1  # that sorts tables
    for member in results(tmp_path / "mine")["members"]:
        card = (tmp_path / "mine" / member["name"] / "adapter" / "README.md").read_text()
        assert f"# {member['name']}" in card
        assert f"--lr {float(member['values']['--lr']):g} " in card


class Interrupt:
    """Requests an end after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @contextmanager
    def __call__(self) -> Iterator[Callable[[], bool]]:
        def requested() -> bool:
            self._left -= 1
            return self._left < 0

        yield requested


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("pruner", ["none", "halving"])
def test_a_resumed_sweep_has_the_same_bits(
    pruner: str, steps: int, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also if one of its checkpoints is missing, as after a kill while they were written."""
    options = ["--lr", "1e-3", "3e-3", "1e-2", "--adapter.rank", "2", "3", "--group-size", "4", "--pruner", pruner]
    assert sweep(project, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "graceful_interrupt", Interrupt(steps))
        assert sweep(project, tmp_path / "parts", *options) == 130
    folder, whole = tmp_path / "parts" / "lora-nano-sweep", tmp_path / "whole" / "lora-nano-sweep"
    assert "training" not in states(folder).values()
    newest = sorted((folder / "lr-1e-3-rank-2" / "checkpoints").glob("step-*"))
    if newest and steps == 4:
        shutil.rmtree(newest[-1])
    assert main(["sweep", str(folder), "--resume"]) == 0
    assert states(folder) == states(whole)
    for name in states(whole):
        assert same(adapter(folder / name), adapter(whole / name)), name
        pairs = zip(*(read_metrics(x / name / "metrics.jsonl") for x in (folder, whole)), strict=True)
        assert all(a["loss"] == b["loss"] and a["step"] == b["step"] and a["tokens"] == b["tokens"] for a, b in pairs)
    assert main(["sweep", str(folder), "--resume"]) == 2


@pytest.mark.slow
def test_a_killed_sweep_resumes_from_its_checkpoints(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """sweep.json is older than the checkpoints then, and no line of metrics that they cover is lost."""
    options = ["--lr", "1e-3", "1e-2", "--seed", "0", "1"]
    assert sweep(project, tmp_path / "whole", *options) == 0
    whole, save = tmp_path / "whole" / "lora-nano-sweep", loop.Trainer._save
    for step in (3, 6):
        out = tmp_path / f"killed-{step}"

        class Killed(BaseException):
            pass

        def kill(self: Any, group: Any, stacked: Any, forms: Any, which: Any, step: int = step) -> None:
            save(self, group, stacked, forms, which)
            if max(member.step for member in group) == step:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "_save", kill)
            with pytest.raises(Killed):
                sweep(project, out, *options, "--checkpoint-every-minutes", "0")
        folder = out / "lora-nano-sweep"
        before = (folder / "lr-1e-3-seed-0" / "metrics.jsonl").read_bytes()
        assert main(["sweep", str(folder), "--resume"]) == 0
        assert (folder / "lr-1e-3-seed-0" / "metrics.jsonl").read_bytes().startswith(before)
        for name in states(whole):
            assert [line["step"] for line in read_metrics(folder / name / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
            assert same(adapter(folder / name), adapter(whole / name)), name


@pytest.mark.slow
def test_members_of_other_lengths(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An epoch has other numbers of rows in another order; each member takes its own number of steps, interrupted or
    not.
    """
    rows = [{"instruction": "Count.", "output": " one" * (1 + 7 * i % 40)} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", str(tmp_path / "rows.json"), "--steps", "None", "--epochs", "1", "--micro-batch-size", "1"]
    options += ["--seed", "0", "1", "2", "3", "5", "8"]
    assert sweep(project, tmp_path / "whole", *options) == 0
    whole = tmp_path / "whole" / "lora-nano-sweep"
    steps = {member["name"]: member["steps"] for member in results(whole)["members"]}
    assert len(set(steps.values())) > 1
    for after in (min(steps.values()), max(steps.values()) - 1):
        folder = tmp_path / str(after) / "lora-nano-sweep"
        with monkeypatch.context() as patch:
            patch.setattr(command, "graceful_interrupt", Interrupt(after))
            assert sweep(project, folder.parent, *options) == 130
        assert main(["sweep", str(folder), "--resume"]) == 0
        assert {member["name"]: member["steps"] for member in results(folder)["members"]} == steps
        assert all(same(adapter(folder / name), adapter(whole / name)) for name in steps)


@pytest.mark.slow
def test_a_refused_resume_changes_nothing(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """While another process trains, of a sweep that has ended, and of one whose files are damaged."""
    assert sweep(project, tmp_path, "--lr", "1e-3", "1e-2", "1e-6", "--pruner", "median", "--min-steps", "2") == 0
    folder = tmp_path / "lora-nano-sweep"
    assert main(["train", str(folder / "lr-1e-6"), "--resume"]) == 0
    content = (folder / "sweep.json").read_text()

    def refused(says: str) -> None:
        files = {path: path.read_bytes() for path in folder.rglob("*.jsonl")}
        assert main(["sweep", str(folder), "--resume"]) == 2
        err = capsys.readouterr().err
        assert says in " ".join(err.split())
        assert files == {path: path.read_bytes() for path in folder.rglob("*.jsonl")}

    refused("nothing to resume")
    (folder / "sweep.json").write_text(content.replace('"finished"', '"training"'))
    with FileLock(folder / "lr-1e-3" / ".lock"):
        refused("is being trained in by another process")
        assert main(["train", str(folder / "lr-1e-3"), "--resume"]) == 2
    for old, new in (
        ('"finished"', '"foo"'),
        ('"pruner": "median"', '"pruner": "best"'),
        ('"steps"', '"stepz"'),
        ('"name": "', '"name": "../'),
        ('"group_size": null', '"group_size": 0'),
        ('"fitting": 3', '"fitting": 0'),
    ):
        assert old in content
        (folder / "sweep.json").write_text(content.replace(old, new))
        refused("is damaged or of another version")
    (folder / "sweep.json").write_text("[")
    refused("sweep.json")


@pytest.mark.slow
def test_dropout_is_that_of_the_run_alone(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Equal batches have equal shapes: the same elements are dropped, and replay gives the same loss."""
    swept = ["--lr", "1e-2", "1e-3", "--adapter.dropout", "0.3", "--neftune-noise-alpha", "5"]
    assert sweep(project, tmp_path, *swept, "--grad-accumulation-steps", "2") == 0
    options = ["--lr", "1e-3", *swept[3:], "--grad-accumulation-steps", "2", "--name", "alone", "--out", str(tmp_path)]
    assert main(["train", *training_options(project), *STEPS, *options]) == 0
    member = tmp_path / "lora-nano-sweep" / "lr-1e-3"
    losses = [[line["loss"] for line in read_metrics(x / "metrics.jsonl")] for x in (member, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert main(["replay", str(member), "--step", "4"]) == 0
    assert "a sweep multiplies all members at once" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_runs_and_reports_know_sweeps(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert sweep(project, tmp_path / "runs", "--lr", "1e-3", "1e-2") == 0
    assert main(["runs"]) == 0
    assert "runs/lora-nano-sweep (2 members)" in capsys.readouterr().out
    for args in (
        ["report", "lora-nano-sweep"],
        ["generate", "lora-nano-sweep", "x"],
        ["train", "lora-nano-sweep", "--resume"],
    ):
        assert main(args) == 2
        assert "is a sweep: give one of its 2 members" in " ".join(capsys.readouterr().err.split())
    assert main(["report", "runs/lora-nano-sweep/lr-1e-3"]) == 0
    assert main(["sweep", "--help"]) == 0
    assert main(["sweep", "lora-nano", "--help"]) == 0
    assert "--pruner" in capsys.readouterr().out


@pytest.mark.slow
def test_halving_keeps_the_best_and_a_stopped_member_can_go_on_alone(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lrs = ["1e-2", "3e-3", "1e-3", "1e-4"]
    options = ["--pruner", "halving", "--min-steps", "2"]
    assert sweep(project, tmp_path, "--lr", *lrs, *options) == 0
    folder = tmp_path / "lora-nano-sweep"
    entries = {member["values"]["--lr"]: member for member in results(folder)["members"]}
    assert {lr: (entry["state"], entry["steps"]) for lr, entry in entries.items()} == {
        "1e-2": ("finished", 6),
        "3e-3": ("stopped", 4),
        "1e-3": ("stopped", 2),
        "1e-4": ("stopped", 2),
    }
    assert all(entry["heldout_loss"] is not None for entry in entries.values())
    rungs = results(folder)["rungs"]
    assert [len(rungs[step]) for step in ("2", "4")] == [4, 2]
    assert main(["train", str(folder / "lr-3e-3"), "--resume"]) == 0
    assert read_metrics(folder / "lr-3e-3" / "metrics.jsonl")[-1]["step"] == 6
    assert "resuming after step 4 of 6" in capsys.readouterr().err


@pytest.mark.slow
def test_the_median_rule_stops_the_worse_half(project: Path, tmp_path: Path):
    options = ["--pruner", "median", "--min-steps", "2"]
    assert sweep(project, tmp_path, "--lr", "1e-2", "1e-3", "1e-6", *options) == 0
    found = states(tmp_path / "lora-nano-sweep")
    assert (found["lr-1e-2"], found["lr-1e-6"]) == ("finished", "stopped")


@pytest.mark.slow
def test_a_member_that_diverges_is_stopped_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert sweep(project, tmp_path / "a", "--lr", "1e-3", "1e-2", "3e-3") == 0
    original = loop.Trainer.take_step

    def broken(self: Any, group: Any, stacked: Any, step: int) -> Any:
        stacked, metrics, tokens = original(self, group, stacked, step)
        names = [member.name for member in group]
        if step == 3 and "lr-1e-2" in names:
            metrics.loss[names.index("lr-1e-2")] = float("nan")
        return stacked, metrics, tokens

    monkeypatch.setattr(loop.Trainer, "take_step", broken)
    assert sweep(project, tmp_path / "b", "--lr", "1e-3", "1e-2", "3e-3") == 0
    folder = tmp_path / "b" / "lora-nano-sweep"
    assert states(folder) == {"lr-1e-3": "finished", "lr-1e-2": "failed", "lr-3e-3": "finished"}
    assert "lr-1e-2 is stopped: the loss became nan" in " ".join(capsys.readouterr().err.split())
    assert len(read_metrics(folder / "lr-1e-2" / "metrics.jsonl")) == 3
    assert json.loads((folder / "lr-1e-2" / "status.json").read_text())["state"] == "failed"
    for name in ("lr-1e-3", "lr-3e-3"):
        for path, x in adapter(folder / name).items():
            assert torch.allclose(x, adapter(tmp_path / "a" / "lora-nano-sweep" / name)[path], atol=1e-5)


@pytest.mark.slow
def test_other_tasks_are_swept_too(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A classifier, whose head begins from the member's seed; and preferences, whose batches hold pairs."""
    labels = ["--base", str(project / "base"), "--train", str(project / "texts.csv"), "--test", "None"]
    labels += ["--num-heldout", "6", "--steps", "2", "--out", str(tmp_path)]
    assert main(["sweep", "emotion-small", *labels, "--lr", "1e-3", "1e-2", "--seed", "0", "1"]) == 0
    assert set(states(tmp_path / "emotion-small-sweep").values()) == {"finished"}
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No." * (1 + i % 3)} for i in range(24)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    options = ["--base", str(project / "base"), "--data", str(pairs), "--steps", "2", "--out", str(tmp_path)]
    options += ["--max-seq-len", "80", "--micro-batch-size", "2", "--num-heldout", "4", "--compare-prompts", "0"]
    assert main(["sweep", "dpo-nano", *options, "--lr", "1e-3", "1e-2", "--seed", "0", "1"]) == 0, (
        capsys.readouterr().err
    )
    assert set(states(tmp_path / "dpo-nano-sweep").values()) == {"finished"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lr", "1e-3"], "a sweep needs an option with several values"),
        (["--lr", "1e-3", "1e-3"], "--lr has the value 1e-3 twice"),
        (["--lr", "1e-3", "fast"], "--lr is 'fast': expected a number"),
        (["--lr", "1e-3", "-1"], "--lr is -1"),
        (["--max-seq-len", "64", "80", "--lr", "1e-3", "1e-2"], "--max-seq-len has several values"),
        (["--adapter.kind", "lora", "dora"], "--adapter.kind has several values"),
        (["--adapter.dropout", "0.1", "0.2"], "--adapter.dropout has several values"),
        (
            ["--seed", "0", "1", "--early-stopping-patience", "2", "--eval-every", "1"],
            "a --pruner, halving or median, stops members early",
        ),
        (["--adapter.rank", "2", "4", "--adapter.kind", "ia3"], "ia3 has no rank"),
        (["--adapter.rank", "2", "4", "--optimizer", "adamw8bit"], "adamw8bit rounds moments in blocks"),
        (["--lr", "1e-3", "0.001"], "--lr has the value 0.001 twice"),
        (["--lr", "1e-3", "2e-3", "--lr", "3e-3"], "--lr is given twice"),
        (["--seed", "0", "1", "--compile"], "--compile is of a training by itself"),
        (["--seed", "0", "1", "--name="], "the run's name is ''"),
        (["--seed", "0", "1", "--out", "/proc/x"], "cannot make folders in /proc"),
        (["--seed", "0", "1", "--min-steps", "3"], "--min-steps and --reduction-factor are of --pruner"),
        (["--seed", "0", "1", "--pruner", "median"], "--pruner median needs 3 members or more"),
        (["--seed", "0", "1", "--pruner", "best"], "--pruner is 'best': expected one of"),
        (["--seed", "0", "1", "--group-size", "0"], "--group-size is 0"),
        (["--seed", "0", "1", "--nonsense", "2"], "no option --nonsense"),
        (["--seed", "0", "1", "--name", "a/b"], "the run's name is 'a/b'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    options: list[str], says: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert sweep(project, tmp_path, *options) == 2
    err = capsys.readouterr().err
    assert says in " ".join(err.split())
    assert err.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_bad_folders_and_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for args, says in (
        ([], "fgpt sweep RECIPE"),
        (["kto-nano", "--seed", "0", "1", "--data", "x.jsonl"], "give one --seed"),
        (["grpo-nano", "--lr", "1e-3", "1e-2"], "samples its batches from the policy"),
        (["pretrain-nano", "--seed", "0", "1"], "is a pretraining"),
        (["nothing", "--lr", "1e-3", "1e-2"], "nothing"),
        ([str(tmp_path), "--resume"], "holds no sweep.json"),
        ([str(tmp_path), "--resume", "--lr", "1"], "resumed as it was begun"),
    ):
        assert main(["sweep", *args]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
