"""Passages of documents in the prompts of training: found for each row, and put into it as generation does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fgpt.cli.console import console
from fgpt.cli.devices import resolve_device
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import batch_pieces
from fgpt.data.rows import InstructionRow
from fgpt.data.tokenization import Encoding
from fgpt.extras import require_extra
from fgpt.recipes import InstructionRecipe
from fgpt.retrieval.index import MANIFEST
from fgpt.retrieval.passages import augment_to_fit, question_of
from fgpt.retrieval.retriever import Retriever, open_retriever

ROWS, PASSAGES, DROPPED, UNASKED = "rows", "passages", "dropped", "without a question"


def row_passages(recipe: InstructionRecipe, encoding: Encoding) -> "RowPassages | None":
    """What puts passages into the rows of a recipe; None if it names no documents. Raises InputError as
    `open_retriever` does.
    """
    if recipe.documents is None:
        return None
    require_extra("retrieval", "indexes of documents", "lancedb")
    retriever = open_retriever(recipe.documents, recipe.num_passages, device=resolve_device(recipe.device))
    return RowPassages(retriever, encoding)


@dataclass(frozen=True)
class RowPassages:
    """Puts passages into rows, as many as leave the row with its answer within a sequence."""

    retriever: Retriever
    encoding: Encoding
    counts: Counter[str] = field(default_factory=Counter[str])
    """What was done, which `report` prints."""

    def __call__(self, rows: Sequence[InstructionRow]) -> list[InstructionRow]:
        """The rows with their passages; those without a question as they are."""
        questions = [question_of(row) for row in rows]
        results = iter(self.retriever.find([question for question in questions if question is not None]))
        augmented_rows: list[InstructionRow] = []
        for row, question in zip(rows, questions, strict=True):
            if question is None:
                self.counts[UNASKED] += 1
                augmented_rows.append(row)
                continue
            passages = next(results)
            augmented = augment_to_fit(row, passages, length=self._length, max_length=self.encoding.max_seq_len)
            self.counts.update({ROWS: 1, PASSAGES: len(passages), DROPPED: augmented.num_dropped})
            augmented_rows.append(augmented.row)
        return augmented_rows

    def _length(self, row: InstructionRow) -> int:
        """Tokens of a row's longest example."""
        (examples,) = batch_pieces([row], self.encoding.template, self.encoding.tokenizer)
        return max(len(example.tokens) for example in encode_pieces(examples, self.encoding.tokenizer))

    @property
    def identity(self) -> str:
        """What the rows that it makes follow from, besides the rows: the index, and the length of a sequence."""
        manifest = (self.retriever.index.folder / MANIFEST).read_text(encoding="utf-8")
        return f"{manifest} {self.retriever.num_passages} {self.encoding.max_seq_len}"

    def report(self) -> None:
        """Print how many passages were put into rows, and how many had no room."""
        counts = self.counts
        if counts[ROWS]:
            line = f"{counts[PASSAGES] - counts[DROPPED]:,} passages in the prompts of {counts[ROWS]:,} rows"
            room = f"; dropped {counts[DROPPED]:,} for which --max-seq-len {self.encoding.max_seq_len} has no room"
            console.print(line + room * bool(counts[DROPPED]), soft_wrap=True)
        if counts[UNASKED]:
            console.print(f"{counts[UNASKED]:,} rows have no question, or a page of their own: without passages")
