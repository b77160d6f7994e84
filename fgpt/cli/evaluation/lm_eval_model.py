"""Our models for EleutherAI's lm-eval: its tasks, few-shot prompts and metrics over `fgpt.evaluate` and `generate`.

    lm_eval.simple_evaluate(model=Model(params, tokenizer), tasks=["hellaswag"])

What a task is given is what lm-eval's own `hf` model gives it: the same tokens, likelihoods, greedy flags and greedy
texts. Beyond that no result depends on the batch that it was computed in, and what was cut for want of room is counted
in `Model.cut`, of which `hf` warns at most.

Needs lm-eval: just setup-eval, or pip install 'fgpt[eval]'.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from fgpt.errors import InputError
from fgpt.evaluation.likelihood import LogLikelihood, iter_loglikelihood
from fgpt.generation.loop import generate, stop_on_strings, truncate_at_stop
from fgpt.generation.sampling import SamplingParams
from fgpt.model import GPT
from fgpt.rng import fold_in, key
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device

T = TypeVar("T")

MOST = 256
"""New tokens where a task names no limit, as in lm-eval's own models."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call that limit; the first that is given holds."""
FILTERS = {name: name for name in ("top_k", "top_p", "min_p", "repetition_penalty")} | {
    "no_repeat_ngram_size": "no_repeat_ngram"
}
"""transformers' names of what `Sampling` has."""
IDLE = {"num_beams": 1, "top_k": 0}
"""Values with which an option does nothing."""


class TruncationCounts(NamedTuple):
    """What was left out of contexts because the model's own had no room for it."""

    requests: int = 0
    tokens: int = 0

    def plus(self, tokens: int) -> "TruncationCounts":
        return TruncationCounts(self.requests + 1, self.tokens + tokens) if tokens else self


class TaskGeneration(NamedTuple):
    """How one request is to be written; requests that agree in it are written together."""

    stop: tuple[str, ...]
    most: int
    sampling: SamplingParams


