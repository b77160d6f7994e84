"""The sides of a comparison: the base, and each run that was tuned from it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fgpt.cli import run_dir
from fgpt.cli.metrics_log import last_metrics
from fgpt.cli.paths import shareable
from fgpt.cli.run_dir import METRICS
from fgpt.cli.training.build import adapts_fused_qkv, load_base
from fgpt.cli.training.examples import source_weights
from fgpt.cli.training.tokenizer import load_tokenizer
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
    """In whose template it answers; the base in the first run's."""
    folder: Path | None = None
    """The run directory; None for the base."""


def find(names: Sequence[str]) -> list[Contender]:
    """The sides of a comparison of runs, given by name or directory: the base first.

    Raises InputError for no run, one that does not exist, one given twice, or one whose base reads other tokens or
    another number of them than the first's.
    """
    if not names:
        existing = ", ".join(run_dir.run_names()) or "none yet: fgpt train lora-nano makes one"
        raise InputError(f"expected one or more runs: fgpt compare RUN [RUN2 ..]; under runs/ there are {existing}")
    folders = [run_dir.find_finished(name) for name in names]
    runs = [run_dir.instruction_run(path) for path in folders]
    for path, times in Counter(path.resolve() for path in folders).items():
        if times > 1:
            raise InputError(f"the run {path.name} is given {times} times: give it once")
    for name, run in zip(names[1:], runs[1:], strict=True):
        if _base_of(run) != _base_of(runs[0]) and _reads(run) != _reads(runs[0]):
            raise InputError(
                f"{name} was trained on {describe_base(run)}, {names[0]} on {describe_base(runs[0])}: their tokens or "
                "contexts differ, and so do the units of their losses; compare them separately"
            )
    return from_runs(runs, folders)


def from_runs(runs: Sequence[InstructionRecipe], folders: Sequence[Path]) -> list[Contender]:
    """The base and the runs of these directories: one run is called "tuned", several have their directories' names. A
    run over another base than the first's, such as a quantized one, has that base before it.
    """
    names = [TUNED] if len(runs) == 1 else labels([path.resolve() for path in folders])
    sides, bases = [Contender(BASE, runs[0])], [_base_of(runs[0])]
    for name, run, path in zip(names, runs, folders, strict=True):
        if _base_of(run) not in bases:
            bases.append(_base_of(run))
            sides.append(Contender(f"{BASE} of {name}", run))
        sides.append(Contender(name, run, path))
    return sides


def labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make them different from each other and from "base"."""
    depth = max(len(path.parts) for path in folders)
    for n in range(1, depth + 1):
        names = ["/".join(path.parts[-n:]) for path in folders]
        if len({BASE, *names}) == 1 + len(names):
            return names
    raise InputError("the same directory twice: expected different ones")


def encode_prompts(side: Contender, rows: Sequence[InstructionRow], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of the rows' prompts in the side's template."""
    return [encode_prompt(row, template(side.run.template), tokenizer) for row in rows]


def load_params(sides: Sequence[Contender]) -> dict[str, GPT]:
    """The params of each side by its name, on the first run's device. A base is loaded once and shared by every adapter
    over it; twice if one run adapts fused q, k and v and another does not.

    Raises InputError for an adapter that does not fit.
    """
    bases: dict[tuple[object, ...], GPT] = {}
    params: dict[str, GPT] = {}
    for side in sides:
        which = (*_base_of(side.run), adapts_fused_qkv(side.run))
        if which not in bases:
            bases[which] = load_base(replace(side.run, device=sides[0].run.device))
        params[side.name] = bases[which] if side.folder is None else run_dir.load_tuned(side.folder, bases[which])
    return params


def steps(sides: Sequence[Contender]) -> dict[str, int]:
    """How many steps each run has trained, where its metrics say so."""
    last_lines = {side.name: last_metrics(side.folder / METRICS) for side in sides if side.folder is not None}
    return {name: line["step"] for name, line in last_lines.items() if line}


def may_have_seen(run: InstructionRecipe, first: InstructionRecipe) -> bool:
    """Whether `run` may have been trained on rows that `first` held out: the same data with another split."""
    same = _source_names(run) == _source_names(first) and run.data != ("nano",)  # which has a fixed split
    incomparable = (0 < run.num_heldout < 1) != (0 < first.num_heldout < 1)  # a fraction and a number
    return same and (run.seed != first.seed or incomparable or run.num_heldout < first.num_heldout)


def _source_names(run: InstructionRecipe) -> list[str]:
    return [name for name, _ in source_weights(run.data)]


def _base_of(run: InstructionRecipe) -> tuple[object, ...]:
    """What a run's adapter belongs to."""
    is_path = run.base not in models.EMBEDDED and Path(run.base).exists()
    return Path(run.base).resolve() if is_path else run.base, run.dtype, run.quantize, run.new_tokens


def _reads(run: InstructionRecipe) -> tuple[object, ...]:
    """What two models have in common whose losses on a text can be compared: the tokens, and how many they read."""
    cfg, tokenizer, _ = load_tokenizer(run)
    return cfg.n_ctx, cfg.vocab_size, tokenizer.files()


def describe_base(run: InstructionRecipe) -> str:
    """The model of a run with its dtype and format."""
    parts = [f"{shareable(run.base)} in {run.dtype}", *(["and", run.quantize] if run.quantize else [])]
    return " ".join([*parts, *(["with", *run.new_tokens] if run.new_tokens else [])])
