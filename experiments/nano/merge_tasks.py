"""Adapters of six tasks combined into one: soups, TIES, DARE and merging by gradient against the adapters themselves.

    python -m experiments.nano.merge_tasks

The tasks are kinds of the nano instructions, each with a LoRA of its own over the embedded base. A quarter of each
kind's rows is set apart and answered greedily; points are those of `fgpt.cli.evaluation.metrics.nano`. Combinations see
`--shots` other rows of each kind, which no adapter has seen. What these rows teach without any of the adapters, a new
LoRA on them shows.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import fgpt
from fgpt.adapter_combining import Method
from fgpt.adapter_types import Adapters
from fgpt.cli.evaluation.metrics.nano import score
from fgpt.cli.training.examples import NANO_TASKS
from fgpt.cli.training.nano_rows import Task, read_tasks
from fgpt.data.packing import collate
from fgpt.data.prompt_templates import PLAIN, encode, encode_prompt
from fgpt.optim import cosine_schedule
from fgpt.tokenizers.tokenizer_files import Tokenizer

KINDS = ("story", "who", "what", "where", "repeat", "title")
BATCH = 8
"""Rows in a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="updates of each adapter")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate of each adapter")
    parser.add_argument("--joint-steps", type=int, default=0, help="updates on all tasks, merged into the base before")
    parser.add_argument("--merge-lr", type=float, default=0.05, help="learning rate of merging by gradient")
    parser.add_argument("--shots", type=int, default=16, help="rows of each kind that combinations may see")
    parser.add_argument("--limit", type=int, default=24, help="rows of each kind that are answered")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
    rows = split(options.seed, options.limit, options.shots)
    train, few, test = ({kind: parts[i] for kind, parts in rows.items()} for i in range(3))
    if options.joint_steps:
        mixed = [random.Random(i).choice(train[KINDS[i % len(KINDS)]]) for i in range(6000)]
        joint = tune(base, batches(tokenizer, mixed, options.joint_steps, 99), options.joint_steps, 99, 5e-3, 16)
        base = fgpt.merge(fgpt.adapt(base, joint))
    begin = time.monotonic()
    tasks = [
        tune(base, batches(tokenizer, train[kind], options.steps, seed), options.steps, seed, options.lr)
        for seed, kind in enumerate(KINDS, options.seed)
    ]
    print(f"six adapters in {time.monotonic() - begin:.0f} s")
    alone = {kind: points(base, x, tokenizer, test[kind]) for kind, x in zip(KINDS, tasks, strict=True)}
    report("its own adapter", alone)
    report("the base", {kind: points(base, {}, tokenizer, test[kind]) for kind in KINDS})
    candidates: list[tuple[str, Adapters]] = [("soup", fgpt.combine(base, tasks)), ("sum", sum_of(base, tasks, 1.0))]
    for method, density, scale in itertools.product(("ties", "dare"), (0.2, 0.5), (1.0, 2.0)):
        name = f"{method}, density {density:g}, weights {scale:g}"
        candidates.append((name, sum_of(base, tasks, scale if method == "ties" else scale / 3, method, density)))
    begin = time.monotonic()
    merged = fgpt.merge_by_gradient(base, tasks, even_batches(tokenizer, few, 150, options.seed), lr=options.merge_lr)
    seconds = time.monotonic() - begin
    candidates.append((f"by gradient ({seconds:.0f} s, {options.shots} rows of each)", merged.adapters))
    alone_on_few = tune(base, even_batches(tokenizer, few, 150, options.seed), 150, options.seed, 3e-3, 16)
    candidates.append(("a new LoRA on the same rows", alone_on_few))
    for name, adapters in candidates:
        report(name, {kind: points(base, adapters, tokenizer, test[kind]) for kind in KINDS}, alone)


def sum_of(
    base: fgpt.GPT, tasks: Sequence[Adapters], weight: float, method: Method = "linear", density: float = 1.0
) -> Adapters:
    return fgpt.combine(base, tasks, [weight] * len(tasks), method=method, density=density, rng=fgpt.key(0))


def split(seed: int, limit: int, shots: int) -> dict[str, tuple[list[Task], list[Task], list[Task]]]:
    """Rows of each kind to train on, `shots` to combine by, and up to `limit` to be answered."""
    parts: dict[str, tuple[list[Task], list[Task], list[Task]]] = {}
    for kind in KINDS:
        rows = [task for task in read_tasks(NANO_TASKS) if task.kind == kind]
        random.Random(seed).shuffle(rows)
        count = min(limit, len(rows) // 4)
        parts[kind] = rows[count + shots :], rows[count : count + shots], rows[:count]
    return parts


def batches(tokenizer: Tokenizer, rows: Sequence[Task], count: int, seed: int) -> Iterator[list[fgpt.Batch]]:
    """`count` batches of rows drawn at random."""
    draw = random.Random(seed)
    examples = [encode(row, PLAIN, tokenizer) for row in rows]
    for _ in range(count):
        yield [collate([[draw.choice(examples)] for _ in range(BATCH)], None)]


def even_batches(
    tokenizer: Tokenizer, rows: Mapping[str, Sequence[Task]], count: int, seed: int
) -> Iterator[list[fgpt.Batch]]:
    """`count` batches of two rows of each kind. Each row counts once: by tokens, stories would outweigh the rest."""
    draw = random.Random(seed)
    examples = {kind: [encode(row, PLAIN, tokenizer) for row in of] for kind, of in rows.items()}
    for _ in range(count):
        batch = collate([[draw.choice(examples[kind])] for kind in KINDS * 2], None)
        yield [replace(batch, weights=batch.weights / batch.weights.sum(1, keepdim=True))]


def tune(
    base: fgpt.GPT, batches: Iterable[list[fgpt.Batch]], steps: int, seed: int, lr: float, rank: int = 8
) -> Adapters:
    """A LoRA on every matrix, trained on the batches."""
    optimizer = fgpt.adamw(cosine_schedule(lr, steps, warmup_steps=10))

    def loss(adapters: Any, params: Any, batch: fgpt.Batch, rng: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return fgpt.nll(fgpt.adapt(params, adapters), batch)

    step = fgpt.make_step(loss, optimizer)
    state = fgpt.init_state(fgpt.lora(base, fgpt.key(seed), rank=rank), optimizer)
    for micro_batches in batches:
        state, _ = step(state, base, micro_batches, None)
    return state.trainable


@torch.no_grad()
def points(base: fgpt.GPT, adapters: Adapters, tokenizer: Tokenizer, rows: Sequence[Task]) -> float:
    """Points of greedy answers to the rows."""
    params = fgpt.merge(fgpt.adapt(base, adapters))
    prompts = [encode_prompt(row, PLAIN, tokenizer) for row in rows]
    answers = fgpt.generate(params, prompts, eos_token_id=tokenizer.eos_token_id, max_new_tokens=160)
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    return score(rows, texts, [answer.finished for answer in answers]).points


def report(name: str, by_kind: Mapping[str, float], alone: Mapping[str, float] | None = None) -> None:
    mean = sum(by_kind.values()) / len(by_kind)
    share = f", {100 * mean * len(by_kind) / sum(alone.values()):.0f} % of the adapters' own" if alone else ""
    print(
        f"{name}: {mean:.1f} points{share}; " + ", ".join(f"{kind} {x:.0f}" for kind, x in by_kind.items()), flush=True
    )


if __name__ == "__main__":
    main()
