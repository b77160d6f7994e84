"""Pretraining a small GPT-2, from random params to a model folder that is a base like any other.

result.json    held out, before and after: loss per token, perplexity per token, word and byte
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from experiments import documents, folder, mfu
from experiments.fit import console, fit, plot_loss
from experiments.runs import Pretrain
from fgpt.data.ranks import gpt2
from fgpt.data.tokenizers import Tokenizer
from fgpt.errors import InputError
from fgpt.evaluate import Perplexity, score, windows
from fgpt.generate import generate
from fgpt.io import hub
from fgpt.io.files import write_json
from fgpt.loss import Batch, nll
from fgpt.model import GPT, Config, init, skeleton
from fgpt.optim import adamw, cosine
from fgpt.rng import fold_in, key
from fgpt.sampling import Sampling
from fgpt.train import State, make_step, start
from fgpt.tree import cast, count, tree_map

HELDOUT, SHARE = 500, 20
"""Documents kept out of training where no others are given: so many, or one in so many if that is less."""


def config_of(run: Pretrain, tokenizer: Tokenizer) -> Config:
    """The model's config. Raises InputError for sizes that cannot be, and for a table too small for the tokenizer."""
    least = {"n_layer": 1, "n_head": 1, "d_model": 1, "seq": 2, "rows": 1, "accumulate": 1, "steps": 1, "evaluate": 1}
    for name, low in least.items():
        if (value := getattr(run, name)) is not None and value < low:
            raise InputError(f"{name} is {value}: expected {low} or more")
    if run.peak is not None and run.peak <= 0:
        raise InputError(f"peak is {run.peak}: expected the machine's TFLOP/s, above 0")
    vocab = tokenizer.n_vocab if run.vocab is None else run.vocab
    if vocab < tokenizer.n_vocab:
        raise InputError(f"vocab is {vocab}: expected a row for each of the {tokenizer.n_vocab} tokens, or more")
    biases = Config.biases if run.biases else ""
    cfg = Config(run.n_layer, run.n_head, run.d_model, run.seq, vocab, 4 * run.d_model, biases=biases)
    skeleton(cfg)
    return cfg


def split(run: Pretrain) -> tuple[list[str], list[str]]:
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
    tokens: list[Int[Tensor, " length"]], end: int, run: Pretrain, rng: torch.Generator
) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other: whole rows, every position weighted."""
    stream = documents.rows(tokens, end, run.seq, rng)

    def micro() -> Batch:
        x = torch.stack([next(stream) for _ in range(run.rows)])
        return Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(run.rows, run.seq))

    while True:
        yield [micro() for _ in range(run.accumulate)]


def held_out(params: GPT, tokenizer: Tokenizer, texts: Sequence[str], rows: int) -> Perplexity:
    """How well a model tells documents: each by itself, its end with it, in windows that do not overlap, so that each
    token is read once. `just eval --base FOLDER --text FILE` overlaps them, which costs twice as much and finds less.
    """
    width = params.cfg.context
    ended = ([*tokenizer.encode(text), tokenizer.eos] for text in texts)
    pairs = [pair for tokens in ended for pair in windows(tokens, tokenizer.begin, width, width)]
    logprobs = [x for each in score(params, pairs, rows) for x in each.logprobs]
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


def pretrain(run: Pretrain) -> Path:
    """Train, save in the hub's layout, and say how well held-out documents are told. Returns the run's folder.

    Everything that bad input can spoil is read before anything slow begins. Raises InputError.
    """
    device = folder.device_of(run.device)
    own = gpt2() if run.tokenizer == "gpt2" else None
    tokenizer = own or hub.tokenizer(run.tokenizer)
    cfg = config_of(run, tokenizer)
    texts, apart = split(run)
    tokens = documents.encode(texts, tokenizer)
    rng = key(run.seed)
    params = tree_map(lambda x: x.to(device), init(cfg, fold_in(rng, "init")))
    out = folder.create(run)
    peak, per_token = run.peak * 1e12 if run.peak else mfu.peak(device), mfu.flops(params, run.seq)
    console.print(
        f"[bold]{run.name}[/]: {count(params):,} parameters; {len(texts):,} documents of {sum(map(len, tokens)):,} "
        f"tokens; {run.steps} steps of {run.accumulate * run.rows * run.seq:,} tokens; {per_token:,} FLOPs a token, "
        f"{peak / 1e12:.3g} TFLOP/s at most ({'given' if run.peak else 'measured'})"
    )
    before = held_out(params, tokenizer, apart, run.rows)
    schedule = cosine(run.lr, run.steps, run.warmup, end=run.lr * run.floor)
    optimizer = adamw(schedule, run.betas, weight_decay=run.weight_decay)
    step = make_step(lambda trained, _, batch, __: nll(trained, batch), optimizer, compile=run.compile)
    stream, state = batches(tokens, tokenizer.eos, run, fold_in(rng, "order")), start(params, optimizer)

    def watch(state: State) -> dict[str, float]:
        if not run.evaluate or int(state.step) % run.evaluate:
            return {}
        of = held_out(state.trainable, tokenizer, apart, run.rows)
        console.print(f"step {int(state.step)}  held out: {of.loss:.4f} nats a token, perplexity {of.per_token:,.2f}")
        return {"heldout_loss": of.loss}

    def used(speed: float) -> float:
        return speed * per_token / peak

    fitted = fit(step, state, None, stream, run.steps, schedule, rng, out / folder.METRICS, used, watch)
    params = cast(fitted.state.trainable, torch.float16)  # half the size, and no visible loss
    hub.save(params, out / folder.MODEL, like=own or run.tokenizer)
    plot_loss(out / folder.METRICS, out / folder.LOSS, run.name)
    console.print(f"{int(fitted.state.step)} steps in {fitted.seconds / 60:.1f} min; saved {out / folder.MODEL}")
    if fitted.interrupted:
        raise KeyboardInterrupt
    params = cast(params, torch.float32)
    report(out, [figures(of, apart) for of in (before, held_out(params, tokenizer, apart, run.rows))], len(apart))
    warm = Sampling(temperature=0.7)
    text = generate(params, [[tokenizer.eos]], tokenizer.eos, run.seq - 2, warm, fold_in(rng, "story"))[0]
    console.print(f"\n{tokenizer.decode(text.tokens)}")
    return out


def report(out: Path, told: Sequence[dict[str, float | None]], number: int) -> None:
    """Write and print the held-out figures, before and after."""
    before, after = told
    write_json(out / "result.json", after | {"heldout_documents": number, "before": before})
    console.print(f"held out, {number} documents, before and after:")
    for name, x in after.items():
        first, last = ("infinite" if y is None else f"{y:,.3f}" for y in (before[name], x))
        console.print(f"  {name.replace('_', ' ')}: {first} -> {last}")
