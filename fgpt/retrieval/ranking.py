"""The passages of an index that are nearest to a question.

    dense      cosine similarity of the embeddings; of many chunks by an inverted file of 8-bit vectors, then exactly
    bm25       LanceDB's full-text index
    hybrid     both, fused by their ranks:  score(chunk) = Σ_rankings 1 / (60 + rank(chunk))

Source: Robertson and Zaragoza 2009, section 3 (BM25); Cormack et al. 2009 (reciprocal rank fusion).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from fgpt.errors import check_choice
from fgpt.retrieval.embedder import Embedder
from fgpt.retrieval.index import FIELDS, DocumentIndex, Passage

PROBES, REFINED = 20, 4
"""Partitions of the index that are searched; and of its 8-bit vectors, how many times as many as are asked for are
compared exactly."""
RANKED = 50
"""Chunks of each ranking that are fused, at least."""
FUSION = 60
"""What is added to each rank."""

Method = Literal["dense", "bm25", "hybrid"]


def search(
    index: DocumentIndex, embedder: Embedder, question: str, *, count: int, method: Method = "hybrid"
) -> list[Passage]:
    """The passages nearest to a question, the best first.

    Args:
        index: The index.
        embedder: The one that made it.
        question: In plain words; the embedder reads its first tokens.
        count: How many, at most.
        method: By what.

    Raises:
        InputError: for an index by another embedder.
    """
    index.check_embedder(embedder)
    vector = embedder.embed([question])[0].tolist() if method != "bm25" else []
    return search_vector(index, vector, question, count=count, method=method)


def search_vector(
    index: DocumentIndex, vector: Sequence[float], question: str, *, count: int, method: Method = "hybrid"
) -> list[Passage]:
    """`search` for a question whose vector is known."""
    check_choice("method", method, Method)
    num_ranked = max(count, RANKED) if method == "hybrid" else count
    rankings: list[list[Passage]] = []
    if method != "bm25":
        rankings.append(nearest(index.table, vector, num_ranked))
    if method != "dense":
        rankings.append(best_bm25(index.table, question, num_ranked))
    return fuse_rankings(rankings)[:count]


def nearest(table: Any, vector: Sequence[float], count: int, *, exact: bool = False) -> list[Passage]:
    """The passages whose vectors are nearest by cosine; `exact` compares all, where an index would leave some out."""
    query = table.search(vector).distance_type("cosine").nprobes(PROBES).refine_factor(REFINED)
    query = query.bypass_vector_index() if exact else query
    return _passages(query.select([*FIELDS, "_distance"]).limit(count).to_list())


def best_bm25(table: Any, question: str, count: int) -> list[Passage]:
    """The passages of the highest BM25; none if the question has stop words alone."""
    query = table.search(question.encode("utf-8", "replace").decode(), query_type="fts")
    return _passages(query.select([*FIELDS, "_score"]).limit(count).to_list())


def _passages(records: Iterable[dict[str, Any]]) -> list[Passage]:
    return [Passage(**{name: record[name] for name in FIELDS}) for record in records]


def fuse_rankings(rankings: Sequence[Sequence[Passage]]) -> list[Passage]:
    """All passages of the rankings, by Σ 1 / (60 + rank), ranks from 1; of equal ones the first that is named.

    Source: Cormack et al. 2009, section 2.

    >>> a, b, c = (Passage(name, 0, 0, "") for name in "abc")
    >>> [passage.source for passage in fuse_rankings([[a, b, c], [b, c]])]
    ['b', 'c', 'a']
    """
    scores: dict[Passage, float] = {}
    for ranking in rankings:
        for rank, passage in enumerate(ranking, 1):
            scores[passage] = scores.get(passage, 0.0) + 1 / (FUSION + rank)
    return sorted(scores, key=lambda passage: -scores[passage])
