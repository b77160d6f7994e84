"""Retrieval: how often the right passage is found, what it does for answers, and how long a search takes.

    python -m experiments.bench retrieval --documents wiki.test.raw --filler wiki.train.raw.xz

A question is a sentence of the documents with a gap: of each article sentences are chosen evenly, in which a name of
several words or a number occurs once, not at the beginning; it is the answer. The question has at most `WINDOW` words
on either side of the gap. A passage is right if it covers the place of the answer; the embedder and BM25 see the whole
question. An answer is right if it is equal to the gap's words, in lower case, without punctuation and articles.

The search is timed in a table of as many chunks as `chunks` says: texts of the filler, and vectors near those of real
chunks, since to embed 100,000 takes an hour. A vector is one of a real chunk, moved towards another one, plus noise.

Source: Rajpurkar et al. 2016 (SQuAD), section 6.1 (exact match).
"""

import re
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.bench.timing import console, hardware, report
from fgpt.data import documents
from fgpt.data.prompt_templates import CHAT, encode_prompt
from fgpt.data.rows import InstructionRow
from fgpt.errors import InputError
from fgpt.generation.loop import generate
from fgpt.io.models import load, tokenizer
from fgpt.retrieval.chunking import chunks
from fgpt.retrieval.embedder import MINILM, Embedder, load_embedder
from fgpt.retrieval.index import TABLE, Chunking, DocumentIndex, Passage
from fgpt.retrieval.index_updates import create_indexes, find_changes, rows, schema, write_index
from fgpt.retrieval.passages import augment, question_of
from fgpt.retrieval.ranking import Method, best_bm25, fuse_rankings, nearest, search

WINDOW = 6
"""Words of a sentence on either side of the gap."""
METHODS: tuple[Method, ...] = ("dense", "bm25", "hybrid")
DEPTHS = (1, 5, 10)
INSTRUCTION = "Which words are missing at ____ in the input? Answer with the missing words alone."
TARGET = 50.0
"""Milliseconds of a query."""
WHOLE = "hybrid with the embedding"
ANSWER = re.compile(r"(?<= )(?:[A-Z][a-z]+ [A-Z][a-z]+(?: [A-Z][a-z]+)*|\d[\d,.]*\d)(?= )")
"""A name of several words, or a number of several digits."""


@dataclass(frozen=True)
class Retrieval:
    """Recall of passages, exact match of answers with and without them, and the time of a search."""

    documents: Path
    """WikiText, or another text: its articles are the documents."""
    filler: Path
    """Text for the table that is timed; .xz is decompressed."""
    articles: int = 60
    """Take the first articles."""
    questions: int = 200
    answered: int = 100
    """Questions that the model answers; 0 for none."""
    model: str = "smollm2"
    embedder: str = MINILM
    passages: int = 3
    """In a prompt."""
    chunks: int = 100_000
    """Of the table that is timed; 0 times nothing."""
    queries: int = 100
    """That are timed."""
    out: Path = Path("runs/bench")


class Cloze(NamedTuple):
    """A question: a sentence with a gap."""

    text: str
    answer: str
    source: str
    offset: int
    """Of the answer in the source."""

    @property
    def row(self) -> InstructionRow:
        return InstructionRow(INSTRUCTION, self.text)

    def is_in(self, passage: Passage) -> bool:
        return passage.source == self.source and 0 <= self.offset - passage.start < len(passage.text)


def retrieval(bench: Retrieval) -> None:
    """Run the benchmark and write runs/bench/retrieval.json and retrieval.md. Raises InputError."""
    embedder = load_embedder(bench.embedder)
    sheets: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = []
    with tempfile.TemporaryDirectory() as name:
        texts = {f"{i:03}.txt": text for i, text in enumerate(documents.read(bench.documents)[: bench.articles])}
        folder = Path(name) / "documents"
        folder.mkdir()
        for source, text in texts.items():
            (folder / source).write_text(text)
        start = time.process_time()
        chunking = Chunking()
        changes = find_changes(folder, Path(name) / "index", embedder=embedder, chunking=chunking)
        index = write_index(folder, Path(name) / "index", changes, embedder=embedder, chunking=chunking)
        console.print(f"{index.num_chunks} chunks in {time.process_time() - start:.0f} s of CPU time")
        questions = clozes(texts, bench.questions)
        rankings: dict[Method, list[list[Passage]]] = {
            method: rank(index, embedder, questions, method) for method in METHODS
        }
        sheets.append(recall_sheet(questions, rankings))
        console.print(sheets[-1])
        if bench.answered:
            sheets.append(answer_sheet(bench, questions[: bench.answered], rankings))
            console.print(sheets[-1])
        notes = [
            f"{hardware(torch.device('cpu'))}; {bench.embedder}; {len(texts)} articles of {bench.documents.name} in "
            f"{index.num_chunks} chunks of at most {chunking.size} tokens, {len(questions)} questions"
        ]
        if bench.chunks:
            vectors = index.table.to_arrow()["vector"].combine_chunks().flatten().to_numpy().reshape(-1, embedder.width)
            queries = [question_of(question.row) or "" for question in questions[: bench.queries]]
            real = torch.from_numpy(vectors.copy())
            sheets.append(time_searches(bench, Path(name) / "table", embedder, real, queries))
    report("retrieval", ("", ""), [], notes, bench.out, sheets)


