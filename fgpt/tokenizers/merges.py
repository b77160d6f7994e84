"""Byte-level BPE as the hub writes it: a vocabulary, and the merges in the order in which they are made.

tiktoken has ranks alone: it joins the two neighbors whose union has the lowest rank. Where each merge makes the token
of the next rank, as in GPT-2's files, both are one; where merges and ids are in different orders, they are not, and the
merges say what the model was trained with.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgpt.errors import InputError, shown
from fgpt.library_errors import call
from fgpt.tokenizers import special_tokens
from fgpt.tokenizers.special_tokens import DeclaredTokens

if TYPE_CHECKING:
    import tokenizers

VOCAB, MERGES = "vocab.json", "merges.txt"


def read(folder: Path, declared: DeclaredTokens) -> "tokenizers.Tokenizer":
    """The tokenizer of a folder's vocab.json and merges.txt, as transformers' GPT2Tokenizer makes it of them.

    Raises InputError for files that are none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = _vocab(folder / VOCAB), _merges(folder / MERGES)
    what = f"{folder / MERGES}: expected pairs of tokens of {VOCAB} that make tokens of it"
    tokenizer: Any = Tokenizer(call(what, lambda: models.BPE(vocab=vocab, merges=merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=declared.flag("add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens.add(tokenizer, declared)
    bos, eos = declared.flag("add_bos_token"), declared.flag("add_eos_token")
    around(tokenizer, declared.names, bos, eos, str(folder))
    return tokenizer


def around(tokenizer: Any, names: Mapping[str, str], bos: bool, eos: bool, where: str) -> None:
    """Let `tokenizer` put the tokens that `names` calls bos_token and eos_token around every text, where asked."""
    from tokenizers import processors

    before = [names["bos_token"]] if bos and "bos_token" in names else []
    after = [names["eos_token"]] if eos and "eos_token" in names else []
    tokens = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    if any(number is None for _, number in tokens):
        return
    single = [*before, "$A", *after]
    pair = [*single, *before, "$B:1", *after]
    tokenizer.post_processor = call(
        f"{where}: bos_token and eos_token: expected tokens that can be put around a text",
        lambda: processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens),
    )


def _vocab(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): {err}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: not a byte-level BPE vocabulary (token to id): got {shown(found)}")
    for token, number in found.items():
        if type(number) is not int or not 0 <= number < 1 << 32:
            raise InputError(f"{path}: expected the id of each token, got {shown({token: number})}")
    if len(set(found.values())) < len(found):
        raise InputError(f"{path}: expected each id once; {len(found)} tokens have {len(set(found.values()))}")
    return found


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError(f"{path}: not a list of merges: {err}") from None
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise InputError(f"{path}: line {number}: expected two tokens with a space between, got {shown(line)}")
        found.append((left, right))
    return found


# ------------------------------------------------------------------------------------------------------------- of ranks


def of_ranks(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Merges that cut every text as the ranks do, by which `tokens` are ordered.

    The merges of ranks below its own leave of a token two parts, and no others of it can meet in a text. If they leave
    more, the token is met by other ways: then every cut of it into two tokens is a merge.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found: list[tuple[bytes, bytes]] = []
    for rank, token in enumerate(tokens):
        if len(token) < 2:
            continue
        parts = _parts(token, ranks, rank)
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
        else:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            found += [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return found


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What the merges of ranks below `below` leave of a token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        best = min(joined)
        if best >= below:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
