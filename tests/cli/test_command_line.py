"""The command line as a program: ranges of numbers, signals, streams that close, names in brackets, advice."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT
from rich.progress import Progress

import fgpt
import fgpt.cli.training.build
import fgpt.cli.training.instruction_tuning
import fgpt.cli.training.step_log
from fgpt import ranges
from fgpt.cli import console as shown
from fgpt.cli import run_dir
from fgpt.cli.commands import COMMANDS
from fgpt.cli.errors import explain
from fgpt.cli.evaluation.command import EvalOptions
from fgpt.cli.inference.classify_texts import ClassifyOptions
from fgpt.cli.main import main
from fgpt.cli.metrics_log import read_metrics
from fgpt.cli.option_hints import MODULES, OPTIONS
from fgpt.cli.options import GROUPS, option_names
from fgpt.cli.report.config_diff import command
from fgpt.cli.training.build import describe_sizes, warn_if_all_warmup
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.recipes import KINDS, RECIPES, InstructionRecipe, PretrainingRecipe, find
from fgpt.recipes.tuning import Adapter, FineTuningRecipe, default_warmup
from fgpt.weights import num_parameters

ODD = "[/red]x[b] :smile:"
"""A name that a console could take for markup."""


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, rows, labeled texts, and a run of each kind that is trained on them."""
    at = tmp_path_factory.mktemp(ODD.replace("/", "|"))
    cfg = dataclasses.replace(fgpt.load("nano").cfg, n_layer=1, n_head=2, d_model=16, d_mlp=16, n_ctx=96)
    models.save(fgpt.init(cfg, fgpt.key(0)), at / "base", like="nano")
    rows = [{"instruction": f"Say {i} {ODD}.", "output": f"It is {i} {ODD}."} for i in range(24)]
    (at / "rows.json").write_text(json.dumps(rows))
    texts = [f"it is {i},{('[pos]', '[/neg]')[i % 2]}" for i in range(24)]
    (at / "texts.csv").write_text("\n".join(["text,label", *texts, ""]))
    assert main(["train", *training(at), "--name", "it[b]", "--compare-prompts", "2", "--max-new-tokens", "3"]) == 0
    labels = ["--base", str(at / "base"), "--train", str(at / "texts.csv"), "--test", "None", "--num-heldout", "6"]
    labels += ["--steps", "2", "--name", "told[b]", "--out", str(at / "runs")]
    assert main(["train", "emotion-small", *labels]) == 0
    return at


def training(at: Path) -> list[str]:
    base = ["--base", str(at / "base"), "--data", str(at / "rows.json"), "--num-heldout", "4"]
    return [
        "lora-nano",
        *base,
        "--max-seq-len",
        "80",
        "--micro-batch-size",
        "2",
        "--steps",
        "3",
        "--out",
        str(at / "runs"),
    ]


# ---------------------------------------------------------------------------------------------------- ranges of numbers


COMMAND_OPTIONS = {name: command for name, command in COMMANDS.items() if isinstance(command, type)}
OPTION_CLASSES: list[type[Any]] = [*KINDS.values(), *COMMAND_OPTIONS.values(), ClassifyOptions, EvalOptions]
"""Every class whose fields are options of some command."""


def numeric(hint: Any) -> bool:
    parts = ranges.get_args(hint)
    return hint in (int, float) or any(map(numeric, parts))


def unchecked(cls: type[Any]) -> list[str]:
    """Numeric fields without a range, in nested dataclasses too."""
    found: list[str] = []
    for name, hint in ranges.hints(cls).items():
        bare = ranges.get_args(hint)[0] if ranges.is_flat(hint) else hint
        if dataclasses.is_dataclass(bare):
            found += unchecked(bare)  # pyright: ignore[reportArgumentType]
        elif numeric(hint) and not list(ranges.ranges(hint)):
            found.append(f"{cls.__name__}.{name}")
    return found


def test_every_numeric_option_has_a_range():
    assert len(OPTION_CLASSES) >= 13
    assert [name for cls in OPTION_CLASSES for name in unchecked(cls)] == []