# -------------------------------------------------------------------------------------------------------------- quality


def clozes(texts: dict[str, str], count: int) -> list[Cloze]:
    """`count` questions, as many of each text, in turn."""
    by_text = [_clozes_of(source, text) for source, text in texts.items()]
    each = -(-count // len(by_text))
    chosen = [[of_text[i * len(of_text) // each] for i in range(each)] for of_text in by_text if len(of_text) >= each]
    in_turn = [questions[i] for i in range(each) for questions in chosen]
    if len(in_turn) < count:
        raise InputError(f"the documents have {len(in_turn)} questions, not {count}: lower it")
    return in_turn[:count]


def _clozes_of(source: str, text: str) -> list[Cloze]:
    questions: list[Cloze] = []
    for sentence in re.finditer(r"[^\n.?!]{60,300}(?= [.?!])", text):
        words = sentence.group()
        candidates = [match for match in ANSWER.finditer(words, 20) if words.count(match.group()) == 1]
        if candidates:
            match = candidates[0]
            left, right = words[: match.start()].split()[-WINDOW:], words[match.end() :].split()[:WINDOW]
            gap = " ".join([*left, "____", *right])
            questions.append(Cloze(gap, match.group(), source, sentence.start() + match.start()))
    return questions


def rank(index: DocumentIndex, embedder: Embedder, questions: Sequence[Cloze], method: Method) -> list[list[Passage]]:
    """The passages for each question, the best first."""
    return [
        search(index, embedder, question_of(question.row) or "", count=max(DEPTHS), method=method)
        for question in questions
    ]


def recall(questions: Sequence[Cloze], rankings: Sequence[Sequence[Passage]], depth: int) -> float:
    """The share of questions one of whose first passages is right."""
    right = [any(map(question.is_in, ranking[:depth])) for question, ranking in zip(questions, rankings, strict=True)]
    return sum(right) / len(right)


def recall_sheet(questions: Sequence[Cloze], rankings: dict[Method, list[list[Passage]]]) -> Any:
    lines: list[tuple[str, ...]] = []
    for name, passages in rankings.items():
        lines.append((name, *(f"{recall(questions, passages, depth):.1%}" for depth in DEPTHS)))
    return ("search", *(f"recall@{depth}" for depth in DEPTHS)), lines


def normalize_answer(text: str) -> str:
    """A text in lower case, without punctuation, articles and surplus white space.

    >>> normalize_answer("The  Red Fox.")
    'red fox'
    """
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def answer_sheet(
    bench: Retrieval, questions: Sequence[Cloze], rankings: dict[Method, list[list[Passage]]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Exact match, and how often the answer is in what is written, without passages and with those of hybrid search."""
    params, model_tokenizer = load(bench.model), tokenizer(bench.model)
    lines: list[tuple[str, ...]] = []
    for name in ("no passages", "hybrid"):
        texts: list[str] = []
        start = time.process_time()
        for i, question in enumerate(questions):
            passages = rankings["hybrid"][i][: bench.passages] if name == "hybrid" else []
            prompt = encode_prompt(augment(question.row, passages), CHAT, model_tokenizer)
            (output,) = generate(params, [prompt], eos_token_id=model_tokenizer.eos_token_ids, max_new_tokens=16)
            texts.append(normalize_answer(model_tokenizer.decode_text(output.tokens).strip().partition("\n")[0]))
        answers = [normalize_answer(question.answer) for question in questions]
        exact = sum(text == answer for text, answer in zip(texts, answers, strict=True)) / len(questions)
        inside = sum(f" {answer} " in f" {text} " for text, answer in zip(texts, answers, strict=True)) / len(questions)
        console.print(f"{name}: {exact:.1%} {inside:.1%}, {time.process_time() - start:.0f} s of CPU time")
        lines.append((name, f"{exact:.1%}", f"{inside:.1%}"))
    return (f"{bench.model}, {len(questions)} questions", "exact match", "answer contained"), lines


# ----------------------------------------------------------------------------------------------------------------- time


def time_searches(
    bench: Retrieval, folder: Path, embedder: Embedder, real: Tensor, questions: Sequence[str]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Milliseconds of a query in a table of `bench.chunks`, and the recall of the approximate search."""
    import lancedb

    table = lancedb.connect(str(folder)).create_table(TABLE, schema=schema(embedder.width))
    passages, vectors = filler_passages(bench, embedder), similar_vectors(real, bench.chunks)
    for first in range(0, bench.chunks, 10_000):
        part = slice(first, first + 10_000)
        table.add(rows(passages[part], vectors[part]))
    start = time.perf_counter()
    create_indexes(table)
    console.print(f"indexes of {bench.chunks:,} chunks in {time.perf_counter() - start:.0f} s")
    query_vectors = embedder.embed(questions).tolist()
    exact = [nearest(table, vector, 10, exact=True) for vector in query_vectors]
    approximate = [nearest(table, vector, 10) for vector in query_vectors]
    shared = sum(len(set(a) & set(b)) for a, b in zip(exact, approximate, strict=True))

    def hybrid(i: int) -> object:
        return fuse_rankings([nearest(table, query_vectors[i], 50), best_bm25(table, questions[i], 50)])

    calls: dict[str, Callable[[int], object]] = {
        "embedding of the question": lambda i: embedder.embed([questions[i]]),
        "dense, exact": lambda i: nearest(table, query_vectors[i], 10, exact=True),
        "dense": lambda i: nearest(table, query_vectors[i], 10),
        "bm25": lambda i: best_bm25(table, questions[i], 10),
        "hybrid": hybrid,
        WHOLE: lambda i: (embedder.embed([questions[i]]), hybrid(i)),
    }
    lines: list[tuple[str, ...]] = []
    for name, call in calls.items():
        wall, cpu = time_queries(call, len(questions))
        recovered = f"{shared / (10 * len(query_vectors)):.1%}" if name == "dense" else ""
        met = (
            f"< {TARGET:.0f} ({'met' if wall[0] < TARGET else 'missed'})" if name == "hybrid with the embedding" else ""
        )
        lines.append((name, f"{wall[0]:.1f}", f"{wall[1]:.1f}", f"{cpu:.1f}", recovered, met))
        console.print(lines[-1])
    heads = f"{bench.chunks:,} chunks", "median (ms)", "p95 (ms)", "CPU time (ms)", "recall@10 of exact", "target"
    return heads, lines


def time_queries(call: Callable[[int], object], count: int) -> tuple[tuple[float, float], float]:
    """Median and 95th percentile of a call's time, and its mean CPU time in all threads, in milliseconds."""
    call(0)
    seconds: list[float] = []
    cpu = time.process_time()
    for i in range(count):
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    cpu = time.process_time() - cpu
    median, high = np.percentile(seconds, [50, 95]).tolist()
    return (1e3 * median, 1e3 * high), 1e3 * cpu / count


def filler_passages(bench: Retrieval, embedder: Embedder) -> list[Passage]:
    """As many passages of the filler's articles as are needed, in chunks of 32 tokens that share 8."""
    passages: list[Passage] = []
    for i, text in enumerate(documents.read(bench.filler)):
        (tokens,) = embedder.token_offsets([text])
        for start, stop in chunks(text, tokens, size=32, overlap=8):
            passages.append(Passage(f"{i}.txt", 0, start, text[start:stop].strip()))
        if len(passages) >= bench.chunks:
            return passages[: bench.chunks]
    raise InputError(f"{bench.filler} has {len(passages):,} chunks, not {bench.chunks:,}: lower the number")


def similar_vectors(real: Tensor, count: int) -> Tensor:
    """Vectors of norm 1: x + u (y - x) + noise, x and y real ones, u uniform in 0 to 1/2, noise of norm 0.3."""
    rng = torch.Generator().manual_seed(0)
    first, second = (real[torch.randint(len(real), (count,), generator=rng)] for _ in range(2))
    mixed = first + torch.rand(count, 1, generator=rng) / 2 * (second - first)
    noise = torch.randn(mixed.shape, generator=rng) * 0.3 / real.shape[1] ** 0.5
    return torch.nn.functional.normalize(mixed + noise, dim=-1)
