"""docs/peft_errors.md says of the installed PEFT what its functions measure."""

import re
from typing import Any

import peft
import pytest
from builders import ROOT

PAGE = (ROOT / "docs" / "peft_errors.md").read_text()
ROWS = re.findall(r"^\| \[#(\d+)\].*\| (right|wrong) \|", PAGE, flags=re.M)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the page's Python defines, run from top to bottom."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
            exec(compile(code, "peft_errors.md", "exec"), names)
    return names


def test_the_table_is_about_the_installed_version():
    (version,) = re.findall(r"\| PEFT ([\d.]+) \|", PAGE)
    assert version == peft.__version__, "measure again, and correct the column"


@pytest.mark.parametrize(("issue", "status"), ROWS, ids=[issue for issue, _ in ROWS])
def test_what_the_table_says_is_measured(names: Any, issue: str, status: str):
    error = names[f"peft_{issue}"]()
    assert error < 1e-5 if status == "right" else error > 0.1


@pytest.mark.parametrize("option", ["use_rslora", "use_dora", "lora_bias"])
def test_a_combination_of_one_by_kind(names: Any, option: str):
    assert names["peft_3761"](**{option: True}) > 0.1
    assert names["peft_3761"](lora_alpha=4) < 1e-5


def test_each_report_is_in_the_table():
    assert [issue for issue, _ in ROWS] == ["3531", "3608", "3761", "3737"]
