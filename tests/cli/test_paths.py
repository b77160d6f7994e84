"""What a person shares names no home, user or disk, and a run is found again all the same."""

import json
import os
from pathlib import Path

import pytest

from fgpt.cli import paths, results, run_dir
from fgpt.recipes import find

HOME = "/home/alice/work"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nano", "nano"),
        ("owner/model@main", "owner/model@main"),
        ("rows/own.json", "rows/own.json"),  # as the user gave it
        (f"{HOME}/rows.json", ".../rows.json"),
        ("~/rows.json", ".../rows.json"),
        (Path("/"), ".../"),
    ],
)
def test_a_path_as_it_is_shared(path: str | Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert paths.shareable(path) == expected
    assert paths.shareable(tmp_path / "a" / "b") == "a/b"


def test_a_sentence_without_paths():
    sentence = f"cannot write {HOME}/runs/x: no space ({HOME}/a.json), see https://example.org/a/b and a/b or 1/2"
    expected = "cannot write .../x: no space (.../a.json), see https://example.org/a/b and a/b or 1/2"
    assert paths.without_paths(sentence) == expected


def test_a_run_that_names_files_is_read_back_whole(tmp_path: Path):
    run = find("lora-nano")
    values = run.to_json() | {
        "base": f"{HOME}/model",
        "data": [f"{HOME}/a.json", "b.json", f"{HOME}/c.json"],
        "out": "/x/runs",
    }
    paths.write_full_paths(tmp_path, values)
    short = paths.shareable_fields(values)
    assert (short["base"], short["data"], short["out"]) == (
        ".../model",
        [".../a.json", "b.json", ".../c.json"],
        ".../runs",
    )
    assert "alice" not in json.dumps(short)
    assert paths.with_full_paths(tmp_path, short) == values | {"out": ".../runs"}
    edited = short | {"data": ["other.json"]}  # what was edited since stands
    assert paths.with_full_paths(tmp_path, edited)["data"] == ["other.json"]
    assert os.stat(tmp_path / "local.json").st_mode & 0o077 == 0
    (tmp_path / "local.json").write_text("[]")
    with pytest.raises(run_dir.InputError, match="expected the full paths"):
        paths.with_full_paths(tmp_path, short)


def test_several_files_of_a_pretraining(tmp_path: Path):
    values = {"data": [f"{HOME}/a.txt", "b.txt"], "heldout": f"{HOME}/h.txt", "labels": ["/joy/x"]}
    paths.write_full_paths(tmp_path, values)
    short = paths.shareable_fields(values)
    assert short == {"data": [".../a.txt", "b.txt"], "heldout": ".../h.txt", "labels": ["/joy/x"]}
    assert paths.with_full_paths(tmp_path, short) == values


def test_a_result_keeps_clear_of_others(tmp_path: Path):
    """The name is that of the settings; the same ones take it again, others the next that is free."""
    one, two = {"count": 3}, {"count": 4, "files": ("a",)}

    def free(settings: dict, *names: str) -> str:
        return results.free_name(tmp_path, names, settings, [".json", ".md"])

    assert free(one, "compare") == "compare"
    (tmp_path / "compare.json").write_text(json.dumps({"settings": one}))
    assert free(one, "compare") == "compare"
    assert free(two, "compare", "compare-4") == "compare-4"
    (tmp_path / "compare-4.md").write_text("a reader's own")
    assert free(two, "compare", "compare-4") == "compare-4-2"
    (tmp_path / "compare-4-2.json").write_text(json.dumps({"settings": two}))
    assert free(two, "compare", "compare-4") == "compare-4-2"
    assert results.name_part("../a b/c\n\td" * 20)[:10] == "a-b-c-d..-"
    assert results.name_part("..") == "unnamed"
