"""Pretraining a small GPT-2, from random params to a model folder that is a base like any other.

result.json    held out, before and after: loss per token, perplexity per token, word and byte
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from fgpt.cli import run_dir
from fgpt.cli.console import announce, console, progress, working
from fgpt.cli.metrics_log import plot_loss
from fgpt.cli.training import documents, mfu
from fgpt.cli.training.instruction_tuning import low_rate, print_saved
from fgpt.cli.training.job import TrainingJob, fingerprint
from fgpt.cli.training.loop import resume_hint, train_loop
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import Perplexity, loglikelihood, windows
from fgpt.generation.loop import generate
from fgpt.generation.sampling import SamplingParams
from fgpt.io import models
from fgpt.io.files import atomic_dir, write_json
from fgpt.losses import Batch, nll
from fgpt.model import GPT, Config, abstract_params, init
from fgpt.optim import adamw, cosine_schedule
from fgpt.recipes import PretrainingRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tiktoken_bpe import TiktokenTokenizer, gpt2
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import init_state, make_step
from fgpt.tree import astype, num_elements, tree_map

HELDOUT, SHARE = 500, 20
"""Documents kept out of training where no others are given: so many, or one in so many if that is less."""


def config_of(run: PretrainingRecipe, tokenizer: Tokenizer) -> Config:
    """The model's config. Raises InputError for sizes that cannot be, and for a table too small for the tokenizer."""
    vocab = tokenizer.n_vocab if run.vocab is None else run.vocab
    if vocab < tokenizer.n_vocab:
        raise InputError(f"vocab is {vocab}: expected a row for each of the {tokenizer.n_vocab} tokens, or more")
    biases = Config.biases if run.biases else ""
    cfg = Config(run.n_layer, run.n_head, run.d_model, run.max_seq_len, vocab, 4 * run.d_model, biases=biases)
    abstract_params(cfg)
    return cfg


