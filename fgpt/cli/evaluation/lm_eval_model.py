"""fgpt's models for EleutherAI's lm-eval: its tasks, few-shot prompts and metrics on our likelihoods and `generate`.

    lm_eval.simple_evaluate(model=Model(params, tokenizer), tasks=["hellaswag"])

A task gets what lm-eval's own `hf` model gives it: the same tokens, likelihoods, greedy flags and greedy texts. In
addition no result depends on its batch, and the tokens truncated to fit the context are counted in `Model.truncated`,
for which `hf` prints a warning at most.

Needs lm-eval: pip install 'fgpt[eval]'.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from fgpt.distributed import ALONE, World, map_over_ranks
from fgpt.errors import InputError
from fgpt.evaluation.likelihood import LogLikelihood, Request, iter_loglikelihood
from fgpt.generation.loop import generate, stop_on_strings, truncate_at_stop
from fgpt.generation.sampling import SamplingParams
from fgpt.model import GPT
from fgpt.rng import fold_in, key
from fgpt.tokenizers.huggingface import HFTokenizer
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.tree import device

T = TypeVar("T")

MAX_NEW_TOKENS = 256
"""The limit if a task names none, as in lm-eval's own models."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call that limit; the first one given counts."""
FILTERS = {name: name for name in ("top_k", "top_p", "min_p", "repetition_penalty")} | {
    "no_repeat_ngram_size": "no_repeat_ngram"
}
"""transformers' names of what `SamplingParams` has."""
NO_EFFECT = {"num_beams": 1, "top_k": 0}
"""Values with which an option does nothing."""


class TruncationCounts(NamedTuple):
    """What was left out of contexts that did not fit the model's own."""

    requests: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> "TruncationCounts":
        return TruncationCounts(self.requests + 1, self.tokens + tokens) if tokens else self


class TaskGeneration(NamedTuple):
    """How to generate for a request; requests with the same settings are batched together."""

    stop: tuple[str, ...]
    max_new_tokens: int
    sampling: SamplingParams


class Model(TemplateLM):
    """A model and its tokenizer as lm-eval wants them. `batch_size` changes no result. The processes of `world` share
    the batches: each of them evaluates the same tasks, and gets all results.
    """

    def __init__(
        self, params: GPT, tokenizer: Tokenizer, batch_size: int = 8, seed: int = 0, world: World = ALONE
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected 1 or more")
        self.params, self.text, self.rng = params, tokenizer, key(seed)
        self.batch_size, self._processes = batch_size, world
        self._device: torch.device | None = device(params)
        self.truncated = TruncationCounts()
        """Over all requests so far."""

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a request that has none: BOS, or else EOS."""
        return self.text.bos_token_id

    @property
    def max_length(self) -> int:
        return self.params.cfg.n_ctx

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens that transformers' tokenizer gives; a text that begins with BOS gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.text.decode([self.text.bos_token_id]))
        return self.text.encode_special(string, add_special_tokens)

    # ------------------------------------------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Σ ln p, whether greedy decoding would generate it) of tokenized requests, in their order.

        A context of spaces alone is empty, as they all go to the continuation: the prefix token then replaces it.

        Raises InputError for a continuation that is empty, or longer than the model's context.
        """
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), desc="likelihoods", disable=disable_tqdm) as bar:
            for batch in self._iter_loglikelihood(pairs):
                for i, likelihood in batch:
                    self.truncated = self.truncated.add(likelihood.truncated)
                    results[i] = likelihood.total, all(likelihood.greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(batch))
        return [results[i] for i in range(len(pairs))]

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
            for batch in self._iter_loglikelihood(windows):
                for j, likelihood in batch:
                    totals[owners[j]] += likelihood.total
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _iter_loglikelihood(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, LogLikelihood]]]:
        return iter_loglikelihood(self.params, requests, batch_size=self.batch_size, world=self._processes)

    # ------------------------------------------------------------------------------------------------------------ texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model generates after each context until a stop string, EOS, or the limit of new tokens.

        A context that does not fit together with the limit loses tokens at its beginning. A sampled text depends on the
        seed and the request's index alone.

        Raises InputError for an unknown option of generation, or a limit that leaves no token for the prompt.
        """
        groups: dict[TaskGeneration, list[int]] = {}
        for i, request in enumerate(requests):
            _, options = _args(request)
            how = task_generation(options)
            if how.max_new_tokens >= self.max_length:
                raise InputError(
                    f"a task asks for {how.max_new_tokens} new tokens, but the model's context is {self.max_length}: "
                    "that leaves no token for a prompt; lower the task's max_gen_toks"
                )
            groups.setdefault(how, []).append(i)
        text_of: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for how, chosen in groups.items():
                prompts = {i: self._prompt(requests[i].args[0], how.max_new_tokens) for i in chosen}
                longest_first = sorted(chosen, key=lambda i, of=prompts: -len(of[i]))
                batches = [*batched(longest_first, self.batch_size)]

                def texts_of(batch: Sequence[int], how: TaskGeneration = how, of: Any = prompts) -> list[str]:
                    return [*self._generate([of[i] for i in batch], how, batch)]

                for batch, texts in zip(batches, map_over_ranks(texts_of, batches, self._processes), strict=True):
                    for i, text in zip(batch, texts, strict=True):
                        text_of[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return [text_of[i] for i in range(len(requests))]

    def _prompt(self, context: str, max_new_tokens: int) -> list[int]:
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        prompt = tokens[-(self.max_length - max_new_tokens) :]
        self.truncated = self.truncated.add(len(tokens) - len(prompt))
        return prompt

    def _generate(self, prompts: Sequence[Sequence[int]], how: TaskGeneration, indices: Sequence[int]) -> Iterator[str]:
        generate_texts = partial(
            generate,
            self.params,
            eos_token_id=self.text.eos_token_ids,
            max_new_tokens=how.max_new_tokens,
            sampling=how.sampling,
            stopping_criterion=stop_on_strings(self.text.decode, how.stop),
        )
        if how.sampling.temperature > 0:  # one by one, as the key of a row is that of its index in the batch
            outputs = []
            for prompt, i in zip(prompts, indices, strict=True):
                outputs += generate_texts([prompt], rng=fold_in(self.rng, i))
        else:
            outputs = generate_texts(prompts)
        return (truncate_at_stop(self.text.decode_text(output.tokens), how.stop) for output in outputs)

    # ------------------------------------------------------------------------------------------------------------- chat

    @property
    def tokenizer_name(self) -> str:
        return self.text.name if isinstance(self.text, HFTokenizer) else type(self.text).__name__

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        model_template = getattr(self.text, "chat_template", None)
        return model_template.template if chat_template and model_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the model's own template. Raises InputError if it has none, or the task begins the answer."""
        template = getattr(self.text, "chat_template", None)
        if template is None or not add_generation_prompt:
            what = "the model has no chat template" if template is None else "a task begins the answer (its gen_prefix)"
            raise InputError(f"{what}, which --chat does not support: evaluate it without")
        return template.render(chat_history)


def _args(request: Instance) -> Any:
    return request.args  # untyped in lm-eval


def task_generation(options: Mapping[str, Any]) -> TaskGeneration:
    """The generation options of a task.

    Raises InputError for an unknown option, or a value that its logits processor refuses.
    """
    left = {name: value for name, value in options.items() if value is not None and NO_EFFECT.get(name) != value}
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
    return TaskGeneration(tuple(s for s in strings if s), int(limits[0]) if limits else MAX_NEW_TOKENS, sampling)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))
