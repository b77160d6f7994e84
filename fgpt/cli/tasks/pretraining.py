"""Pretraining a small GPT-2, from random params to a model folder that is a base like any other.

result.json    held out, before and after: loss per token, perplexity per token, word and byte
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch

from fgpt.cli import run_dir
from fgpt.cli.console import announce, progress, result_console, show_progress
from fgpt.cli.devices import describe_precision, resolve_device, resolve_dtype, resolve_precision
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.metrics_log import HELDOUT_LOSS
from fgpt.cli.training import documents, mfu
from fgpt.cli.training.build import warn_if_all_warmup
from fgpt.cli.training.job import InitialState, TrainingJob, fingerprint
from fgpt.data.documents import read as read_documents
from fgpt.data.examples import Example
from fgpt.distributed import world
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import Perplexity, loglikelihood, windows
from fgpt.generation.loop import generate
from fgpt.generation.sampling import SamplingParams
from fgpt.io import models
from fgpt.io.files import atomic_dir, write_json
from fgpt.kernels.adam import Number
from fgpt.losses import Batch, nll
from fgpt.model import GPT, Config, abstract_params, init
from fgpt.optim import Schedule, adamw, cosine_schedule
from fgpt.recipes import PretrainingRecipe
from fgpt.rng import fold_in, key
from fgpt.tokenizers.tiktoken_bpe import TiktokenTokenizer, gpt2
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.train_step import Step, init_state, make_step
from fgpt.tree import astype, num_elements, tree_map

NUM_HELDOUT, HELDOUT_DIVISOR = 500, 20
"""Documents held out of training if no others are given: 500, or one in 20 if that is less."""

Figures: TypeAlias = dict[str, float | None]
"""By name; None is infinity."""


def config_of(recipe: PretrainingRecipe, num_tokens: int) -> Config:
    """The model's config, for a tokenizer of `num_tokens` tokens.

    Raises InputError for impossible sizes, and for a vocabulary smaller than the tokenizer's.
    """
    vocab_size = num_tokens if recipe.vocab is None else recipe.vocab
    if vocab_size < num_tokens:
        raise InputError(f"vocab is {vocab_size}: expected a row for each of the {num_tokens} tokens, or more")
    cfg = Config(
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        d_model=recipe.d_model,
        n_ctx=recipe.max_seq_len,
        vocab_size=vocab_size,
        d_mlp=4 * recipe.d_model,
        biases=Config.biases if recipe.biases else frozenset(),
    )
    abstract_params(cfg)
    return cfg


def load_documents(recipe: PretrainingRecipe) -> tuple[list[str], list[str]]:
    """Documents to train on, and documents held out.

    Raises InputError if a file holds no text, or the hub cannot be reached.
    """
    heldout = None if recipe.heldout is None else read_documents(recipe.heldout)
    texts = [text for path in recipe.data for text in read_documents(path)] or documents.from_hub(recipe.source)
    if heldout is not None:
        return texts, heldout
    if not recipe.data and recipe.source == "wikitext-103":
        return texts, documents.from_hub("wikitext-103-valid")
    if len(texts) == 1:
        return split_text(texts[0])
    cut = len(texts) - min(NUM_HELDOUT, max(1, len(texts) // HELDOUT_DIVISOR))
    return texts[:cut], texts[cut:]


def split_text(text: str) -> tuple[list[str], list[str]]:
    """The first nine tenths of a text, and the rest, as nanoGPT splits Shakespeare; cut at the end of a line or a word.

    Raises InputError for a text of one word.

    >>> split_text("a b c d e f g h i j")
    (['a b c d e f g h i'], ['j'])
    """
    nine_tenths = 9 * len(text) // 10
    cut = max(text.rfind("\n", nine_tenths // 2, nine_tenths + 1), 0) or text.rfind(" ", 1, nine_tenths + 1)
    first, rest = text[: max(cut, 0)].strip(), text[max(cut, 0) :].strip()
    if not first or not rest:
        raise InputError("the text is one word: nothing of it can be held out; give --heldout FILE")
    return [first], [rest]


def batches(
    tokens: list[documents.Document],
    eos_token_id: int,
    recipe: PretrainingRecipe,
    rng: torch.Generator,
    begin: int = 0,
) -> Iterator[list[Batch]]:
    """The micro-batches of one update after the other, from update `begin` on: full rows, every position weighted."""
    skip = begin * recipe.grad_accumulation_steps * recipe.micro_batch_size
    rows = itertools.islice(documents.rows(tokens, eos_token_id, recipe.max_seq_len, rng), skip, None)

    def micro_batch() -> Batch:
        x = torch.stack([next(rows) for _ in range(recipe.micro_batch_size)])
        weights = torch.ones(recipe.micro_batch_size, recipe.max_seq_len)
        return Batch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), weights)

    while True:
        yield [micro_batch() for _ in range(recipe.grad_accumulation_steps)]


def cast(params: GPT, dtype: torch.dtype) -> GPT:
    """The params that a forward pass computes with: what is trained stays in fp32, and its gradients arrive in fp32."""
    return params if dtype == torch.float32 else tree_map(lambda x: x.to(dtype), params)


def heldout_perplexity(params: GPT, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Perplexity:
    """The perplexity of documents: each by itself, its end-of-text token included, in windows that do not overlap, so
    that each token is read once. `fgpt eval text FILE --base FOLDER` overlaps them, which costs twice as much and
    gives a lower perplexity.
    """
    n_ctx = params.cfg.n_ctx
    pairs = []
    for text in texts:
        pairs += windows(
            [*tokenizer.encode(text), tokenizer.eos_token_id], tokenizer.bos_token_id, width=n_ctx, stride=n_ctx
        )
    with show_progress("scoring held-out documents"):
        likelihoods = loglikelihood(params, pairs, batch_size=batch_size, world=world())
    logprobs = [x for likelihood in likelihoods for x in likelihood.logprobs]
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    num_words = sum(len(text.split()) for text in texts)
    return Perplexity(-math.fsum(logprobs), len(logprobs), num_bytes, num_words)


def figures(perplexity: Perplexity, texts: Sequence[str]) -> Figures:
    """The figures of a perplexity, by name; None is infinity."""
    values = {
        "loss": perplexity.loss,
        "perplexity": perplexity.per_token,
        "word_perplexity": perplexity.per_word,
        "byte_perplexity": perplexity.per_byte,
        "bits_per_character": perplexity.nats / math.log(2) / sum(map(len, texts)),
    }
    return {name: x if math.isfinite(x) else None for name, x in values.items()}


@dataclass(frozen=True, eq=False)
class PretrainingTask:
    """Train a model from random params on documents."""

    recipe: PretrainingRecipe
    job: TrainingJob
    heldout: list[str]
    tokenizer_source: TiktokenTokenizer | str
    """The tokenizer, or the model that it comes from: its files are saved with the model."""
    loss_unit: ClassVar[str] = "token"
    report_section: ClassVar[str] = "heldout"

    @classmethod
    def build(cls, recipe: PretrainingRecipe) -> "PretrainingTask":
        """Raises InputError for bad input."""
        recipe = resolve_precision(recipe)
        device = resolve_device(recipe.device)
        dtype = resolve_dtype(recipe.dtype, device)
        packaged = gpt2() if recipe.tokenizer == "gpt2" else None
        tokenizer = packaged or models.tokenizer(recipe.tokenizer)
        cfg = config_of(recipe, tokenizer.n_vocab)
        texts, heldout = load_documents(recipe)
        tokens = documents.encode(progress(texts, "tokenizing"), tokenizer)
        rng = key(recipe.seed)
        params = tree_map(lambda x: x.to(device), init(cfg, fold_in(rng, "init")))
        peak_flops = recipe.peak_tflops * 1e12 if recipe.peak_tflops else mfu.peak(device, dtype)
        flops_per_token = mfu.flops(params, recipe.max_seq_len)
        warmup_steps = recipe.num_warmup_steps()
        tokens_per_step = recipe.grad_accumulation_steps * recipe.micro_batch_size * recipe.max_seq_len
        peak_source = "given" if recipe.peak_tflops else "measured"
        announce(
            recipe.name,
            f"{num_elements(params):,} parameters, all trained",
            describe_precision(recipe),
            f"{len(texts):,} documents of {sum(map(len, tokens)):,} tokens",
            f"{recipe.steps} steps of {tokens_per_step:,} tokens",
            f"{flops_per_token:,} FLOPs per token, peak {peak_flops / 1e12:.3g} TFLOP/s ({peak_source})",
            *warn_if_all_warmup(recipe.lr, recipe.steps, warmup_steps),
        )
        schedule = cosine_schedule(
            recipe.lr, recipe.steps, warmup_steps=warmup_steps, final_lr=recipe.lr * recipe.min_lr_ratio
        )

        def step_for(schedule: Schedule, weight_decay: Number | None = None) -> Step:
            decay = recipe.weight_decay if weight_decay is None else weight_decay
            optimizer = adamw(schedule, recipe.betas, weight_decay=decay)
            return make_step(
                lambda trained, _, batch, __: nll(cast(trained, dtype), batch),
                optimizer,
                world=world(),
                compile=recipe.compile,
            )

        source = "" if packaged else recipe.tokenizer

        def heldout_loss(p: GPT) -> float:
            return heldout_perplexity(cast(p, dtype), tokenizer, heldout, recipe.micro_batch_size).loss

        job = TrainingJob(
            recipe=recipe,
            step=step_for(schedule),
            step_for=step_for,
            frozen=None,
            batches=lambda begin: batches(tokens, tokenizer.eos_token_id, recipe, fold_in(rng, "order"), begin),
            steps=recipe.steps,
            schedule=schedule,
            rng=rng,
            fingerprint=fingerprint(recipe, params, tokenizer, source, training_rows=tokens, heldout_rows=heldout),
            initial_state=InitialState(init_state(params, adamw(schedule))),
            tokenizer=tokenizer,
            eval_losses={HELDOUT_LOSS: heldout_loss},
            mfu=lambda tokens_per_second: tokens_per_second * flops_per_token / peak_flops,
        )
        return cls(recipe, job, heldout, packaged or recipe.tokenizer)

    @staticmethod
    def load_base(recipe: PretrainingRecipe) -> GPT:
        raise InputError(f"{recipe.name} is a pretraining: it adapts no base")

    @staticmethod
    def class_names(recipe: PretrainingRecipe) -> tuple[str, ...]:
        return ()

    @staticmethod
    def load_heldout_examples(recipe: PretrainingRecipe, limit: int) -> list[Example]:
        raise InputError(f"{recipe.name} is a pretraining: its held-out documents are no examples")

    @staticmethod
    def evaluate(recipe: PretrainingRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        raise InputError(f"{folder}: a pretrained model has no rows of its own; {recipe.suggest_use(folder)}")

    @staticmethod
    def eval_command(folder: str) -> str:
        return f"fgpt eval text FILE --base {folder}/{run_dir.MODEL}"

    def score_initial(self) -> Figures:
        return self._score(self.job.initial_state.peek().trainable)

    def save(self, trainable: GPT, out: Path) -> Path:
        """Save the model as Hugging Face lays it out, in float16: half the size, without a visible loss."""
        with atomic_dir(out / run_dir.MODEL) as partial:
            models.save(astype(trainable, torch.float16), partial, like=self.tokenizer_source)
        return out / run_dir.MODEL

    def score(self, trainable: GPT, out: Path) -> Figures:
        """The figures of the model that was saved; a sampled text is printed."""
        params = astype(astype(trainable, torch.float16), torch.float32)
        scored = self._score(params)
        self._print_sample(params)
        return scored

    def report(self, before: Figures, after: Figures, out: Path) -> None:
        """Write result.json, and print the figures."""
        report(out, before, after, len(self.heldout))

    def _score(self, params: GPT) -> Figures:
        perplexity = heldout_perplexity(params, self.job.tokenizer, self.heldout, self.recipe.micro_batch_size)
        return figures(perplexity, self.heldout)

    def _print_sample(self, params: GPT) -> None:
        tokenizer, rng = self.job.tokenizer, fold_in(self.job.rng, "story")
        prompts, sampling = [[tokenizer.eos_token_id]], SamplingParams(temperature=0.7)
        max_new_tokens = self.recipe.max_seq_len - 2
        (text,) = generate(
            params,
            prompts,
            eos_token_id=tokenizer.eos_token_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            rng=rng,
        )
        result_console.print(f"\n{tokenizer.decode(text.tokens)}")


def report(out: Path, before: Figures, after: Figures, num_documents: int) -> None:
    """Write and print the held-out figures, before and after."""
    write_json(out / run_dir.RESULT, after | {"heldout_documents": num_documents, "before": before})
    result_console.print(f"held out, {num_documents} documents, before and after:")
    for name, value in after.items():
        first, last = ("infinite" if x is None else f"{x:,.3f}" for x in (before[name], value))
        result_console.print(f"  {name.replace('_', ' ')}: {first} -> {last}")