def test_every_recipe_is_within_them():
    for make in RECIPES.values():
        ranges.check(make())


BAD: dict[str, list[str]] = {
    "train lora-nano": [
        *(
            "--micro-batch-size=-1",
            "--micro-batch-size=0",
            "--micro-batch-size=9999999999",
            "--micro-batch-size=2147483647",
            "--grad-accumulation-steps=0",
            "--grad-accumulation-steps=-2",
            "--steps=0",
            "--steps=-3",
        ),
        *("--lr=-1", "--lr=nan", "--lr=inf", "--lr=0", "--epochs=0", "--epochs=-1", "--epochs=nan", "--epochs=1e300"),
        *(
            "--warmup-steps=-1",
            "--max-seq-len=0",
            "--max-seq-len=1",
            "--keep-checkpoints=0",
            "--checkpoint-every-minutes=-1",
            "--checkpoint-every-minutes=nan",
            "--eval-every=0",
        ),
        *("--num-heldout=-1", "--compare-prompts=-1", "--max-new-tokens=0", "--weight-decay=-1", "--weight-decay=nan"),
        *(f"--seed={2**64}", f"--seed={-(2**63) - 1}", "--adapter.rank=0", "--adapter.alpha=nan"),
        *("--adapter.alpha=0", "--adapter.alpha=-1", "--adapter.dropout=1", "--adapter.dropout=-0.1"),
    ],
    "doctor lora-nano": ["--micro-batch-size=-1", "--lr=nan"],
    "train emotion-small": ["--num-fewshot=-1", "--num-heldout=0", "--max-seq-len=1"],
    "train pretrain-nano": [
        *(
            "--betas 0.9 1",
            "--betas -0.1 0.9",
            "--min-lr-ratio=-1",
            "--min-lr-ratio=2",
            "--peak-tflops=0",
            "--vocab=0",
            "--n-layer=0",
        ),
        *(
            "--steps=0",
            "--lr=nan",
            "--warmup-steps=-1",
            "--micro-batch-size=2147483647",
            "--grad-accumulation-steps=2147483647",
            "--n-layer=2147483647",
        ),
    ],
    "generate r hi": [
        *(
            "--temperature=-1",
            "--temperature=nan",
            "--top-p=0",
            "--top-p=1.1",
            "--top-k=0",
            "--min-p=2",
            "--num-beams=0",
        ),
        *(
            "--num-return-sequences=0",
            "--max-new-tokens=0",
            "--length-penalty=nan",
            "--repetition-penalty=0",
            "--no-repeat-ngram=0",
        ),
        *(f"--seed={2**64}", "--length-penalty=1e300", "--length-penalty=-1e300", "--num-return-sequences=2147483647"),
        "--num-beams=2147483647",
    ],
    "chat r": ["--max-new-tokens=-1", "--top-k=-1"],
    "compare r": ["--num-prompts=0", "--max-new-tokens=0", "--temperature=inf"],
    "eval r": ["--window=0", "--stride=0", "--limit=0", "--num-fewshot=-1", "--num-generations=0", "--batch-size=0"],
    "replay r": ["--step=0", "--step=-1"],
}


