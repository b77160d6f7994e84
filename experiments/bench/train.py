"""Training, side by side with transformers + peft.

    equal    tokens/s of LoRA r8 steps on rows of equal length, half of each being prompt
    limit    time of that step's matrix products alone / time of the step
    memory   resident memory of that step, in a fresh process for each side
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

from experiments.bench.baselines import (
    adapters_of,
    base_of,
    equal_rows,
    fgpt_batch,
    fgpt_step,
    hub_model,
    peft_batch,
    peft_step,
    products,
    shape,
)
from experiments.bench.timing import (
    Result,
    console,
    hardware,
    in_fresh_processes,
    peak_bytes,
    ratios_of,
    report,
    speeds,
    time_interleaved,
)
from fgpt.data import instruction_datasets, packing
from fgpt.data.examples import Example
from fgpt.data.prompt_templates import ALPACA, Template, encode
from fgpt.errors import InputError
from fgpt.model import Config
from fgpt.rng import fold_in, key
from fgpt.tokenizers import tiktoken_bpe

SHARED = Path("../shared/data")
"""Real rows beside the checkout, if there are any."""
DOLLY, RANKS = SHARED / "dolly/dolly_hhrlhf_train_small.jsonl", SHARED / "gpt2-bpe/gpt2.tiktoken"

AS_IS = Template("as is", "{instruction}{input}", "{instruction}")
"""For rows whose prompt is already complete."""

Benchmark = Literal["equal", "limit", "memory", "dolly", "cuda"]


@dataclass(frozen=True)
class Train:
    """Training steps against transformers + peft: speed, memory, and the share of the matrix products in it."""

    benchmarks: tuple[Benchmark, ...] = ("equal", "limit", "memory", "dolly", "cuda")
    rows: int = 4
    """Rows in a batch of equal lengths."""
    seq_len: int = 256
    """Tokens in such a row; the first half is prompt."""
    processes: int = 5
    """Fresh processes, one after the other: medians and ranges over them are reported."""
    repeats: int = 5
    """Rounds of equal in each process."""
    layers: int = 12
    """12 is GPT-2 small; fewer for a quick look."""
    vocab: int = 50257
    data: Path = DOLLY
    """Instruction rows: a .jsonl, .json, .csv or .parquet file. If it does not exist, rows are made up."""
    columns: instruction_datasets.Columns = field(
        default_factory=lambda: instruction_datasets.Columns("prompt", None, "response")
    )
    examples: int = 64
    """Rows of dolly, a fixed random sample."""
    batch: int = 8
    """Examples in an update of dolly."""
    max_seq_len: int = 512
    """Longer examples are truncated to N tokens."""
    out: Path = Path("runs/bench")


def train(bench: Train) -> None:
    """Run the benchmarks and write runs/bench/train.json and train.md. Raises InputError."""
    cpu, cfg = torch.device("cpu"), Config(bench.layers, 12, 768, 1024, bench.vocab, 3072)
    results: list[Result] = []
    notes = [f"{hardware(cpu)}, fp32; LoRA r8 on c_attn of {shape(cfg)}"]
    notes.append(f"medians and ranges of {bench.processes} processes, each of {bench.repeats} alternating rounds")
    if {"equal", "limit"} & set(bench.benchmarks):
        describe_equal(bench, cpu)
        *equal_results, gap = in_fresh_processes(bench.processes, equal, cfg, bench, cpu, torch.float32)
        results += equal_results
        notes.append(f"losses of the two sides after {bench.repeats + 1} updates differ by {gap.value:.1e}")
    if "memory" in bench.benchmarks:
        results += memory(cfg, bench)
    if "dolly" in bench.benchmarks:
        notes.append(describe_dolly(cfg, bench))
        results += in_fresh_processes(bench.processes, dolly, cfg, bench, cpu)
    if "cuda" in bench.benchmarks and torch.cuda.is_available():
        gpu, medium = torch.device("cuda"), Config(24, 16, 1024, 1024, bench.vocab, 4096)
        describe_equal(bench, gpu)
        *equal_results, gap = equal(medium, bench, gpu, torch.bfloat16, compiled=True)
        results += equal_results
        notes.append(f"{hardware(gpu)}, bf16; {shape(medium)}; losses differ by {gap.value:.1e}")
    report("train", ("ours", "theirs"), results, notes, bench.out)


def describe_equal(bench: Train, device: torch.device) -> None:
    console.print(f"equal: {bench.rows} x {bench.seq_len} tokens on {device.type} ..")


def equal(cfg: Config, bench: Train, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> list[Result]:
    """Tokens/s of the same steps on both sides, prompt tokens counted; and last the difference of their last losses."""
    limit = "limit" in bench.benchmarks and not compiled
    base, rows = base_of(cfg, device, dtype), equal_rows(bench.rows, bench.seq_len, cfg.vocab_size)
    batch, inputs, losses = fgpt_batch([[row] for row in rows], device), peft_batch(rows, device), {}
    steps: dict[str, Callable[[], float]] = {
        "ours": partial(fgpt_step(base), batch),
        "theirs": partial(peft_step(hub_model(cfg, base), device, dtype, adapters_of(base)), inputs),
    }
    if compiled:
        steps["compiled"] = partial(fgpt_step(base, compile=True), batch)

    def keep(name: str) -> None:
        losses[name] = steps[name]()

    sides: dict[str, Callable[[], object]] = {name: partial(keep, name) for name in steps}
    if limit:
        sides["products"] = products(base, batch)
    seconds = time_interleaved({name: [call] * bench.repeats for name, call in sides.items()}, device)
    tokens = bench.rows * bench.seq_len
    what = f"LoRA step, {bench.rows} x {bench.seq_len} tokens, half prompt, {device.type}"
    results = [
        speeds(f"{what}, {name}" if compiled else what, tokens, seconds[name], seconds["theirs"], target)
        for name, target in (("ours", ">= 1.35"), ("compiled", ""))
        if name in seconds
    ]
    if limit:
        part = {name: statistics.median(ratios_of(seconds["products"], seconds[name])) for name in ("ours", "theirs")}
        name = "its matrix products alone / the step"
        results.append(Result(name, "of the time", part["ours"], part["theirs"], part["ours"] / part["theirs"]))
    return [*results, Result("loss", "nats", abs(losses["ours"] - losses["theirs"]), 0.0, 1.0)]


def memory(cfg: Config, bench: Train) -> list[Result]:
    """Resident memory of three steps of `equal`, a fresh process for each side: in all, and above that before."""
    if not Path("/proc/self/clear_refs").exists():
        console.print("memory: needs Linux, left out")
        return []
    console.print("memory: a fresh process for each side ..")
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
    device, rows = torch.device("cpu"), equal_rows(bench.rows, bench.seq_len, cfg.vocab_size)

    def build() -> Callable[[], object]:
        if side == "ours":
            return partial(fgpt_step(base_of(cfg, device, torch.float32)), fgpt_batch([[row] for row in rows], device))
        return partial(peft_step(hub_model(cfg), device, torch.float32), peft_batch(rows, device))

    return peak_bytes(build, steps=3)


def describe_dolly(cfg: Config, bench: Train) -> str:
    """Print what is measured. Returns a note of where its rows are from."""
    examples, note = instruction_rows(bench, cfg.vocab_size)
    console.print(f"dolly: {len(examples)} rows, {sum(len(e.tokens) for e in examples):,} tokens ..")
    full = rows_per_update(examples, bench)
    return f"instruction rows: {note}; {bench.batch} in an update, ours packed: {full} rows of {bench.max_seq_len}"


def rows_per_update(examples: list[Example], bench: Train) -> int:
    """Packed rows with about as many tokens as an update of `bench.batch` examples."""
    tokens = sum(len(e.tokens) for e in examples)
    return max(1, round(bench.batch * tokens / len(examples) / bench.max_seq_len))


def dolly(cfg: Config, bench: Train, device: torch.device) -> list[Result]:
    """Tokens/s of one pass over instruction rows, padding not counted; loss on the answers.

    Theirs: batches in random order padded to their longest row (the default collation) or to `max_seq_len` (the
    tokenizer's padding="max_length"), and batches sorted by length. Ours: sorted by length, and packed
    with as many tokens a batch.
    """
    examples, _ = instruction_rows(bench, cfg.vocab_size)
    tokens = sum(len(e.tokens) for e in examples)
    base, n = base_of(cfg, device, torch.float32), bench.batch
    ascending = sorted(examples, key=lambda e: len(e.tokens))
    random, by_length = ([rows[i : i + n] for i in range(0, len(rows), n)] for rows in (examples, ascending))
    full = rows_per_update(examples, bench)
    bins = [
        [examples[i] for i in indices] for indices in packing.pack([len(e.tokens) for e in examples], bench.max_seq_len)
    ]
    their, our = peft_step(hub_model(cfg, base), device, torch.float32, adapters_of(base)), fgpt_step(base)
    seconds = time_interleaved(
        {
            "random": [partial(their, peft_batch(rows, device)) for rows in random],
            "max_length": [partial(their, peft_batch(rows, device, bench.max_seq_len)) for rows in random],
            "by length": [partial(their, peft_batch(rows, device)) for rows in by_length],
            "sorted": [partial(our, fgpt_batch([[e] for e in rows], device)) for rows in by_length],
            "packed": [partial(our, fgpt_batch(bins[i : i + full], device)) for i in range(0, len(bins), full)],
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
        Result(f"instruction rows: {what}", unit, speed[a], speed[b], speed[a] / speed[b], target)
        for what, a, b, target in pairs
    ]


def instruction_rows(bench: Train, vocab: int) -> tuple[list[Example], str]:
    """A fixed sample of the data in random order, truncated to `max_seq_len`, and its source."""
    try:
        tokenizer = tiktoken_bpe.from_ranks(RANKS) if RANKS.is_file() else tiktoken_bpe.gpt2()
        rows = instruction_datasets.load_rows(bench.data, bench.columns)
        template = AS_IS if bench.columns.instruction == "prompt" else ALPACA
        cut = (
            Example.completion(e.tokens[: bench.max_seq_len], e.prompt_length)
            for e in (encode(row, template, tokenizer) for row in rows)
        )
        usable, note = [e for e in cut if e.prompt_length < len(e.tokens) - 1], f"{bench.data.name}"
    except InputError as err:
        if bench.data != DOLLY:
            raise
        usable, note = made_up(bench, vocab), f"made up, of lengths like Dolly's ({err})"
    order = torch.randperm(len(usable), generator=key(3)).tolist()[: bench.examples]
    sample = [Example.completion(tuple(t % vocab for t in usable[i].tokens), usable[i].prompt_length) for i in order]
    mean = statistics.mean(len(e.tokens) for e in sample)
    return sample, f"{len(sample)} of {note}, {mean:.0f} tokens on average, truncated at {bench.max_seq_len}"


def made_up(bench: Train, vocab: int) -> list[Example]:
    """Random tokens in Dolly's lengths: log-normal, prompts of 45 tokens in the median (33 are the template's own) with
    a long tail, answers of 45.
    """
    examples = []
    for i, (z_prompt, z_answer) in enumerate(torch.randn(bench.examples, 2, generator=key(4)).tolist()):
        prompt = min(33 + round(math.exp(2.5 + 2.4 * z_prompt)), bench.max_seq_len - 2)
        length = min(prompt + 2 + round(math.exp(3.75 + 1.13 * z_answer)), bench.max_seq_len)
        tokens = torch.randint(vocab, (length,), generator=fold_in(key(4), i)).tolist()
        examples.append(Example.completion(tuple(tokens), prompt))
    return examples
