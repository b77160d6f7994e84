"""Damaged files of a run: one line each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders.reports import report_of

from fgpt.cli import report
from fgpt.errors import InputError


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def _damage(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 7,', '"step" 7', 1))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("run.json", _cut, "not valid JSON"),
        ("run.json", lambda p: p.write_text("{}"), "expected a run, which has a name"),
        ("metrics.jsonl", _damage, "line 7 is damaged"),
        ("compare.json", lambda p: p.write_text('{"settings": {}}'), "not a comparison of this version"),
        ("status.json", lambda p: p.write_text("[1]"), "expected a JSON object, got list"),
    ],
)
def test_a_damaged_file_is_one_line(finished_run: Path, name: str, spoil: Callable[[Path], Any], message: str):
    before = report_of(finished_run)
    spoil(finished_run / name)
    with pytest.raises(InputError) as err:
        report.run(str(finished_run))
    assert message in str(err.value)
    assert name in str(err.value)
    assert "\n" not in str(err.value)
    assert (finished_run / "report.html").read_text() == before


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
def test_a_comparison_of_wrong_types_is_one_line(at: tuple[str | int, ...], value: Any, finished_run: Path):
    content = json.loads((finished_run / "compare.json").read_text())
    inner: Any = content
    for part in at[:-1]:
        inner = inner[part]
    inner[at[-1]] = value
    (finished_run / "compare.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"compare\.json: not a comparison of this version") as err:
        report.run(str(finished_run))
    assert str(err.value).isprintable()


def test_an_adapter_of_no_kind_does_not_keep_a_run_from_its_page(finished_run: Path):
    content = json.loads((finished_run / "run.json").read_text())
    (finished_run / "run.json").write_text(json.dumps(content | {"adapter": {}}))
    assert "None on" in report_of(finished_run)


@pytest.mark.parametrize(
    "damage",
    [
        *({"steps": [1]}, {"steps": {"tuned": "60"}}, {"best": ["tuned"]}, {"best": {"points": "tuned"}}),
        *({"intervals": 3}, {"intervals": {"tuned": [4.5]}}, {"intervals": {"tuned": {"points (0 to 100)": "4.5"}}}),
    ],
    ids=str,
)
def test_intervals_of_wrong_types_are_one_line(damage: dict[str, Any], finished_run: Path):
    content = json.loads((finished_run / "compare.json").read_text())
    (finished_run / "compare.json").write_text(json.dumps(content | damage))
    with pytest.raises(InputError, match=r"compare\.json: not a comparison of this version"):
        report.run(str(finished_run))


def test_a_comparison_without_intervals_is_shown(finished_run: Path):
    """As versions before this one wrote them: nothing is called the best then."""
    content = json.loads((finished_run / "compare.json").read_text())
    for name in ("steps", "intervals", "best"):
        del content[name]
    (finished_run / "compare.json").write_text(json.dumps(content))
    text = report_of(finished_run)
    assert '<td class="number">20.00</td>' in text
    assert "±" not in text