def split(run: PretrainingRecipe) -> tuple[list[str], list[str]]:
    """Documents to train on, and documents held out.

    Raises InputError where a file holds no text, or one document that cannot be divided, or the hub cannot be reached.
    """
    apart = None if run.heldout is None else documents.read(run.heldout)
    found = [text for path in run.data for text in documents.read(path)] or documents.from_hub(run.source)
    if apart is not None:
        return found, apart
    if not run.data and run.source == "wikitext-103":
        return found, documents.from_hub("wikitext-103-valid")
    if len(found) < 2:
        raise InputError(f"{run.data[0]} holds one document: name another text to measure on, --heldout FILE")
    cut = len(found) - min(HELDOUT, max(1, len(found) // SHARE))
    return found[:cut], found[cut:]


def batches(
    tokens: list[Int[Tensor, " length"]], end: int, run: PretrainingRecipe, rng: torch.Generator, begin: int = 0
) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other, from update `begin` on: whole rows, every position weighted."""
    passed = begin * run.grad_accumulation_steps * run.micro_batch_size
    stream = itertools.islice(documents.rows(tokens, end, run.max_seq_len, rng), passed, None)

    def micro() -> Batch:
        x = torch.stack([next(stream) for _ in range(run.micro_batch_size)])
        return Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(run.micro_batch_size, run.max_seq_len))

    while True:
        yield [micro() for _ in range(run.grad_accumulation_steps)]


def held_out(params: GPT, tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> Perplexity:
    """How well a model tells documents: each by itself, its end with it, in windows that do not overlap, so that each
    token is read once. `just eval --base FOLDER --text FILE` overlaps them, which costs twice as much and finds less.
    """
    width = params.cfg.n_ctx
    ended = ([*tokenizer.encode(text), tokenizer.eos] for text in texts)
    pairs = [pair for tokens in ended for pair in windows(tokens, tokenizer.bos, width=width, stride=width)]
    with working("scoring held-out documents"):
        logprobs = [x for each in loglikelihood(params, pairs, batch_size=rows) for x in each.logprobs]
    sizes = [(len(text.encode("utf-8", "replace")), len(text.split())) for text in texts]
    return Perplexity(-math.fsum(logprobs), len(logprobs), *map(sum, zip(*sizes, strict=True)))


def figures(of: Perplexity, texts: Sequence[str]) -> dict[str, float | None]:
    """What a perplexity says, by name; None is infinity."""
    found = {
        "loss": of.loss,
        "perplexity": of.per_token,
        "word_perplexity": of.per_word,
        "byte_perplexity": of.per_byte,
        "bits_per_character": of.nats / math.log(2) / sum(map(len, texts)),
    }
    return {name: x if math.isfinite(x) else None for name, x in found.items()}


class HeldOut(NamedTuple):
    """What a model is measured on, and its tokenizer."""

    texts: list[str]
    tokenizer: Tokenizer
    like: TiktokenTokenizer | str
    """The tokenizer, or the model that it is of: whose files a saved model gets."""


def build_job(run: PretrainingRecipe) -> tuple[TrainingJob, HeldOut]:
    """The training, and what the model is measured on before and after it.

    Everything that bad input can spoil is read here, before anything slow begins. Raises InputError.
    """
    device = run_dir.device_of(run.device)
    own = gpt2() if run.tokenizer == "gpt2" else None
    tokenizer = own or models.tokenizer(run.tokenizer)
    cfg = config_of(run, tokenizer)
    if run.take == "best" and not run.eval_every:
        raise InputError("the best state is that of the least held-out loss: --eval-every N takes it each N steps")
    texts, apart = split(run)
    tokens = documents.encode(progress(texts, "tokenizing"), tokenizer)
    rng = key(run.seed)
    params = tree_map(lambda x: x.to(device), init(cfg, fold_in(rng, "init")))
    peak, per_token = (
        run.peak_tflops * 1e12 if run.peak_tflops else mfu.peak(device),
        mfu.flops(params, run.max_seq_len),
    )
    announce(
        run.name,
        f"{num_elements(params):,} parameters, all trained",
        f"{len(texts):,} documents of {sum(map(len, tokens)):,} tokens",
        f"{run.steps} steps of {run.grad_accumulation_steps * run.micro_batch_size * run.max_seq_len:,} tokens",
        f"{per_token:,} FLOPs a token, {peak / 1e12:.3g} TFLOP/s at most ({'given' if run.peak_tflops else 'measured'})",
        *low_rate(run.lr, run.steps, run.num_warmup_steps()),
    )
    schedule = cosine_schedule(
        run.lr, run.steps, warmup_steps=run.num_warmup_steps(), final_lr=run.lr * run.min_lr_ratio
    )
    optimizer = adamw(schedule, run.betas, weight_decay=run.weight_decay)
    it = TrainingJob(
        run=run,
        step=make_step(lambda trained, _, batch, __: nll(trained, batch), optimizer, compile=run.compile),
        frozen=None,
        batches=lambda begin: batches(tokens, tokenizer.eos, run, fold_in(rng, "order"), begin),
        steps=run.steps,
        schedule=schedule,
        rng=rng,
        fingerprint=fingerprint(
            run, params, tokenizer, "" if own else run.tokenizer, training_rows=tokens, heldout_rows=apart
        ),
        initial_state=init_state(params, optimizer),
        tokenizer=tokenizer,
        heldout=lambda trained: held_out(trained, tokenizer, apart, run.micro_batch_size).loss,
        mfu=lambda speed: speed * per_token / peak,
    )
    return it, HeldOut(apart, tokenizer, own or run.tokenizer)


def pretrain(run: PretrainingRecipe, where: Path | None = None) -> Path:
    """Train, save in the hub's layout, and say how well held-out documents are told; in a new folder, or in `where`,
    from its last checkpoint on. Returns the run's folder.

    Raises InputError as `plan` and `fit` do.
    """
    it, held = build_job(run)
    assert it.initial_state is not None
    before = held_out(it.initial_state.trainable, held.tokenizer, held.texts, run.micro_batch_size)
    with run_dir.open_run_dir(run, it.steps, where) as out:
        fitted = train_loop(it, out)
        params = astype(fitted.state.trainable, torch.float16)  # half the size, and no visible loss
        with atomic_dir(out / run_dir.MODEL) as at:
            models.save(params, at, like=held.like)
        plot_loss(out / run_dir.METRICS, out / run_dir.LOSS, run.name)
        print_saved(fitted, out / run_dir.MODEL)
        if fitted.interrupted:
            console.print(f"what was trained so far is usable; {resume_hint(out)}")
            raise KeyboardInterrupt
        params = astype(params, torch.float32)
        after = held_out(params, held.tokenizer, held.texts, run.micro_batch_size)
        report(out, [figures(of, held.texts) for of in (before, after)], len(held.texts))
        warm, ends = SamplingParams(temperature=0.7), held.tokenizer.eos_token_ids
        text = generate(
            params,
            [[held.tokenizer.eos]],
            eos_token_id=ends,
            max_new_tokens=run.max_seq_len - 2,
            sampling=warm,
            rng=fold_in(it.rng, "story"),
        )[0]
        console.print(f"\n{held.tokenizer.decode(text.tokens)}")
    return out


def report(out: Path, told: Sequence[dict[str, float | None]], number: int) -> None:
    """Write and print the held-out figures, before and after."""
    before, after = told
    write_json(out / run_dir.RESULT, after | {"heldout_documents": number, "before": before})
    console.print(f"held out, {number} documents, before and after:")
    for name, x in after.items():
        first, last = ("infinite" if y is None else f"{y:,.3f}" for y in (before[name], x))
        console.print(f"  {name.replace('_', ' ')}: {first} -> {last}")
