"""The example of curvature: what it measures of the embedded model is exact in fp64, and its tiny form prints it."""

import re

import pytest

from experiments.research import curvature


def figure(line: str, name: str) -> float:
    match = re.search(rf"{name}:? (-?\d\S*?)(,|$)", line)
    assert match is not None, f"no {name} in: {line}"
    return float(match[1])


@pytest.mark.slow
def test_the_tiny_form_is_exact_where_it_says_so(capsys: pytest.CaptureFixture[str]):
    curvature.main(["--tiny"])
    first, _, lanczos, product, fp32, nf4, int8, _, times = capsys.readouterr().out.splitlines()
    assert figure(first, "elements, loss") > 0
    assert figure(lanczos, "fp64") < 1e-6
    assert 1e-9 < figure(lanczos, "fp32") < 1e-2
    assert figure(product, "relative error") < 1e-6
    for name in ("hessian_error", "gauss_newton_error"):
        assert figure(fp32, name) == 0  # its own values
        assert 0 < figure(nf4, name) < 1e-10
        assert 1e-4 < figure(int8, name) < 0.5
    assert figure(fp32, "smallest") < 0 < figure(fp32, "gauss_newton")
    assert figure(times, "ggn operator") > 0
