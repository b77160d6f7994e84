"""Causal tracing of the embedded model: one vmap is the loop, and the table says what must be so."""

import pytest
import torch
from builders import close

from experiments.research import causal_tracing as C


def test_one_vmap_is_the_loop_and_the_name_moves_from_its_position_to_the_last():
    tracing, texts = C.build(C.SHORT_PROMPT)
    margins = C.margins_by_vmap(tracing)
    close(margins, C.margins_by_loop(tracing), 1e-4)
    table, name = C.effects(tracing, margins), texts.index(C.NAME)
    rows, before_name = [0, -1], torch.arange(len(texts)) < name
    expected = torch.zeros(2, len(texts))
    expected[0, name], expected[1, -1] = 1.0, 1.0  # all of the prompts' difference, and all that the head reads
    close(table[rows], expected, 1e-4)
    assert not table[:, before_name].abs().gt(1e-4).any()  # causal: these states are those of the other prompt, too
    assert table[1, name] > 0.9
    assert table[2, name] > 0.3
    assert table[2, -1] > 0.3


@pytest.mark.slow
def test_the_tiny_form_prints_the_table_and_the_ratio(capsys: pytest.CaptureFixture[str]):
    C.main(["--tiny"])
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["embed", "block", "0", "block", "1", "block", "2", "block", "3"]
    assert [row.split()[0] for row in rows] == ["There", "was", "a", "fox", "named", "Tim", ".", "One", "day", ","]
    assert rows[5].split()[1] == rows[-1].split()[-1] == "1.00"
    assert last.startswith("50 patched passes: vmap ")
