"""lm-eval's tasks for `just eval`: found by name, run on a model of ours, shown as a table."""

import difflib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from rich.table import Table

from fgpt.cli.console import console
from fgpt.errors import InputError, one_line
from fgpt.model import GPT
from fgpt.tokenizers.tokenizer_files import Tokenizer


class Tasks(NamedTuple):
    """Tasks that there are, before anything is loaded or fetched."""

    names: list[str]
    manager: Any
    """lm-eval's index of tasks."""


def find(names: str, include_path: Path | None = None) -> Tasks:
    """The tasks of a list such as "hellaswag,arc_*": those of `include_path`, and lm-eval's own.

    Raises InputError where lm-eval is not installed, or has no such task.
    """
    try:
        from lm_eval.tasks import TaskManager  # here, because it is an extra, and takes seconds to import
    except ModuleNotFoundError as err:
        raise InputError(f"tasks need lm-eval ({err}): just setup-eval, or pip install 'fgpt[eval]'") from None
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--tasks is empty: expected names such as hellaswag,arc_easy")
    if include_path is not None:
        if not include_path.is_dir():
            raise InputError(f"{include_path}: no such folder; --include-path is a folder of lm-eval's YAML files")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(manager.match_tasks([name]) for name in wanted):  # the index of lm-eval's own takes ten seconds
            return Tasks(manager.match_tasks(wanted), manager)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in wanted:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no task {name!r}; {hint}`lm_eval ls tasks` lists them, --include-path FOLDER adds yours")
    return Tasks(manager.match_tasks(wanted), manager)


def run(
    tasks: Tasks,
    params: GPT,
    tokenizer: Tokenizer,
    rows: int = 8,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Scores of a model, printed as a table and returned with what they are scores of.

    Raises InputError where a task's data cannot be had, and as `fgpt.cli.evaluation.lm_eval_model` does.
    """
    import lm_eval

    from fgpt.cli.evaluation.lm_eval_model import Model

    model, evaluate = Model(params, tokenizer, rows), cast(Any, lm_eval.simple_evaluate)  # it is loaded lazily
    try:
        found = evaluate(
            model=model,
            tasks=[*tasks.names],
            task_manager=tasks.manager,
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )
    except (ConnectionError, FileNotFoundError) as err:
        said = one_line(err)
        raise InputError(f"the data of {', '.join(tasks.names)}: {said}; connect once, or take a local task") from None
    show(found["results"])
    if model.cut.requests:
        console.print(
            f"{model.cut.requests:,} prompts did not fit the context of {model.max_length} tokens, and lost "
            f"{model.cut.tokens:,} tokens at their beginning"
        )
    kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples") if key in found}
    settings = {"limit": limit, "chat": chat, "lm_eval": version("lm-eval")}
    return kept | settings | {"cut": model.cut._asdict()}


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """lm-eval's results as a table: its metrics, and their standard errors where it has them."""
    table = Table("task", "metric", "score", "±", title="lm-eval", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for task, scores in results.items():
        for metric, x in scores.items():
            name, _, kind = metric.partition(",")
            if kind and not name.endswith("_stderr") and isinstance(x, int | float):
                error = scores.get(f"{name}_stderr,{kind}")
                table.add_row(task, name, f"{x:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    console.print(table)
