"""The perplexity of a text by a sliding window."""

from collections.abc import Sequence

from fgpt.cli.console import show_progress
from fgpt.cli.evaluation.tables import Metrics, print_metrics
from fgpt.distributed import world
from fgpt.evaluation.likelihood import LogLikelihood, Request, iter_loglikelihood, perplexity, windows
from fgpt.model import GPT
from fgpt.tokenizers.tokenizer_files import Tokenizer


def text_metrics(params: GPT, tokenizer: Tokenizer, text: str, *, window: int, stride: int, batch_size: int) -> Metrics:
    """The perplexities of a text, by name."""
    with show_progress("tokenizing"):
        tokens = tokenizer.encode(text)
    parts = loglikelihoods(params, windows(tokens, tokenizer.bos_token_id, width=window, stride=stride), batch_size)
    measured = perplexity([logprob for part in parts for logprob in part.logprobs], text)
    counts = {
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "words": measured.words,
        "window": window,
        "stride": stride,
    }
    values = {
        "nats per token": measured.loss,
        "perplexity per token": measured.per_token,
        "bits per byte": measured.bits_per_byte,
        "byte perplexity": measured.per_byte,
        "word perplexity": measured.per_word,
    }
    return print_metrics("text", counts, values)


def loglikelihoods(params: GPT, pairs: Sequence[Request], batch_size: int) -> list[LogLikelihood]:
    """`fgpt.evaluation.likelihood.loglikelihood` with a progress bar."""
    scored: dict[int, LogLikelihood] = {}
    with show_progress("scoring", len(pairs)) as advance:
        for batch in iter_loglikelihood(params, pairs, batch_size=batch_size, world=world()):
            scored.update(batch)
            advance(len(batch))
    return [scored[i] for i in range(len(pairs))]
