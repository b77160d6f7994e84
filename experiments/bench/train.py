"""Training, side by side with transformers + peft.

    equal    tokens/s of LoRA r8 steps on rows of equal length, half of each being prompt
    limit    time of that step's matrix products alone / time of the step
    memory   resident memory of that step, in a fresh process a side
    dolly    tokens/s, padding not counted, over instruction rows as they come
    cuda     equal, at gpt2-medium's shape in bf16, eager and compiled, where there is a GPU

Both sides hold the same random weights and the same fresh adapter and make the same updates: their losses are compared.
"""

import math
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from experiments.bench.measure import Result, console, hardware, interleaved, peak_bytes, quotients, report, speeds
from experiments.bench.sides import (
    adapters_of,
    base_of,
    equal_rows,
    hub_model,
    our_batch,
    ours,
    products,
    shape,
    their_batch,
    theirs,
)
from fgpt.data import instruction_datasets, packing
from fgpt.data.prompt_templates import ALPACA, Example, Template, encode
from fgpt.errors import InputError
from fgpt.model import Config
from fgpt.rng import fold_in, key
from fgpt.tokenizers import tiktoken_bpe

SHARED = Path("../shared/data")
"""Real rows beside the checkout, where this project is developed."""
DOLLY, RANKS = SHARED / "dolly/dolly_hhrlhf_train_small.jsonl", SHARED / "gpt2-bpe/gpt2.tiktoken"

AS_IS = Template("as is", "{instruction}{input}", "{instruction}")
"""For rows whose prompt is written out already."""

Part = Literal["equal", "limit", "memory", "dolly", "cuda"]


@dataclass(frozen=True)
class Train:
    """Training steps against transformers + peft: speed, memory, and how near the matrix products' own time."""

    parts: tuple[Part, ...] = ("equal", "limit", "memory", "dolly", "cuda")
    rows: int = 4
    """Rows in a batch of equal lengths."""
    seq: int = 256
    """Tokens in such a row; the first half is prompt."""
    repeats: int = 9
    """Turns of equal; the median of their quotients is told."""
    layers: int = 12
    """12 is GPT-2 small; fewer for a quick look."""
    vocab: int = 50257
    data: Path = DOLLY
    """Instruction rows: a .jsonl, .json, .csv or .parquet file. Where it is not there, rows are made up."""
    columns: instruction_datasets.Columns = field(
        default_factory=lambda: instruction_datasets.Columns("prompt", None, "response")
    )
    examples: int = 64
    """Rows of dolly, a fixed random sample."""
    batch: int = 8
    """Examples in an update of dolly."""
    width: int = 512
    """Longer examples are cut to so many tokens."""
    out: Path = Path("runs/bench")


def train(bench: Train) -> None:
    """Run the parts and write runs/bench/train.json and train.md. Raises InputError."""
    cpu, cfg = torch.device("cpu"), Config(bench.layers, 12, 768, 1024, bench.vocab, 3072)
    results: list[Result] = []
    notes = [f"{hardware(cpu)}, fp32; LoRA r8 on c_attn of {shape(cfg)}"]
    if {"equal", "limit"} & set(bench.parts):
        found, gap = equal(cfg, bench, cpu, torch.float32, limit="limit" in bench.parts)
        results += found
        notes.append(f"losses of the two sides after {bench.repeats + 1} updates differ by {gap:.1e}")
    if "memory" in bench.parts:
        results += memory(cfg, bench)
    if "dolly" in bench.parts:
        found, note = dolly(cfg, bench, cpu)
        results += found
        notes.append(note)
    if "cuda" in bench.parts and torch.cuda.is_available():
        gpu, medium = torch.device("cuda"), Config(24, 16, 1024, 1024, bench.vocab, 4096)
        found, gap = equal(medium, bench, gpu, torch.bfloat16, compiled=True)
        results += found
        notes.append(f"{hardware(gpu)}, bf16; {shape(medium)}; losses differ by {gap:.1e}")
    report("train", ("ours", "theirs"), results, notes, bench.out)


