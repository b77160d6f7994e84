"""A record of FinQA."""

from typing import Any

FINQA_RECORD: dict[str, Any] = {
    "pre_text": ["sales rose in 2012 .", "all sums are in millions ."],
    "table": [["", "2011", "2012"], ["sales", "$ 90", "$ 99"], ["net\nloss", "( 3 )", "( 2 )"]],
    "post_text": ["see note 4 ."],
    "qa": {"question": "by how much did sales rise?", "answer": "10%", "exe_ans": 0.1, "program": "divide(9, 90)"},
}
