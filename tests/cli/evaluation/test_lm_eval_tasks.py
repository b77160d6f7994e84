"""lm-eval's tasks by `fgpt eval --tasks`: the metrics of its own model."""

import json
import math
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from builders import tokens
from builders.lm_eval import hf_lm, model_folder, our_lm, requests_of
from lm_eval.tasks import TaskManager

import fgpt
from fgpt.cli.evaluation import lm_eval_tasks
from fgpt.cli.main import main

KINDS = ("gpt2", "gpt2 with a bos", "llama")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over a file: multiple choice, perplexity and exact match."""
    path = tmp_path_factory.mktemp("tasks")
    choices, words = (
        [" and", " to in", " he was", " the"],
        ["the", "a", "of", "and", "to", "in", "he", "was", "it's", "you", "don't"],
    )
    rows = []
    for i in range(14):
        output = " ".join(words[int(j)] for j in tokens(len(words), 3 + 4 * i, seed=i))
        rows.append(
            {"q": output, "choices": choices, "gold": i % 4, "page": f"{output} == {output}\n naïve", "say": "na"}
        )
    (path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "rows.json")}}}
    data |= {"test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices"}
    choice |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    choice |= {"fewshot_split": "test", "num_fewshot": 1}
    pages = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "page"}
    pages |= {"metric_list": [{"metric": x} for x in ("word_perplexity", "byte_perplexity", "bits_per_byte")]}
    say = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "say"}
    say |= {"generation_kwargs": {"until": ["n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}]}
    for name, fields in (("own_choice", choice), ("own_pages", pages), ("own_say", say)):
        (path / f"{name}.yaml").write_text(json.dumps({"task": name} | data | fields))
    (path / "far.yaml").write_text(json.dumps({"task": "far"} | say | {"dataset_path": "owner/nosuch"}))
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whole_tasks_have_hfs_metrics(kind: str, local: Path):
    names = ["own_choice", "own_pages", "own_say"]
    manager = TaskManager(include_path=str(local), include_defaults=False)
    same: dict[str, Any] = {"tasks": names, "task_manager": manager, "bootstrap_iters": 0, "log_samples": False}
    expected: Any = lm_eval.simple_evaluate(model=hf_lm(kind), **same)
    for rows in (1, 5):
        got = lm_eval_tasks.run(lm_eval_tasks.find("own_*", local), *_load(kind), rows)
        for task in names:
            for metric, x in expected["results"][task].items():
                if isinstance(x, float):
                    assert got["results"][task][metric] == pytest.approx(x, rel=1e-5), (task, metric)
    assert {x["acc,none"] for x in (got["results"]["own_choice"], expected["results"]["own_choice"])} != {0.0}
    assert got["truncated"]["requests"] > 0


def _load(kind: str) -> tuple[fgpt.GPT, Any]:
    return fgpt.load(str(model_folder(kind))), fgpt.tokenizer(str(model_folder(kind)))


def test_eval_of_tasks(local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--include-path", str(local), "--limit", "3", "--out", str(tmp_path)]
    assert main(["eval", "tasks", "own_pages", "--base", str(model_folder("llama")), *options]) == 0
    assert "word_perplexity" in capsys.readouterr().err
    found = json.loads((tmp_path / "eval.json").read_text())["tasks"]
    assert found["n-samples"]["own_pages"]["effective"] == 3
    pages = [json.loads(line)["page"] for line in (local / "rows.json").read_text().splitlines()[:3]]
    totals = our_lm("llama").loglikelihood_rolling(requests_of("loglikelihood_rolling", [(page,) for page in pages]))
    bits = -math.fsum(totals) / sum(len(page.encode()) for page in pages) / math.log(2)
    assert found["results"]["own_pages"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


@pytest.mark.slow
def test_bad_input_is_one_line(local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    at = ["eval", "tasks", "--base", str(model_folder("llama"))]
    for args, says in (
        ([*at, "hellaswagg"], "no task 'hellaswagg'; did you mean hellaswag?"),
        ([*at, " , "], "no tasks: expected names"),
        ([*at, "own_say", "--include-path", str(local / "none")], "no such folder; --include-path is a folder"),
        ([*at, "far", "--include-path", str(local)], "the data of far: Couldn't reach"),
    ):
        capsys.readouterr()
        assert main(args) == 2
        output = capsys.readouterr().err.strip().splitlines()
        assert output[-1].startswith("error: ")
        assert says in output[-1]


@pytest.mark.slow
def test_tasks_as_chats_have_hfs_metrics(local: Path):
    manager = TaskManager(include_path=str(local), include_defaults=False)
    same: dict[str, Any] = {"tasks": ["own_choice"], "task_manager": manager, "bootstrap_iters": 0}
    expected: Any = lm_eval.simple_evaluate(model=hf_lm("llama"), apply_chat_template=True, **same)
    got = lm_eval_tasks.run(lm_eval_tasks.find("own_choice", local), *_load("llama"), chat=True)
    for metric in ("acc,none", "acc_norm,none"):
        assert got["results"]["own_choice"][metric] == expected["results"]["own_choice"][metric]
    samples: Any = lm_eval.simple_evaluate(model=our_lm("llama"), apply_chat_template=True, **same)
    for a, b in zip(samples["samples"]["own_choice"], expected["samples"]["own_choice"], strict=True):
        assert a["arguments"] == b["arguments"]
        assert [x[0][0] for x in a["resps"]] == pytest.approx([x[0][0] for x in b["resps"]], abs=1e-4)
