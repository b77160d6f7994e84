"""What works with what: each adapter over each base under each transform, beside plain autograd over dense weights.

The reference is written out here. It shares with the package the definition of attention, the definition of a format's
numbers and the hash that draws dropout's mask, and nothing else. Every weight is expanded to one fp32 matrix inside the
differentiated function, W' = diag(row) (W + s·B·A) diag(col), and torch.autograd differentiates that, twice where a
transform is of second order. What a cell computes by definition the reference computes too: over int8 the input of a
frozen matrix is rounded, straight through, and dropout masks the input of A.

The suite takes all eager cells, and of those that are traced or compiled a part, every kind and every base among them.
`PYTHONPATH=tests python -m builders.matrix` takes all of these too, which takes minutes, and prints its table.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from builders import ROOT
from builders.matrix import (
    BASES,
    EAGER,
    GPTQ,
    KINDS,
    TOLERANCE,
    TRACED,
    Mistake,
    Point,
    base_params,
    error,
    possible,
    reference_over,
    reference_results,
    run_transform,
    table,
    wrong_cells,
)

from fgpt.tree import tree_map

# ------------------------------------------------------------------------------------------------------- the comparison


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "on"), [(kind, on) for kind in KINDS for on in BASES if on != GPTQ or kind == "DoRA"])
def test_eager(kind: str, on: str):
    """GPTQ's codes are an nf4 matrix like any other: one kind of adapter on them."""
    assert not wrong_cells(kind, on, EAGER)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize(("kind", "on"), [(kind, list(BASES)[i % len(BASES)]) for i, kind in enumerate(KINDS)])
def test_traced(kind: str, on: str):
    """Each kind on one base."""
    assert not wrong_cells(kind, on, TRACED, n_layer=1)


IN_ONE_PROCESS = """
import json, sys
sys.path.insert(0, "tests")
from builders.matrix import BASES, COMPILED, KINDS, wrong_cells
bases, found = list(BASES), {}
for i, kind in enumerate(KINDS):
    for j, name in enumerate(COMPILED):
        on = bases[(i + 2 * j) % len(bases)]
        found |= {f"{kind}, {on}, {x}": why for x, why in wrong_cells(kind, on, [name], n_layer=1).items()}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiled():
    """Each kind on one base for each transform: tracing takes seconds, and twice that for a second block.

    In a process of its own: the whole-package check of these tests is what a compiler cannot trace.
    """
    done = subprocess.run([sys.executable, "-c", IN_ONE_PROCESS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout) == {}


@pytest.mark.parametrize("on", BASES)
def test_a_wrong_gradient_is_noticed(on: str):
    frozen = base_params(on, 2)
    p = Point("LoRA and LayerNorm", frozen)
    want = reference_results(reference_over(frozen), p)["grad"]
    assert error(want, want) == 0
    assert error(tree_map(lambda x: 1.1 * x, want), want) > TOLERANCE[on]
    assert error({path: x for path, x in want.items() if path != "ln_f.b"}, want) > TOLERANCE[on]
    assert error(want | {"ln_f.b": math.nan * want["ln_f.b"]}, want) > TOLERANCE[on]
    for path in want:
        assert error(want | {path: tree_map(torch.zeros_like, want[path])}, want) > TOLERANCE[on]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("DoRA", "norm not detached"),
        ("IA3", "bias not scaled"),
        ("LoRA", "not rounded"),
        ("LoRA with dropout", "nothing dropped"),
        ("LoRA on q, v, tied wte", "untied"),
    ],
)
def test_a_wrong_meaning_is_noticed(kind: str, mistake: Mistake):
    for on in BASES if mistake != "not rounded" else ["int8"]:
        frozen = base_params(on, 2)
        p = Point(kind, frozen)
        want = reference_results(reference_over(frozen, mistake), p)
        for name in ("grad", "vmap(grad)", "jvp(grad)"):
            assert error(run_transform(name, on, frozen, p), want[name]) > TOLERANCE[on]


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_compatibility_page_has_the_table():
    claimed = table({(kind, on): len(possible(kind, on)) for kind in KINDS for on in BASES})
    print(f"\n{claimed}")
    assert claimed in (ROOT / "docs" / "compatibility.md").read_text()