def equal(
    cfg: Config, bench: Train, device: torch.device, dtype: torch.dtype, limit: bool = False, compiled: bool = False
) -> tuple[list[Result], float]:
    """Tokens/s of the same steps on both sides, prompt tokens counted; and how far their last losses lie apart."""
    console.print(f"equal: {bench.rows} x {bench.seq} tokens on {device.type} ..")
    base, rows = base_of(cfg, device, dtype), equal_rows(bench.rows, bench.seq, cfg.vocab_size)
    batch, inputs, losses = our_batch([[row] for row in rows], device), their_batch(rows, device), {}
    steps: dict[str, Callable[[], float]] = {
        "ours": partial(ours(base), batch),
        "theirs": partial(theirs(hub_model(cfg, base), device, dtype, adapters_of(base)), inputs),
    }
    if compiled:
        steps["compiled"] = partial(ours(base, compile=True), batch)

    def keep(name: str) -> None:
        losses[name] = steps[name]()

    sides: dict[str, Callable[[], object]] = {name: partial(keep, name) for name in steps}
    if limit:
        sides["products"] = products(base, batch)
    seconds = interleaved({name: [call] * bench.repeats for name, call in sides.items()}, device)
    tokens = bench.rows * bench.seq
    what = f"LoRA step, {bench.rows} x {bench.seq} tokens, half prompt, {device.type}"
    results = [
        speeds(f"{what}, {name}" if compiled else what, tokens, seconds[name], seconds["theirs"], bar)
        for name, bar in (("ours", ">= 1.3"), ("compiled", ""))
        if name in seconds
    ]
    if limit:
        part = {name: statistics.median(quotients(seconds["products"], seconds[name])) for name in ("ours", "theirs")}
        name = "its matrix products alone / the step"
        results.append(Result(name, "of the time", part["ours"], part["theirs"], part["ours"] / part["theirs"]))
    return results, abs(losses["ours"] - losses["theirs"])