@pytest.mark.parametrize(("command", "option"), [(c, option) for c, options in BAD.items() for option in options])
def test_a_number_out_of_range_is_one_line_before_anything_is_read(
    command: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), *option.split()]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    name = option.partition("=")[0].split()[0].removeprefix("--")
    assert name in said[0].replace("_", "-")
    assert " is " in said[0]
    assert "expected" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_file_and_of_a_resumed_run_are_checked(at: Path, tmp_path: Path, capsys: Any):
    for field, value in (("micro_batch_size", -1), ("lr", math.nan), ("max_seq_len", 1)):
        values = json.loads((at / "runs" / "it[b]" / "run.json").read_text()) | {field: value}
        (tmp_path / "run.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=rf"run\.json: {field} is {value}: expected .*; correct it, or"):
            run_dir.read_run(tmp_path)
    (tmp_path / "run.json").write_text((at / "runs" / "it[b]" / "run.json").read_text())
    (tmp_path / "status.json").write_text('{"state": "interrupted"}')
    assert main(["train", str(tmp_path), "--resume", "--keep-checkpoints", "0"]) == 2
    assert "--keep-checkpoints is 0: expected 1 or more" in capsys.readouterr().err


def test_ranges_in_words():
    said = {
        "1 or more": ranges.Range(least=1, most=ranges.LARGEST),
        "a number above 0, at most 1": ranges.Range(above=0, most=1),
        "0 or more, below 1": ranges.Range(least=0, below=1),
        "a finite number": ranges.Range(),
    }
    assert {allowed.expected(-1): allowed for allowed in said.values()} == said
    assert ranges.Range(least=1, most=ranges.LARGEST).expected(2**40) == "1 or more, at most 2,147,483,647"
    assert not any(allowed.holds(x) for allowed in said.values() for x in (math.nan, math.inf, -math.inf))
    assert ranges.Range(least=0).holds(10**400)  # which no float is


# -------------------------------------------------------------------------------------------------------------- warm-up


def test_a_warm_up_that_nobody_asked_for_is_a_tenth_at_most():
    """What is recorded of recipes stays: 20 of 328 updates, 3 of 30, 150 of 6,600, 800 of 6,000."""
    assert [default_warmup(20, steps) for steps in (1, 9, 30, 32, 199, 200, 328, 5000)] == [1, 1, 3, 4, 20, 20, 20, 20]
    lora, smol, nano, tiny = (find(x) for x in ("lora-nano", "lora-smollm2", "pretrain-nano", "tinytiny-pretrain"))
    assert isinstance(lora, FineTuningRecipe)
    assert isinstance(smol, FineTuningRecipe)
    assert isinstance(nano, PretrainingRecipe)
    assert isinstance(tiny, PretrainingRecipe)
    assert (lora.num_warmup_steps(328), smol.num_warmup_steps(30)) == (20, 3)
    assert (nano.num_warmup_steps(), tiny.num_warmup_steps()) == (150, 800)
    assert dataclasses.replace(nano, steps=60).num_warmup_steps() == 6


def test_a_short_training_comes_to_its_rate(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    args = [*training(at), "--compare-prompts", "0", "--lr", "6e-3", "--out", str(tmp_path)]
    assert main(["train", *args]) == 0
    assert max(line["lr"] for line in read_metrics(tmp_path / "lora-nano" / "metrics.jsonl")) == 6e-3
    assert "warmup" not in capsys.readouterr().err
    assert main(["train", *args, "--warmup-steps", "20"]) == 0  # asked for: as it is, and said
    assert max(line["lr"] for line in read_metrics(tmp_path / "lora-nano-2" / "metrics.jsonl")) == pytest.approx(9e-4)
    said = " ".join(capsys.readouterr().err.split())
    assert "it ends within its --warmup-steps 20: of lr 0.006 it reaches 0.0009" in said
    assert warn_if_all_warmup(1.0, 20, 20) == []


# ----------------------------------------------------------------------------------------------------------- the header


def test_a_header_counts_parameters_and_not_bytes():
    base = fgpt.load("nano")
    adapters = fgpt.lora(base, fgpt.key(0), rank=8, target=r"blocks\..*\.(q|v)")
    told = describe_sizes("nano", base, adapters)
    assert told == "nano (4,339,200 parameters), 32,768 trained (0.8 %)"
    for kind in ("nf4", "int8", "blockwise8"):
        assert describe_sizes("nano", fgpt.quantize(base, kind), adapters) == told
    whole = fgpt.trainable_leaves(base, ".*")
    assert describe_sizes("nano", base, whole).endswith("4,339,200 trained (100.0 %)")
    table = fgpt.lora(base, fgpt.key(0), rank=1, target=r"blocks\.0\.attn\.q")
    assert describe_sizes("nano", base, table).endswith("512 trained (0.01 %)")
    assert num_parameters(fgpt.adapt(base, adapters)) == 4_339_200 + 32_768


# ---------------------------------------------------------------------------------------------------- names in brackets


def every_command(at: Path) -> dict[str, list[str]]:
    it, told = str(at / "runs" / "it[b]"), str(at / "runs" / "told[b]")
    return {
        "generate": [it, ODD, "--max-new-tokens", "3"],
        "compare": [it, "--max-new-tokens", "3", "--num-prompts", "2"],
        "classify": [told, ODD, "it is [bold]"],
        "merge": [it],
        "eval": [it],
        "report": [it],
        "replay": [it, "--step", "2"],
        "doctor": [*training(at), "--name", ODD.replace("/", "")],
    }


@pytest.mark.parametrize("name", ["generate", "compare", "classify", "merge", "eval", "report", "replay", "doctor"])
def test_names_in_brackets_are_printed_as_they_are(name: str, at: Path, capsys: pytest.CaptureFixture[str]):
    assert main([name, *every_command(at)[name]]) == 0
    said = capsys.readouterr()
    text = "".join((said.out + said.err).split())
    expected = {
        "generate": "",
        "compare": "it[b]:baseagainsttuned",
        "classify": "[/neg]",
        "replay": "[/red]x[b]:smile:",
        "doctor": "[red]x[b]:smile::thelaws",
    }
    assert expected.get(name, "it[b]") in text
    if name == "classify":
        assert ODD in said.out
        assert "[pos]" in said.out
        assert "it is [bold]" in said.out


def test_work_in_brackets_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "100")
    terminal = shown.Console(stderr=True, markup=False, emoji=False, highlight=False, force_terminal=True)
    monkeypatch.setattr(shown, "console", terminal)
    for total in (None, 3):
        with shown.show_progress(f"loading {ODD}", total) as advance:
            advance(1)
        assert f"loading {ODD}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- how far the work is


def test_work_without_a_terminal_is_a_line_after_a_while(monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(shown, "FIRST_LINE_AFTER", 0.05)
    assert list(shown.progress([1, 2], "reading")) == [1, 2]
    assert capsys.readouterr().err == ""  # it was quick
    for i, _ in enumerate(shown.progress(range(3), "reading")):
        time.sleep(0.3 if i == 1 else 0)
        assert list(shown.progress(range(2), "within")) == [0, 1]
    with shown.show_progress("loading"):
        time.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert said == ["reading: 1 of 3 in 0 s, eta 0 s", "loading: 0 s so far .."]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_step_and_eta(width: int, capsys: pytest.CaptureFixture[str]):
    terminal = shown.Console(stderr=True, force_terminal=True, width=width)
    figures = "loss 2.041  14,000 tok/s  MFU 12.3 %  10.25 GB"
    clock = itertools.count(0.0, 10.0)
    bars = Progress(*shown.training_columns(width), console=terminal, expand=True, get_time=lambda: next(clock))
    task = bars.add_task("training", total=10_000, completed=0, figures="")
    for _ in range(8):
        bars.update(task, advance=1, figures=figures)
    terminal.print(bars.get_renderable())
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) > 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    assert len(plain) <= width
    assert "8/10000 " in plain
    assert "loss 2.041" in plain
    assert re.search(r"eta \d+:\d\d:\d\d", plain)
    assert "10.25 GB" in plain or width < 120


# -------------------------------------------------------------------------------------------------------------- signals


class Child:
    """A command in a process of its own, with what is imported already; its streams are pipes, or what is given."""

    def __init__(
        self,
        args: list[str],
        prepare: Callable[[], Any] = lambda: None,
        stdout: int | None = None,
        stderr: int | None = None,
        encoding: str = "utf-8",
    ) -> None:
        ours = [os.pipe() if given is None else (None, given) for given in (stdout, stderr)]
        self.pid = os.fork()
        if not self.pid:
            self._run(args, prepare, [write for _, write in ours], encoding)
        for _, write in ours:
            os.close(write)
        self.stdout, self.stderr = (None if read is None else os.fdopen(read, errors="replace") for read, _ in ours)

    def _run(self, args: list[str], prepare: Callable[[], Any], streams: list[int], encoding: str) -> None:
        code = 70
        try:
            torch.set_num_threads(1)  # no pool of threads outlives a fork
            os.dup2(streams[0], 1)
            os.dup2(streams[1], 2)
            sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
            prepare()
            code = main(args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def hear(self, text: str) -> None:
        """Wait until it has said this on stderr."""
        said = ""
        assert self.stderr is not None
        for line in self.stderr:
            said += line
            if text in line:
                return
        raise AssertionError(f"it ended, and never said {text!r}: {said}")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Its exit status, negative for a signal, and what it said since."""
        out, err = ("" if stream is None else stream.read() for stream in (self.stdout, self.stderr))
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), out, err


def sleep_through(what: str) -> None:
    """As a library that swallows every exception."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            time.sleep(0.02)
        except BaseException:
            print(what, file=sys.stderr, flush=True)


def endless_batches() -> None:
    def batches(*_: Any) -> Iterator[Any]:
        sleep_through("swallowed")
        yield

    fgpt.cli.training.build.batches = batches


def endless_loading() -> None:
    def load(*_: Any) -> None:
        print("loading", file=sys.stderr, flush=True)
        sleep_through("swallowed")

    fgpt.cli.training.instruction_tuning.load_base = load


def slow_steps() -> None:
    def peak_memory(_: Any) -> float:
        time.sleep(0.05)
        return 1.0

    fgpt.cli.training.step_log.peak_memory = peak_memory


@pytest.mark.parametrize(
    ("prepare", "begun", "answer"),
    [(endless_batches, "steps", "ending after this step"), (endless_loading, "loading", "swallowed")],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_what_swallows_the_first(
    prepare: Callable[[], None], begun: str, answer: str, number: signal.Signals, at: Path, tmp_path: Path
):
    child = Child(["train", *training(at), "--out", str(tmp_path)], prepare)
    child.hear(begun)
    time.sleep(0.3)
    child.signal(number)
    child.hear(answer)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    child.signal(number)
    status, _, said = child.end()
    assert status == -number
    assert "Traceback" not in said


def test_a_hangup_ends_a_training_with_a_checkpoint(at: Path, tmp_path: Path):
    child = Child(["train", *training(at), "--steps", "4000", "--out", str(tmp_path)], slow_steps)
    child.hear("step 1/4000")
    child.signal(signal.SIGHUP)
    status, _, said = child.end()
    assert status == 130
    assert "Traceback" not in said
    assert "interrupted after" in said
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
    assert (run / "adapter").is_dir()


def test_a_terminal_that_is_gone_ends_a_training_in_order(at: Path, tmp_path: Path):
    """With the hangup its stderr goes, so that nothing can be told any more."""
    child = Child(["train", *training(at), "--steps", "4000", "--out", str(tmp_path)], slow_steps)
    child.hear("step 1/4000")
    assert child.stderr is not None
    child.stderr.close()
    child.stderr = None
    child.signal(signal.SIGHUP)
    assert child.end()[0] == 130
    assert json.loads((tmp_path / "lora-nano" / "status.json").read_text())["state"] == "interrupted"


def test_a_hangup_that_is_ignored_stays_so(at: Path, tmp_path: Path):
    """As nohup has it."""

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        slow_steps()

    child = Child(["train", *training(at), "--compare-prompts", "0", "--steps", "9", "--out", str(tmp_path)], prepare)
    child.hear("step 1/9")
    child.signal(signal.SIGHUP)
    assert child.end()[0] == 0
    assert len(read_metrics(tmp_path / "lora-nano" / "metrics.jsonl")) == 9


def test_signals_are_as_before_when_a_command_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["eval"]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# -------------------------------------------------------------------------------------------------------------- streams


def closed_pipe() -> int:
    """The end to write into of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_a_reader_that_goes_ends_a_command_quietly(at: Path):
    command = [sys.executable, "-m", "fgpt", "runs"]
    done = subprocess.run(command, cwd=ROOT, stdout=closed_pipe(), stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    run, told = str(at / "runs" / "it[b]"), str(at / "runs" / "told[b]")
    for args in (["generate", run, "Hi.", "--max-new-tokens", "20"], ["classify", told, "hi"], ["generate", "--help"]):
        assert Child(args, stdout=closed_pipe()).end() == (141, "", ""), args


def test_a_training_nobody_listens_to_goes_on(at: Path, tmp_path: Path):
    """Both streams are closed from the first line on."""
    args = [
        "train",
        *training(at),
        "--compare-prompts",
        "2",
        "--max-new-tokens",
        "3",
        "--eval-every",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert Child(args, stdout=closed_pipe(), stderr=closed_pipe()).end()[0] == 0
    run = tmp_path / "lora-nano"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "compare.html").is_file()


def test_a_full_disk_behind_stdout_is_said(at: Path):
    args = ["generate", str(at / "runs" / "it[b]"), "Hi.", "--max-new-tokens", "3"]
    status, _, said = Child(args, stdout=os.open("/dev/full", os.O_WRONLY)).end()
    assert (status, said) == (2, "error: writing: No space left on device; free space or choose another folder\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str, at: Path):
    for text in ("漢字 it is 1", os.fsdecode(b"\xe9\xe9 it is 1")):
        status, out, err = Child(["classify", str(at / "runs" / "told[b]"), text], encoding=encoding).end()
        assert status == 0, err
        assert "?? it is 1" in out
    status, _, err = Child(["train", "漢字"], encoding=encoding).end()
    assert (status, err.count("\n")) == (2, 1)
    assert "no recipe named '??'" in err


def test_the_oldest_locale_is_enough(at: Path):
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    args = ["classify", str(at / "runs" / "told[b]"), "--file", "-"]
    command = [sys.executable, "-m", "fgpt", *args]
    text = "漢字 it is 1".encode()
    done = subprocess.run(command, cwd=ROOT, env=environment, input=text, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?? it is 1" in done.stdout
    assert b"Traceback" not in done.stderr


def test_paths_that_are_no_text(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    base, data = Path(odd) / "base", Path(odd) / "rows.json"
    models.save(fgpt.load(str(at / "base")), base, like=str(at / "base"))
    data.write_bytes((at / "rows.json").read_bytes())
    options = [
        "--base",
        str(base),
        "--data",
        str(data),
        "--out",
        odd,
        "--compare-prompts",
        "2",
        "--max-new-tokens",
        "2",
    ]
    assert main(["train", *training(at), *options]) == 0
    run = str(Path(odd) / "lora-nano")
    assert main(["generate", run, "Hi.", "--max-new-tokens", "2"]) == 0
    assert main(["compare", run, "--num-prompts", "1", "--max-new-tokens", "2"]) == 0
    assert main(["eval", run]) == 0
    assert main(["report", run]) == 0
    capsys.readouterr()
    assert main(["generate", os.fsdecode(b"caf\xe9"), "Hi."]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(
        ["generate", run, os.fsdecode(b"caf\xe9"), "--stop", os.fsdecode(b"caf\xe9"), "--max-new-tokens", "2"]
    ) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- errors, advice


def test_what_is_no_defect_is_one_line():
    assert explain(InputError("two\nlines")) == "two lines"
    assert explain(OSError("a plain one")) == "a plain one"
    assert explain(PermissionError(13, "Permission denied", "there")) == (
        "there: Permission denied; choose another place, or change its permissions"
    )
    assert explain(FileNotFoundError(2, "No such file or directory", "there")) == "there: No such file or directory"
    assert "not enough memory" in str(explain(MemoryError()))
    assert "not enough memory" in str(explain(torch.OutOfMemoryError("CUDA out of memory.")))
    assert "not enough memory" in str(explain(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(UnicodeEncodeError) as no_text:
        "\ud83d".encode()
    assert "is not a character of UTF-8" in str(explain(no_text.value))
    assert explain(RuntimeError("a defect")) is None
    assert explain(KeyError("a defect")) is None


@pytest.fixture
def made(at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with runs of a name that is no recipe's: `real` was interrupted, `done` has finished."""
    monkeypatch.chdir(tmp_path)
    for name, state in (("real", "interrupted"), ("done", "finished")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        values = json.loads((at / "runs" / "it[b]" / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(values | {"name": name}))
        (run / "status.json").write_text(json.dumps({"state": state}))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "advice", "never"),
    [
        (
            ["generate", "real", "hi"],
            "has not finished; resume it: just train runs/real --resume",
            "first",
        ),
        (["generate", "lora-nano", "hi"], "train it first: just train lora-nano", "--resume"),
        (["generate", "reel", "hi"], "did you mean real?", "just train reel"),
        (["generate", "done", "hi"], "has neither adapter/ nor model/ any more; train it again", "--resume"),
        (["train", "real"], "give that recipe, and --name real", "did you mean"),
        (["doctor", "real"], "give that recipe, and --name real", "did you mean"),
        (["train", "done", "--resume"], "nothing to resume: runs/done has finished", "just train done"),
        (["train", "nobody", "--resume"], "just train RECIPE makes one", "just train nobody"),
        (["train", "lora-nano", "--name", "done", "--resume"], "runs/done has finished", "there is no run"),
        (
            ["train", "real", "--resume", "--out", "elsewhere"],
            "no run 'real' under elsewhere/",
            "just train real",
        ),
        (["train", "real", "--resume", "--lr", "1"], "leave it out, or start a new run", "leave out --resume"),
        (["compare"], "under runs/ there are done, real", "just runs"),
        (["classify", "real", "hi"], "runs/real has not finished", "train it first"),
    ],
)
def test_advice_can_be_followed(
    args: list[str], advice: str, never: str, made: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(args) == 2
    said = capsys.readouterr().err
    assert advice in said
    assert never not in said


def test_a_run_of_another_kind_is_told_what_it_is_for(tmp_path: Path):
    pretrained, tuned = find("pretrain-nano"), find("lora-nano")
    assert run_dir.suggest_use(tmp_path, pretrained) == (
        f"tune it first, just train RECIPE --base {tmp_path}/model, or just eval --base {tmp_path}/model --text FILE"
    )
    assert run_dir.suggest_use(Path("runs/a b"), tuned) == "it answers: just generate 'runs/a b' PROMPT"
    assert run_dir.resume_command(Path("runs/a b")) == "just train 'runs/a b' --resume"


def test_a_run_with_a_name_of_its_own_is_had_again_by_its_recipe():
    run = dataclasses.replace(find("dora-nano"), name="real", lr=1e-3)  # pyright: ignore[reportCallIssue]
    assert command(run.to_json()) == "just train dora-nano --name real --lr 0.001"
    assert command(find("dora-nano").to_json()) == "just train dora-nano"
    assert isinstance(run, InstructionRecipe)


# ------------------------------------------------------------------------------------------------- options and help


def test_hints_are_options_that_exist(capsys: pytest.CaptureFixture[str]):
    """By the names of transformers, TRL, litgpt and PEFT, with dashes or underscores."""
    known = {option: cls for cls in reversed(OPTION_CLASSES) for option in option_names(cls)} | {"--resume": None}
    recipes = ("lora-nano", "emotion-small", "pretrain-nano")
    commands = [["train", name] for name in recipes] + [["generate", "r", "p"], ["eval", "r"]]
    assert len(OPTIONS) > 100
    for name, hint in OPTIONS.items():
        option, *value = hint.split(" ")
        assert option in known, name
        for spelling in (name, name.replace("-", "_")):
            lines = []
            for args in commands:
                assert main([*args, f"--{spelling}", "1"]) == 2
                lines.append(capsys.readouterr().err)
                if f"did you mean {hint}?" in lines[-1]:
                    break
            else:
                assert f"--{name}" in known, lines  # an option of ours elsewhere, as --batch-size
        if value:
            assert any(main([*args, option, *value, "--help"]) == 0 for args in commands)
            capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--learning_rate", "--lr"),
        ("--per_device_train_batch_size", "--micro-batch-size"),
        ("--max_length", "--max-seq-len"),
        ("--load_in_4bit", "--quantize nf4"),
        ("--gradient_checkpointing", "--remat"),
        ("--batch_size", "--micro-batch-size"),
        ("--r", "--adapter.rank"),
        ("--report-to=wandb", "--tracker"),
        ("--lrr", "--lr"),
    ],
)
def test_an_option_of_another_library_is_hinted_at(option: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", option]) == 2
    name = option.partition("=")[0]
    expected = f"error: no option {name}; did you mean {hint}? fgpt train lora-nano --help lists them\n"
    assert capsys.readouterr().err == expected


def test_module_names_of_transformers_are_hinted_at(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", "--adapter.target", "q_proj|v_proj|lm_head"]) == 2
    assert r'--adapter.target "blocks\..*\.(q|v)|head"' in capsys.readouterr().err
    for module in MODULES:
        assert main(["train", "lora-nano", "--adapter.target", f".*{module}"]) == 2
        assert "matches no path" in capsys.readouterr().err


def test_help_at_every_level(capsys: pytest.CaptureFixture[str]):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        said = capsys.readouterr()
        assert "usage: fgpt" in said.out
        assert said.err == ""
    for name in ("lora-nano", "emotion-small", "pretrain-nano"):
        for verb in ("train", "doctor"):
            assert main([verb, name, "--help"]) == 0
            assert f"usage: fgpt {verb} {name}" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("just") is None, reason="just is not installed")
def test_just_takes_the_paths_of_the_folder_it_is_called_in(tmp_path: Path):
    (tmp_path / "justfile").write_text((ROOT / "justfile").read_text())
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    python, folder = tmp_path / ".venv" / "bin" / "python", tmp_path / "sub folder"
    python.parent.mkdir(parents=True)
    folder.mkdir()
    python.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    os.utime(tmp_path / "constraints.txt", (0, 0))
    (tmp_path / ".venv" / "ready").touch()
    for name in COMMANDS:
        done = subprocess.run(["just", name, "./a b", "--x"], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == [str(folder), "-m", "fgpt", name, "./a b", "--x"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_recipe_is_in_one_group_with_its_help(kind: str, capsys: pytest.CaptureFixture[str]):
    grouped = " ".join(GROUPS.values()).split()
    fields = [field.name for field in dataclasses.fields(KINDS[kind])]
    assert len(grouped) == len(set(grouped))
    assert set(fields) <= set(grouped)
    name = next(name for name, make in RECIPES.items() if make().kind == kind)
    assert main(["train", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        text.index("--base" if kind != "pretraining" else "--data")
        < text.index("--lr ")
        < text.index("--seed")
        < text.index("--eval-every")
    )
    assert all(option in text for option in option_names(KINDS[kind]))
    assert "--remat, --no-remat" in text or kind == "pretraining"


def test_booleans_are_flags(at: Path, capsys: pytest.CaptureFixture[str]):
    for kind, flags in (("lora-nano", ["--remat", "--no-keep-best"]), ("pretrain-nano", ["--no-compile"])):
        assert main(["train", kind, *flags, "--help"]) == 0
        assert main(["train", kind, flags[0], "True"]) == 2
        assert "True" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- run.json


@pytest.mark.parametrize("name", ["lora-nano", "emotion-small", "pretrain-nano"])
def test_run_json_of_other_versions(name: str, tmp_path: Path):
    run = dataclasses.replace(find(name), lr=1e-3)  # pyright: ignore[reportCallIssue]
    write_run(tmp_path, run)
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
        assert read(adapter={"rank": 4}).adapter == Adapter(rank=4)
        with pytest.raises(InputError, match=r"unknown field 'adapter\.r'"):
            read(adapter={"r": 4})


ABSENT = object()
