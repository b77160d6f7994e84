"""Pretraining a small GPT-2 on stories, from random params to a model folder."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from experiments import folder
from experiments.fit import console, fit, plot_loss
from experiments.runs import Pretrain
from experiments.stories import encode, read_stories, rows
from fgpt.data import sources
from fgpt.data.tokenizers import Tokenizer
from fgpt.generate import generate
from fgpt.io import hub
from fgpt.io.files import write_json
from fgpt.loss import Batch, nll
from fgpt.model import GPT, Config, init
from fgpt.optim import adamw, cosine
from fgpt.rng import fold_in, key
from fgpt.sampling import Sampling
from fgpt.train import make_step, start
from fgpt.tree import cast, count

BETAS = (0.9, 0.99)
"""A second moment of long memory: with 2,048 tokens a step most tokens' gradients are absent from most steps."""
HELDOUT = 500
FROM_HUB = 100_000
"""Stories taken from the hub: 20 M tokens, more than the run reads."""


def batches(stories: list[list[int]], end: int, run: Pretrain, rng: torch.Generator) -> Iterator[list[Batch]]:
    """One micro-batch of `rows` whole rows an update, every position weighted."""
    stream = rows(stories, end, run.seq, rng)
    while True:
        x = torch.stack([next(stream) for _ in range(run.rows)])
        yield [Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(run.rows, run.seq))]


@torch.no_grad()
def bits_per_character(params: GPT, tokenizer: Tokenizer, stories: Sequence[str]) -> float:
    """Bits the model needs per character of held-out stories, the end of each included.

    Each story stands alone after an end token; of one longer than the context, only the part that fits is counted,
    tokens and characters alike.
    """
    nats = characters = 0.0
    for story in stories:
        tokens = tokenizer.encode(story)[: params.cfg.context - 1]
        x = torch.tensor([[tokenizer.eos, *tokens, tokenizer.eos]])
        weights = torch.ones(1, x.shape[1] - 1)
        whole = len(tokens) < params.cfg.context - 1
        weights[0, -1] = float(whole)
        nats += float(nll(params, Batch(x[:, :-1], x[:, 1:], weights))[0])
        characters += len(story) if whole else len(tokenizer.decode(tokens))
    return nats / math.log(2) / characters


def split(run: Pretrain) -> tuple[list[str], list[str]]:
    """Stories to train on, and stories held out.

    Raises InputError where a file holds no stories, or the hub cannot be reached.
    """
    read = (read_stories(path) for path in run.data) if run.data else [sources.texts("tinystories", FROM_HUB)]
    stories = [story for some in read for story in some]
    if run.heldout is not None:
        return stories, read_stories(run.heldout)
    return stories[:-HELDOUT], stories[-HELDOUT:]


def pretrain(run: Pretrain) -> Path:
    """Train, save in the hub's layout, and say how many bits a held-out character costs. Returns the run's folder."""
    tokenizer = hub.tokenizer(run.tokenizer)
    stories, heldout = split(run)
    tokens = encode(stories, tokenizer)
    cfg = Config(run.n_layer, run.n_head, run.d_model, run.seq, tokenizer.n_vocab, 4 * run.d_model)
    rng = key(run.seed)
    params = init(cfg, fold_in(rng, "init"))
    out = folder.create(run)
    console.print(
        f"[bold]{run.name}[/]: {count(params):,} parameters; {len(stories):,} stories of {sum(map(len, tokens)):,} "
        f"tokens; {run.steps} steps of {run.rows * run.seq:,} tokens"
    )
    schedule = cosine(run.lr, run.steps, run.warmup, end=run.lr / 100)
    optimizer = adamw(schedule, BETAS, weight_decay=run.weight_decay)
    step = make_step(lambda trained, _, batch, __: nll(trained, batch), optimizer, compile=run.compile)
    stream = batches(tokens, tokenizer.eos, run, fold_in(rng, "order"))
    fitted = fit(step, start(params, optimizer), None, stream, run.steps, schedule, rng, out / folder.METRICS)
    params = cast(fitted.state.trainable, torch.float16)  # half the size, and no visible loss
    hub.save(params, out / folder.MODEL, like=run.tokenizer)
    plot_loss(out / folder.METRICS, out / folder.LOSS, run.name)
    console.print(f"{int(fitted.state.step)} steps in {fitted.seconds / 60:.1f} min; saved {out / folder.MODEL}")
    if fitted.interrupted:
        raise KeyboardInterrupt
    params = cast(params, torch.float32)
    bits = bits_per_character(params, tokenizer, heldout)
    write_json(out / "result.json", {"bits_per_character": bits, "heldout_stories": len(heldout)})
    warm = Sampling(temperature=0.7)
    story = generate(params, [[tokenizer.eos]], tokenizer.eos, run.seq - 2, warm, fold_in(rng, "story"))[0]
    console.print(f"held out: {bits:.3f} bits per character\n\n{tokenizer.decode(story.tokens)}")
    return out
