"""The report of a run: what it says of whole, torn and empty folders, and how a browser takes it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from fgpt import recipes
from fgpt.cli import environment, report
from fgpt.cli.evaluation.compare.results import Answer, Comparison, as_json
from fgpt.cli.options import parse
from fgpt.cli.report import config_diff, curves, run_data
from fgpt.cli.report.plots import Plot, Series
from fgpt.cli.run_dir import find_any, find_finished
from fgpt.data.prompt_templates import InstructionRow
from fgpt.errors import InputError
from fgpt.io.files import write_json

EVIL = "<script>document.title = 'it ran'</script><img src='http://example.invalid/x.png'>"
LORA: Any = replace(recipes.find("lora-nano"), lr=1e-3, data="rows 1.json")
RTE: Any = recipes.find("rte-smollm2")
SECTIONS = ["training", "comparison", "evaluation", "config", "environment", "reproduce"]


def write_lines(at: Path, steps: int, loss: float = 3.0) -> None:
    lines = (
        {"step": i, "loss": loss / i, "grad_norm": 90.0 / i, "lr": 1e-3, "tokens": 100 * i, "seconds": 0.5 * i}
        | {"memory_gb": 0.5, "weight": 7.0}
        | ({"heldout_loss": 2.0 / i} if i % 10 == 0 else {})
        for i in range(1, steps + 1)
    )
    at.write_text("".join(json.dumps(line) + "\n" for line in lines))


def folder(at: Path, run: Any = LORA, steps: int = 60, **files: Any) -> Path:
    """A run's folder: `files` are JSON, by name without the ending."""
    at.mkdir()
    write_json(at / "run.json", dataclasses.asdict(run))
    if steps:
        write_lines(at / "metrics.jsonl", steps)
    for name, value in files.items():
        write_json(at / f"{name}.json", value)
    return at


