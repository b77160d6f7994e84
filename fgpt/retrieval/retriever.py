"""An index with its embedder: passages for questions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fgpt._typing import StrPath
from fgpt.retrieval.embedder import Embedder, load_embedder
from fgpt.retrieval.index import DocumentIndex, Passage, open_index
from fgpt.retrieval.ranking import search_vector


@dataclass(frozen=True)
class Retriever:
    """What finds the passages of a prompt."""

    index: DocumentIndex
    embedder: Embedder
    num_passages: int
    """For each question, at most."""

    def find(self, questions: Sequence[str]) -> list[list[Passage]]:
        """The passages for each question, the best first, by hybrid search."""
        if not questions:
            return []
        vectors = self.embedder.embed(questions).tolist()
        return [
            search_vector(self.index, vector, question, count=self.num_passages)
            for vector, question in zip(vectors, questions, strict=True)
        ]


def open_retriever(folder: StrPath, num_passages: int, *, device: torch.device | str = "cpu") -> Retriever:
    """The retriever of an index, with the embedder that the index names.

    Args:
        folder: The index.
        num_passages: For each question, at most.
        device: Where questions are embedded.

    Raises:
        InputError: if there is no such index, or its embedder is not there, or is another by now.
    """
    index = open_index(folder)
    embedder = load_embedder(index.embedder, device=device)
    index.check_embedder(embedder)
    return Retriever(index, embedder, num_passages)