class Model(TemplateLM):
    """A model and its tokenizer as lm-eval wants them. `rows` are read or written at once, and change no result."""

    def __init__(self, params: GPT, tokenizer: Tokenizer, rows: int = 8, seed: int = 0) -> None:
        super().__init__()
        if rows < 1:
            raise InputError(f"rows is {rows}: expected 1 or more to be read at once")
        self.params, self.text, self.rows, self.rng = params, tokenizer, rows, key(seed)
        self.batch_size = rows
        self._device: torch.device | None = device(params)
        self.cut = TruncationCounts()
        """Of all that was asked so far."""

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """What a text follows where a request gives no context: BOS, or else the end of text."""
        return self.text.bos

    @property
    def max_length(self) -> int:
        return self.params.cfg.n_ctx

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens that transformers' tokenizer gives; a text that spells out its BOS gets no second one."""
        begun = string.startswith(self.text.decode([self.text.bos]))
        return self.text.encode_special(string, around=not begun if add_special_tokens is None else add_special_tokens)

    # ------------------------------------------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Σ ln p, whether greedy decoding would have written it) of tokenized requests, in their order.

        A context of spaces alone, which all go to the continuation, leaves none: the prefix token then stands for it.

        Raises InputError for a continuation that is empty, or longer than the model's context.
        """
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm) as bar:
            for some in iter_loglikelihood(self.params, pairs, batch_size=self.rows):
                for i, scored in some:
                    found[i] = self._noted(scored)
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update(len(some))
        return [found[i] for i in range(len(pairs))]

    def _noted(self, scored: LogLikelihood) -> tuple[float, bool]:
        self.cut = self.cut.plus(scored.truncated)
        return scored.total, all(scored.greedy)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, by lm-eval's disjoint windows of the model's context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(utils.make_disjoint_window(window))
                owners.append(i)
        totals = [0.0] * len(requests)
        with tqdm(total=len(windows), desc="texts", disable=disable_tqdm) as bar:
            for some in iter_loglikelihood(self.params, windows, batch_size=self.rows):
                for j, scored in some:
                    totals[owners[j]] += scored.total
                bar.update(len(some))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------------------------------------------------ texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context until a stop string, its end of text, or the limit of tokens.

        A context loses tokens at its beginning where they and the limit have no room together. Sampled texts are
        functions of the seed and the request's number, whatever is asked beside them.

        Raises InputError for an option of generation that is not known here, or a limit that leaves no room at all.
        """
        groups: dict[TaskGeneration, list[int]] = {}
        for i, request in enumerate(requests):
            _, options = _args(request)
            how = task_generation(options)
            if how.most >= self.max_length:
                raise InputError(
                    f"a task asks for {how.most} new tokens, but the model's context is {self.max_length}: it has no "
                    "room for a prompt; lower the task's max_gen_toks"
                )
            groups.setdefault(how, []).append(i)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for how, chosen in groups.items():
                prompts = {i: self._prompt(requests[i].args[0], how.most) for i in chosen}
                for some in batched(sorted(chosen, key=lambda i, of=prompts: -len(of[i])), self.rows):
                    for i, text in zip(some, self._written([prompts[i] for i in some], how, some), strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(some))
        return [found[i] for i in range(len(requests))]

    def _prompt(self, context: str, most: int) -> list[int]:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        kept = tokens[-(self.max_length - most) :]
        self.cut = self.cut.plus(len(tokens) - len(kept))
        return kept

    def _written(self, prompts: Sequence[Sequence[int]], how: TaskGeneration, numbers: Sequence[int]) -> Iterator[str]:
        until, ends = stop_on_strings(self.text.decode, how.stop), self.text.eos_token_ids
        if how.sampling.temperature > 0:  # a row's key in a batch is its place there, which says nothing of the request
            out = [
                generate(
                    self.params,
                    [prompt],
                    eos_token_id=ends,
                    max_new_tokens=how.most,
                    sampling=how.sampling,
                    rng=fold_in(self.rng, i),
                    stopping_criterion=until,
                )[0]
                for prompt, i in zip(prompts, numbers, strict=True)
            ]
        else:
            out = generate(
                self.params,
                prompts,
                eos_token_id=ends,
                max_new_tokens=how.most,
                sampling=how.sampling,
                stopping_criterion=until,
            )
        return (truncate_at_stop(self.text.decode_text(text.tokens), how.stop) for text in out)

    # ------------------------------------------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        return self.text.name if isinstance(self.text, HFTokenizer) else type(self.text).__name__

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        found = getattr(self.text, "template", None)
        return found.template if chat_template and found else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages by the model's own template. Raises InputError where it has none, or an answer is begun."""
        found = getattr(self.text, "template", None)
        if found is None or not add_generation_prompt:
            what = "the model has no chat template" if found is None else "a task begins the answer (its gen_prefix)"
            raise InputError(f"{what}, which a chat here cannot do: evaluate it without --chat")
        return found.text(chat_history)


def _args(request: Instance) -> Any:
    return request.args  # which lm-eval's own annotation leaves empty


def task_generation(options: Mapping[str, Any]) -> TaskGeneration:
    """What a task's generation options say.

    Raises InputError for one that is not known here, or a value that its filter refuses.
    """
    left = {name: value for name, value in options.items() if value is not None and IDLE.get(name) != value}
    stop, sample = left.pop("until", []), left.pop("do_sample", None)
    limits = [left.pop(name) for name in LIMITS if name in left]
    temperature = float(left.pop("temperature", 1.0 if sample else 0.0))
    filters = {FILTERS[name]: left.pop(name) for name in list(left) if name in FILTERS}
    if left:
        raise InputError(
            f"a task sets {', '.join(left)} for generation: expected until, do_sample, temperature, max_gen_toks, "
            f"{', '.join(FILTERS)}"
        )
    strings = [stop] if isinstance(stop, str) else stop
    sampling = SamplingParams(temperature if sample is not False else 0.0, **filters)
    return TaskGeneration(tuple(s for s in strings if s), int(limits[0]) if limits else MOST, sampling)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