def compared(prompts: int = 10) -> dict[str, Any]:
    rows = [
        InstructionRow(f"Say {i}. {EVIL}", "to & fro" if i else "", "It is." if i % 2 else "") for i in range(prompts)
    ]
    answers = {
        "base": [Answer("la la la la la la la la" if i else "", (), False) for i in range(prompts)],
        "tuned": [Answer(f"{i} is {EVIL}", (), True) for i in range(prompts)],
    }
    scores = {"base": {"points (0 to 100)": 10.0}, "tuned": {"points (0 to 100)": 20.0}}
    settings = {"base": "nano", "dtype": "float32", "quantize": None, "prompts": "held-out prompts"}
    settings |= {"max_new_tokens": 20, "sampling": {"temperature": 0.0, "top_k": None}, "seed": 0}
    return as_json(Comparison("", [], rows, answers, scores, settings))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A finished run with every part."""
    status, machine = {"state": "finished", "steps": 60}, environment.environment()
    evaluated = {"evaluated": "x", "held out": {"rows": 64, "response loss (nats per token)": 1.25}}
    parts = {"status": status, "environment": machine, "compare": compared(), "eval": evaluated}
    return folder(tmp_path / "lora-nano", **parts)


def told(at: Path) -> str:
    return report.run(str(at)).read_text()


def section(text: str, name: str) -> str:
    return text.partition(f'<section id="{name}">')[2].partition("</section>")[0]


# ------------------------------------------------------------------------------------------------------ what it says


def test_a_whole_run(whole: Path):
    text = told(whole)
    assert re.findall(r'<section id="(\w+)">', text) == SECTIONS
    assert "60 of 60 steps" in text
    assert ">finished<" in text
    drawn = section(text, "training")
    for title in ("loss", "learning rate", "gradient norm", "tokens per second", "memory"):
        assert f"<b>{title}</b>" in drawn
    assert drawn.count("<svg") == 5
    assert ">held out</span>" in drawn
    assert "the best is 0.033, at step 60" in drawn
    assert "<b>200</b>" in drawn  # tokens per second
    samples = section(text, "comparison")
    assert samples.count("<article") == 25  # 10 prompts of two sides, and 5 references
    assert "2 more prompts" in samples
    assert samples.count('<p class="input">to &amp; fro</p>') == 9
    assert samples.count('<p class="text">It is.</p>') == 5
    assert '<td class="best">20.00</td>' in samples
    assert "80 % repeated" in samples
    assert "response loss (nats per token)" in section(text, "evaluation")
    assert "AMD" in section(text, "environment") or "cpu" in section(text, "environment")
    assert "--resume" not in text
    assert not [p for p in whole.iterdir() if p.name.startswith(".report")]


def test_options_that_differ_are_marked(whole: Path):
    shown = section(told(whole), "config")
    assert "2 options differ from the recipe lora-nano" in shown
    assert re.findall(r'<tr class="changed"><th scope="row">([\w.-]+)</th>', shown) == ["lr", "data"]
    assert '<td class="value">0.006</td>' in shown  # the named run's


CHANGED = [
    replace(LORA, out=Path("a b"), seed=3, adapter=replace(LORA.adapter, rank=4, target=r"blocks\..*\.(q|k)")),
    replace(LORA, lr=None, remat=True, steps=7),
    replace(recipes.find("emotion-smollm2"), labels=("a=b c", "d=e"), tune_also="-x", prompt=RTE.prompt),
    replace(recipes.find("tinytiny-pretrain"), data=(Path("x y.txt"), Path("z.txt")), betas=(0.5, 0.75), biases=True),
]


@pytest.mark.parametrize("run", CHANGED, ids=lambda run: run.name)
def test_the_command_makes_the_run_again(run: Any):
    values = json.loads(json.dumps(dataclasses.asdict(run), default=os.fspath))
    just, train, name, *rest = shlex.split(config_diff.command(values))
    assert (just, train, name) == ("just", "train", run.name)
    assert parse(type(run), rest, recipes.find(name), "just train") == run


def test_a_run_that_has_only_begun(tmp_path: Path):
    at = folder(tmp_path / "lora-nano", steps=0)
    text = told(at)
    assert re.findall(r'<section id="(\w+)">', text) == SECTIONS
    assert "No step was written" in section(text, "training")
    assert "just compare .../lora-nano" in section(text, "comparison")
    assert "just eval .../lora-nano" in section(text, "evaluation")
    assert "just train lora-nano" in section(text, "environment")
    assert "end not recorded" in text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"state": "interrupted", "steps": 90}, "interrupted"),
        ({"state": "failed", "steps": 90, "why": "the disk is full"}, "failed"),
        ({"state": "running", "steps": 90}, "killed"),
    ],
)
def test_a_run_that_ended_early(tmp_path: Path, status: dict[str, Any], said: str):
    at = folder(tmp_path / "lora-nano", status=status)
    (at / ".lock").touch()
    text = told(at)
    assert f">{said}</span>" in text
    assert "60 of 90 steps" in text
    assert status.get("why", "") in text
    assert "just train .../lora-nano --resume" in section(text, "reproduce")


def test_a_run_that_is_at_work(tmp_path: Path):
    at = folder(tmp_path / "lora-nano", status={"state": "running", "steps": 90})
    with FileLock(at / ".lock", is_singleton=False):
        assert ">running</span>" in told(at)


def test_a_lock_that_is_a_link_is_left_alone(tmp_path: Path):
    at = folder(tmp_path / "lora-nano", status={"state": "running", "steps": 90})
    (tmp_path / "thesis.txt").write_text("mine")
    (at / ".lock").symlink_to(tmp_path / "thesis.txt")
    assert ">killed</span>" in told(at)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_torn_line_and_repeated_steps(tmp_path: Path):
    at = folder(tmp_path / "lora-nano", steps=20)
    with (at / "metrics.jsonl").open("a") as file:
        for i in (15, 16):
            file.write(json.dumps({"step": i, "loss": 99.0}) + "\n")
        file.write('{"step": 17, "lo')
    data = run_data.read(at)
    assert (data.truncated_lines, data.repeated_steps) == (1, 2)
    assert [line["step"] for line in data.lines] == list(range(1, 21))
    assert [line["loss"] for line in data.lines[14:16]] == [99.0, 99.0]
    drawn = section(told(at), "training")
    assert "is incomplete" in drawn
    assert "2 lines are of steps repeated after resuming" in drawn


def test_a_run_that_classifies(tmp_path: Path):
    scores = {"accuracy": 0.5, "macro_f1": 0.25, "f1": [0.5, 0.0], "confusion": [[1, 0], [1, 0]]}
    by_side = {"majority-class baseline": {**scores, "loss": None}, "tuned": {**scores, "loss": 0.75}}
    both = {"labels": ["joy", "<b>anger"], "rows": 1234, "scores": by_side}
    at = folder(tmp_path / "emotion-small", recipes.find("emotion-small"), metrics=both)
    (at / "confusion.png").write_bytes(b"\x89PNG not really")
    shown = section(told(at), "scores")
    assert "1,234 rows" in shown
    assert "<td>0.750</td>" in shown
    assert "&lt;b&gt;anger" in shown
    assert 'src="data:image/png;base64,iVBORyBub3QgcmVhbGx5"' in shown
    (at / "metrics.json").write_text('{"labels": ["joy"]}')
    with pytest.raises(InputError, match=r"metrics\.json: not the scores of this version"):
        report.run(str(at))
    (at / "metrics.json").unlink()
    assert "just eval .../emotion-small" in section(told(at), "scores")


def test_a_pretraining(tmp_path: Path):
    result = {"loss": 1.5, "perplexity": 4.5, "heldout_documents": 500, "before": {"loss": 8.0, "perplexity": None}}
    at = folder(tmp_path / "pretrain-nano", recipes.find("pretrain-nano"), result=result)
    shown = section(told(at), "heldout")
    assert "500 documents" in shown
    assert '<th scope="row">loss</th><td>8.000</td><td>1.500</td>' in shown
    for damage in ({"loss": "x"}, {"loss": [1]}, {"before": 1}, {"before": [1]}, {"heldout_documents": None}):
        (at / "result.json").write_text(json.dumps(result | damage))
        with pytest.raises(InputError, match=r"result\.json: not the results of this version"):
            report.run(str(at))
    (at / "result.json").unlink()
    assert "has not reached" in section(told(at), "heldout")


# ------------------------------------------------------------------------------------------------------ what it finds


def test_which_of_several_runs_was_taken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for age, name in ((30, "lora-nano"), (20, "lora-nano-2"), (10, "ia3-nano")):
        at = folder(tmp_path / "runs" / name)
        os.utime(at / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "lora-nano" / "adapter").mkdir()
    for take, expected in ((find_any, "lora-nano-2"), (find_finished, "lora-nano")):
        assert take("lora-nano").name == expected
        (said,) = capsys.readouterr().err.splitlines()
        assert f"lora-nano: taking runs/{expected}, of 2 runs of that name the newest" in said
    find_any("ia3-nano")
    find_any("runs/lora-nano")
    assert capsys.readouterr().err == ""
    folder(tmp_path / "lora-nano")
    assert find_any("lora-nano") == Path("lora-nano")
    assert "taking the folder ./lora-nano, and not runs/lora-nano-2" in capsys.readouterr().err


def test_a_page_names_no_place(tmp_path: Path):
    """Even of a run that an earlier version recorded, and of a failure that quotes a path."""
    why = f"cannot write {tmp_path}/lora-nano/x: No space left on device"
    run = replace(LORA, data="/home/alice/rows.json", base="/home/alice/model", out=tmp_path)
    at = folder(tmp_path / "lora-nano", run, status={"state": "failed", "steps": 60, "why": why})
    text = told(at)
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert "cannot write .../x: No space left on device" in text


def test_every_evaluation_is_shown(whole: Path):
    other = {"evaluated": "x", "settings": {"text": "wiki.txt"}, "text": {"perplexity per token": 77.5}}
    write_json(whole / "eval-wiki.json", other)
    shown = section(told(whole), "evaluation")
    assert "response loss (nats per token)" in shown
    assert "<h3>eval-wiki</h3>" in shown
    assert "77.5" in shown


def test_find_takes_the_newest_of_a_name(tmp_path: Path):
    for age, name in ((30, "lora-nano"), (20, "lora-nano-2"), (10, "lora-nano-long")):
        at = folder(tmp_path / name)
        os.utime(at / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "lora-nano" / "report.html").touch()  # the folder's own time is now the latest
    assert find_any("lora-nano", tmp_path) == tmp_path / "lora-nano-2"
    assert find_any(str(tmp_path / "lora-nano")) == tmp_path / "lora-nano"
    with pytest.raises(InputError, match=r"no run 'lora-nan' .*did you mean lora-nano\?"):
        find_any("lora-nan", tmp_path)
    with pytest.raises(InputError, match="no run ''"):
        find_any("", tmp_path)
    with pytest.raises(InputError, match=r"holds no run\.json"):
        find_any(str(tmp_path))


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def _damage(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 7,', '"step" 7', 1))


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("run.json", _cut, "not valid JSON"),
        ("run.json", lambda p: p.write_text("{}"), "expected a run, which has a name"),
        ("metrics.jsonl", _damage, "line 7 is damaged"),
        ("compare.json", lambda p: p.write_text('{"settings": {}}'), "not a comparison of this version"),
        ("status.json", lambda p: p.write_text("[1]"), "expected a JSON object, got list"),
    ],
)
def test_a_damaged_file_is_one_line(whole: Path, name: str, spoil: Callable[[Path], Any], said: str):
    before = told(whole)
    spoil(whole / name)
    with pytest.raises(InputError) as err:
        report.run(str(whole))
    assert said in str(err.value)
    assert name in str(err.value)
    assert "\n" not in str(err.value)
    assert (whole / "report.html").read_text() == before


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}], ids=repr)
@pytest.mark.parametrize(
    "at",
    [
        *(("scores",), ("scores", "base"), ("scores", "tuned"), ("scores", "tuned", "points (0 to 100)")),
        *(("answers",), ("answers", 0), ("answers", 0, "instruction"), ("answers", 0, "input")),
        *(("answers", 0, "reference"), ("answers", 0, "tuned"), ("answers", 0, "base", "text")),
    ],
    ids=lambda at: "/".join(map(str, at)),
)
def test_a_comparison_of_wrong_types_is_one_line(at: tuple[str | int, ...], value: Any, whole: Path):
    held = json.loads((whole / "compare.json").read_text())
    inner: Any = held
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = value
    (whole / "compare.json").write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"compare\.json: not a comparison of this version") as err:
        report.run(str(whole))
    assert str(err.value).isprintable()


def test_an_adapter_of_no_kind_does_not_keep_a_run_from_its_page(whole: Path):
    held = json.loads((whole / "run.json").read_text())
    (whole / "run.json").write_text(json.dumps(held | {"adapter": {}}))
    assert "None on" in told(whole)


# ------------------------------------------------------------------------------------------------------------- plots


def vertices(svg: str) -> list[tuple[float, float]]:
    """The points of the drawn line, in the order of the file."""
    line = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*var\(--smooth\)', svg))
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", line)]


def test_a_long_line_keeps_its_peaks():
    values = [float(i % 7) for i in range(50_000)]
    values[12_345], values[40_000] = 90.0, -90.0
    svg = Plot("loss", [Series("loss", [*enumerate(values)], "smooth")]).svg
    points = vertices(svg)
    assert len(points) < 10_000
    heights = sorted(y for _, y in points)
    assert heights[0] < heights[5] - 50  # y grows downwards: one vertex is high above all others
    assert heights[-1] > heights[-6] + 50


def test_a_plot_takes_the_page_s_colors_and_is_reproducible():
    plot = Plot("a <b>", [Series("x", [(1, 2.0), (2, 3.0)], "raw"), Series("y", [(1, 2.5)], "heldout")], log=True)
    assert plot.svg == plot.svg
    assert set(re.findall(r"#[0-9a-f]{6}", plot.svg)) <= {"#000000"}
    assert plot.svg.startswith("<svg viewBox=")
    assert 'aria-label="a &lt;b&gt;"' in plot.svg
    assert not re.search(r"<(style|metadata|image|script)|http|<!", plot.svg)


def test_tokens_per_second_are_each_step_s_own():
    lines = [{"step": i, "tokens": t, "seconds": s} for i, (t, s) in enumerate([(10, 1.0), (30, 2.0), (8, 2.0)], 1)]
    assert curves.tokens_per_second(lines) == [
        (1, 10.0),
        (2, 20.0),
        (3, 4.0),
    ]  # the counters began anew before the last
    assert curves.tokens_per_second([{"step": 1, "loss": 2.0}]) == []


def test_smoothing_owes_nothing_to_its_beginning():
    assert [y for _, y in curves.smooth([(1, 3.0), (2, 3.0), (3, 3.0)])] == pytest.approx([3.0, 3.0, 3.0])


def test_values_that_are_no_numbers_are_left_out():
    lines = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    assert curves.values(lines, "loss") == [(2, 2.0)]
    (plot,) = curves.curves(lines, "token")
    assert "nan" not in plot.svg


# ---------------------------------------------------------------------------------------------------- the environment


def test_the_environment_names_no_one():
    it = environment.environment()
    assert it["packages"]["torch"].startswith("2.")
    assert it["cores"] >= 1
    assert it["threads"] >= 1
    text = json.dumps(it)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text.replace("//", "/") or str(Path.home()) == "/"
    assert str(Path(environment.__file__).parent) not in text


def test_a_commit_is_that_of_the_clone_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = environment._commit
    if shutil.which("git"):
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        (tmp_path / "fgpt").mkdir()
        (tmp_path / "fgpt" / "a.py").touch()
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "a"], check=True)
        clean = commit(tmp_path)
        assert len(clean["commit"]) == 40
        assert clean["clean"]
        (tmp_path / "notes.txt").touch()
        assert commit(tmp_path) == clean
        (tmp_path / "fgpt" / "a.py").write_text("changed")
        assert commit(tmp_path) == clean | {"clean": False}
    below = tmp_path / "site-packages"
    below.mkdir()
    assert commit(below) == {"commit": None, "clean": None}  # it lies in somebody's repository
    monkeypatch.setenv("PATH", str(below))
    assert commit(tmp_path) == {"commit": None, "clean": None}  # no git


# --------------------------------------------------------------------------------------------------------- a browser


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a page without a screen; stderr has what it logs."""
    if (program := shutil.which("chromium")) is None:
        pytest.skip("no chromium is on the PATH")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    alone = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / '.browser'}")
    logged = ("--enable-logging=stderr", f"--log-net-log={page.parent / 'net.json'}")
    command = [program, *alone, *quiet, *logged, *options, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


class Seen(HTMLParser):
    """A page as the browser has it: what has an id, what is fetched, what is run, and its text."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.ids, self.fetched, self.tags, self.text = [], [], set(), ""
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        self.tags.add(tag)
        self.ids += [held["id"]] if "id" in held else []
        self.fetched += [held[name] or "" for name in ("src", "href", "data", "srcset", "action") if name in held]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_browser_shows_every_section_and_runs_nothing(whole: Path):
    page = report.run(str(whole))
    opened = chromium(page, "--dump-dom")
    seen = Seen(opened.stdout)
    assert [name for name in seen.ids if not re.fullmatch("[mp][0-9a-f]{10}", name)] == SECTIONS  # else of plots
    assert "CONSOLE" not in opened.stderr
    assert seen.fetched == [f"#{name}" for name in SECTIONS]
    assert not seen.tags & {"script", "link", "iframe", "object", "img", "form"}
    assert seen.text.count(EVIL) == 20  # 10 prompts and as many answers
    assert "<title>lora-nano</title>" in opened.stdout
    assert "example.invalid" not in (whole / "net.json").read_text(errors="replace")


def test_a_browser_would_have_told(tmp_path: Path):
    """What the test above looks for is there where a page does those things."""
    page = tmp_path / "page.html"
    page.write_text(f"<title>x</title>{EVIL}<script>console.error('seen')</script>")
    opened = chromium(page, "--dump-dom")
    assert "CONSOLE" in opened.stderr
    assert "<title>it ran</title>" in opened.stdout
    assert "example.invalid" in (tmp_path / "net.json").read_text(errors="replace")


def test_a_browser_draws_it(whole: Path):
    import matplotlib.image

    picture = whole / "shot.png"
    chromium(report.run(str(whole)), f"--screenshot={picture}", "--window-size=1200,1400", "--hide-scrollbars")
    drawn: Any = matplotlib.image.imread(picture)[..., :3]
    assert drawn.shape[:2] == (1400, 1200)
    blue: Any = (abs(drawn - [0x1F / 255, 0x6F / 255, 0xB8 / 255]) < 0.1).all(-1)  # the smoothed lines
    assert blue[400:].sum() > 1000
    below = drawn[:, :, 0].std(axis=1) > 0.01
    assert below.mean() > 0.4  # no large part of it is empty
