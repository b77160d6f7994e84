"""Who answers in a comparison: the base, and each run that was tuned from it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.training.build import adapts_fused_qkv, load_base
from fgpt.data.prompt_templates import InstructionRow, encode_prompt, template
from fgpt.errors import InputError
from fgpt.io import models
from fgpt.model import GPT
from fgpt.recipes import InstructionRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Contender:
    name: str
    run: InstructionRecipe
    """Whose template it answers in; the base in the first run's."""
    folder: Path | None = None
    """Where that is which was trained; None for the base."""


def find(names: Sequence[str]) -> list[Contender]:
    """The sides of a comparison of runs, by name or folder: the base first.

    Raises InputError for no run, one that is not there, one given twice, or one over another base than the first's.
    """
    if not names:
        there = ", ".join(run_dir.run_names()) or "none yet: just train lora-nano makes one"
        raise InputError(f"expected a run or several: just compare RUN [RUN2 ..]; under runs/ there are {there}")
    folders = [run_dir.find_finished(name) for name in names]
    runs = [run_dir.instruction_run(path) for path in folders]
    for name, times in Counter(path.resolve() for path in folders).items():
        if times > 1:
            raise InputError(f"the run {name.name} is given {times} times: once is enough")
    for name, run in zip(names[1:], runs[1:], strict=True):
        if _over(run) != _over(runs[0]):
            raise InputError(
                f"{name} was trained over {_told(run)}, {names[0]} over {_told(runs[0])}: an adapter answers over its "
                "own base alone; compare them apart"
            )
    return from_runs(runs, folders)


def from_runs(runs: Sequence[InstructionRecipe], folders: Sequence[Path]) -> list[Contender]:
    """The base, and the runs that left `folders`: one is called "tuned", several go by their folders' names."""
    names = [TUNED] if len(runs) == 1 else labels([path.resolve() for path in folders])
    tuned = [Contender(name, run, path) for name, run, path in zip(names, runs, folders, strict=True)]
    return [Contender(BASE, runs[0]), *tuned]


def labels(folders: Sequence[Path]) -> list[str]:
    """The last names of each path, as many as tell them all apart, and from the base."""
    deepest = max(len(path.parts) for path in folders)
    for n in range(1, deepest + 1):
        found = ["/".join(path.parts[-n:]) for path in folders]
        if len({BASE, *found}) == 1 + len(found):
            return found
    raise InputError("the same folder twice: expected different ones")


def prompts(side: Contender, rows: Sequence[InstructionRow], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The rows' prompts in the side's template."""
    return [encode_prompt(row, template(side.run.template), tokenizer) for row in rows]


def params(sides: Sequence[Contender]) -> dict[str, GPT]:
    """Each side's params, by its name, on the first run's device. The base is loaded once, and every adapter lies over
    it; twice where one run adapts q, k and v as one and another does not.

    Raises InputError for an adapter that does not fit.
    """
    bases: dict[bool, GPT] = {}
    found: dict[str, GPT] = {}
    for side in sides:
        alike = adapts_fused_qkv(side.run)
        if alike not in bases:
            bases[alike] = load_base(replace(side.run, device=sides[0].run.device))
        found[side.name] = bases[alike] if side.folder is None else run_dir.load_tuned(side.folder, bases[alike])
    return found


def may_have_seen(run: InstructionRecipe, first: InstructionRecipe) -> bool:
    """Whether `run` may have been trained on rows that `first` held out: the same data, split otherwise."""
    same = run.data == first.data and run.data != "nano"  # the embedded data has a split of its own
    return same and (run.seed != first.seed or run.num_heldout < first.num_heldout)


def _over(run: InstructionRecipe) -> tuple[object, ...]:
    """What a run's adapter belongs to."""
    there = run.base not in models.EMBEDDED and Path(run.base).exists()
    return Path(run.base).resolve() if there else run.base, run.dtype, run.quantize


def _told(run: InstructionRecipe) -> str:
    return f"{run.base} in {run.dtype}" + (f" and {run.quantize}" if run.quantize else "")
