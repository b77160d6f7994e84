"""A sample of test_matrix's cells on a tiny model of every other family, beside transformers' own model of it.

The reference is transformers' model, called with weights that are expanded from what the adapter means, and plain
autograd through it.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from builders import ROOT
from builders.matrix import BASES, EAGER, KINDS, TOLERANCE, TRANSFORMS, Point, error, reference_results
from builders.matrix_families import SIZES, model_of_family, reference_over, wrong_cells_of_family

CELLS = [
    ("LoRA", "fp32"),
    ("DoRA", "fp32"),
    ("IA3", "fp32"),
    ("full", "fp32"),
    ("LoRA and LayerNorm", "nf4"),
    ("DoRA", "rotated nf4"),
    ("LoRA", "nf4 by GPTQ"),
    ("LoRA", "blockwise8"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "on"), CELLS)
@pytest.mark.parametrize("name", SIZES)
def test_eager(name: str, kind: str, on: str):
    assert kind in KINDS
    assert not wrong_cells_of_family(name, kind, on, EAGER)


COMPILED = """
import json, sys
sys.path.insert(0, "tests")
from builders.matrix_families import wrong_cells_of_family
cells = ("gptj", "nf4"), ("llama", "fp32")
print(json.dumps({name: wrong_cells_of_family(name, "LoRA", on, ["compile(grad)"]) for name, on in cells}))
"""


@pytest.mark.slow
def test_compiled():
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"gptj": {}, "llama": {}}


def test_a_wrong_model_is_noticed():
    """The cells of a model whose rotation has another base differ by far more than their tolerance."""
    model, plain = model_of_family("llama")
    frozen = BASES["fp32"](plain)
    reference = reference_over(frozen, model)
    p = Point("LoRA", frozen, reference)
    want = reference_results(reference, p)
    odd = replace(frozen, cfg=replace(frozen.cfg, rope_theta=500.0))
    for transform in ("grad", "jvp(grad)", "vmap(grad)"):
        assert error(TRANSFORMS[transform](odd, p), want[transform]) > 100 * TOLERANCE["fp32"]