def memory(cfg: Config, bench: Train) -> list[Result]:
    """Resident memory of three steps of `equal`, a fresh process a side: in all, and beyond what was held before."""
    if not Path("/proc/self/clear_refs").exists():
        console.print("memory: needs Linux, left out")
        return []
    console.print("memory: a fresh process a side ..")
    peaks = {}
    for side in ("ours", "theirs"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks[side] = process.submit(peak, side, cfg, bench).result()
    whats = ("peak memory of the process", "peak memory of the step, beyond the model")
    return [
        Result(what, "MB", a / 1e6, b / 1e6, a / b, "<= 0.8")
        for what, a, b in zip(whats, peaks["ours"], peaks["theirs"], strict=True)
    ]


def peak(side: str, cfg: Config, bench: Train) -> tuple[int, int]:
    """`peak_bytes` of one side's step."""
    device, rows = torch.device("cpu"), equal_rows(bench.rows, bench.seq, cfg.vocab_size)

    def build() -> Callable[[], object]:
        if side == "ours":
            return partial(ours(base_of(cfg, device, torch.float32)), our_batch([[row] for row in rows], device))
        return partial(theirs(hub_model(cfg), device, torch.float32), their_batch(rows, device))

    return peak_bytes(build, steps=3)


def dolly(cfg: Config, bench: Train, device: torch.device) -> tuple[list[Result], str]:
    """Tokens/s of one pass over instruction rows, padding not counted; loss on the answers.

    Theirs: batches in random order padded to their longest row (the default collation) or to `width` (the tokenizer's
    padding="max_length"), and batches sorted by length. Ours: sorted by length, and packed with as many tokens a batch.
    """
    examples, note = instruction_rows(bench, cfg.vocab_size)
    tokens = sum(len(e.tokens) for e in examples)
    console.print(f"dolly: {len(examples)} rows, {tokens:,} tokens ..")
    base, n = base_of(cfg, device, torch.float32), bench.batch
    ascending = sorted(examples, key=lambda e: len(e.tokens))
    random, by_length = ([rows[i : i + n] for i in range(0, len(rows), n)] for rows in (examples, ascending))
    full = max(1, round(n * tokens / len(examples) / bench.width))
    bins = [[examples[i] for i in indices] for indices in packing.pack([len(e.tokens) for e in examples], bench.width)]
    their, our = theirs(hub_model(cfg, base), device, torch.float32, adapters_of(base)), ours(base)
    seconds = interleaved(
        {
            "random": [partial(their, their_batch(rows, device)) for rows in random],
            "max_length": [partial(their, their_batch(rows, device, bench.width)) for rows in random],
            "by length": [partial(their, their_batch(rows, device)) for rows in by_length],
            "sorted": [partial(our, our_batch([[e] for e in rows], device)) for rows in by_length],
            "packed": [partial(our, our_batch(bins[i : i + full], device)) for i in range(0, len(bins), full)],
        },
        device,
    )
    speed = {name: tokens / sum(s) for name, s in seconds.items()}
    pairs = (
        ("ours sorted, theirs by default (random order, padded to the longest)", "sorted", "random", ">= 2"),
        ("ours packed, theirs by default", "packed", "random", ">= 2"),
        ("ours sorted, theirs padded to max_length", "sorted", "max_length", ""),
        ("ours sorted, theirs sorted too", "sorted", "by length", ""),
    )
    unit = "useful tokens/s"
    return [
        Result(f"instruction rows: {what}", unit, speed[a], speed[b], speed[a] / speed[b], bar)
        for what, a, b, bar in pairs
    ], f"instruction rows: {note}; {n} in an update, ours packed: {full} rows of {bench.width}"


def instruction_rows(bench: Train, vocab: int) -> tuple[list[Example], str]:
    """A fixed sample of the data in random order, cut to `width`, and where it is from."""
    try:
        tokenizer = tiktoken_bpe.from_ranks(RANKS) if RANKS.is_file() else tiktoken_bpe.gpt2()
        rows = instruction_datasets.load_rows(bench.data, bench.columns)
        template = AS_IS if bench.columns.instruction == "prompt" else ALPACA
        cut = (
            Example(e.tokens[: bench.width], e.prompt_length)
            for e in (encode(row, template, tokenizer) for row in rows)
        )
        found, note = [e for e in cut if e.prompt_length < len(e.tokens) - 1], f"{bench.data.name}"
    except InputError as err:
        if bench.data != DOLLY:
            raise
        found, note = made_up(bench, vocab), f"made up, of lengths like Dolly's ({err})"
    order = torch.randperm(len(found), generator=key(3)).tolist()[: bench.examples]
    found = [Example(tuple(t % vocab for t in found[i].tokens), found[i].prompt) for i in order]
    mean = statistics.mean(len(e.tokens) for e in found)
    return found, f"{len(found)} of {note}, {mean:.0f} tokens on average, cut at {bench.width}"


def made_up(bench: Train, vocab: int) -> list[Example]:
    """Random tokens in Dolly's lengths: log-normal, prompts of 45 tokens in the median (33 are the template's own) with
    a long tail, answers of 45.
    """
    examples = []
    for i, (z_prompt, z_answer) in enumerate(torch.randn(bench.examples, 2, generator=key(4)).tolist()):
        prompt = min(33 + round(math.exp(2.5 + 2.4 * z_prompt)), bench.width - 2)
        length = min(prompt + 2 + round(math.exp(3.75 + 1.13 * z_answer)), bench.width)
        tokens = torch.randint(vocab, (length,), generator=fold_in(key(4), i)).tolist()
        examples.append(Example(tuple(tokens), prompt))
    return examples
