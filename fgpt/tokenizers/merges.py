"""Byte-level BPE in Hugging Face's files: a vocabulary, and the merges in the order in which they are applied.

tiktoken has only ranks: it joins the two neighbors whose union has the lowest rank. If each merge produces the token of
the next rank, as in GPT-2's files, the two are equivalent. If merges and ids are in different orders they are not, and
the merges are what the model was trained with.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import InputError, short_repr
from fgpt.library_errors import call
from fgpt.tokenizers import special_tokens
from fgpt.tokenizers.special_tokens import DeclaredTokens

if TYPE_CHECKING:
    import tokenizers

VOCAB_JSON, MERGES_TXT = "vocab.json", "merges.txt"


def read(folder: Path, declared: DeclaredTokens) -> "tokenizers.Tokenizer":
    """The tokenizer of a folder's vocab.json and merges.txt, the same as transformers' GPT2Tokenizer.

    Args:
        folder: The model folder.
        declared: Special tokens and settings of the folder's other files.

    Raises:
        InputError: for malformed files.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = _vocab(folder / VOCAB_JSON), _merges(folder / MERGES_TXT)
    what = f"{folder / MERGES_TXT}: expected pairs of tokens of {VOCAB_JSON} that make tokens of it"
    tokenizer: Any = Tokenizer(call(what, lambda: models.BPE(vocab=vocab, merges=merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=declared.flag("add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens.add(tokenizer, declared)
    bos, eos = declared.flag("add_bos_token"), declared.flag("add_eos_token")
    add_bos_eos(tokenizer, declared.names, bos, eos, str(folder))
    return tokenizer


def add_bos_eos(tokenizer: Any, names: Mapping[str, str], bos: bool, eos: bool, where: str) -> None:
    """Let `tokenizer` add special tokens to every text, in place.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        names: The special tokens by name.
        bos: Add `bos_token` before every text, if it is named.
        eos: Add `eos_token` after every text, if it is named.
        where: The file, for error messages.
    """
    from tokenizers import processors

    before = [names["bos_token"]] if bos and "bos_token" in names else []
    after = [names["eos_token"]] if eos and "eos_token" in names else []
    tokens = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    if any(number is None for _, number in tokens):
        return
    single = [*before, "$A", *after]
    pair = [*single, *before, "$B:1", *after]
    tokenizer.post_processor = call(
        f"{where}: bos_token and eos_token: expected tokens that can be added to a text",
        lambda: processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens),
    )


def _vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): {err}") from None
    if not isinstance(vocab, dict) or not vocab:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): got {short_repr(vocab)}")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < 1 << 32:
            raise InputError(f"{path}: expected the id of each token, got {short_repr({token: number})}")
    num_ids = len(set(vocab.values()))
    if num_ids < len(vocab):
        raise InputError(f"{path}: expected each id once; {len(vocab)} tokens have {num_ids} ids")
    return vocab


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: not a list of merges: {err}") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{path}: line {number}: expected two tokens with a space between, got {short_repr(line)}")
        merges.append((left, right))
    return merges


# ---------------------------------------------------------------------------------------------------- merges from ranks


def merges_from_ranks(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Merges that split every text as the ranks do.

    The merges of lower ranks usually reduce a token to two parts, which are then the only ones that can meet in a text.
    If more parts remain, the token can arise in other ways: then every split of it into two tokens is a merge.

    Args:
        tokens: The tokens in the order of their ranks.

    >>> merges_from_ranks([b"a", b"b", b"ab", b"aba"])
    [(b'a', b'b'), (b'ab', b'a')]
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for rank, token in enumerate(tokens):
        if len(token) < 2:
            continue
        parts = _parts(token, ranks, rank)
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            merges += [(left, right) for left, right in splits if left in ranks and right in ranks]
    return merges


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The parts to which the merges of ranks below `below` reduce a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= below:
            break
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
