"""`fgpt merge` says what it changed."""

import json
from pathlib import Path

import pytest
import torch
from builders.runs import one_line

import fgpt
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.training.build import load_base


@pytest.mark.slow
def test_merge_says_what_it_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [
        "--steps",
        "8",
        "--micro-batch-size",
        "1",
        "--warmup-steps",
        "1",
        "--compare-prompts",
        "0",
        "--out",
        str(tmp_path),
    ]
    assert main(["train", "qlora-nano", *options]) == 0
    out = tmp_path / "qlora-nano"
    capsys.readouterr()
    assert main(["merge", str(out)]) == 2
    assert "was trained over nf4: give --merge-base dequantized" in one_line(capsys)
    assert not list(out.glob("merged*"))
    tokens = torch.randint(0, 4096, (2, 30), generator=fgpt.key(0))
    tuned = fgpt.apply(run_dir.load_tuned(out, load_base(run_dir.read_run(out))), tokens)
    for onto, least, most in (("dequantized", 0.0, 1e-3), ("original", 0.1, 50.0)):
        assert main(["merge", str(out), "--merge-base", onto]) == 0
        report = json.loads((out / f"merged-{onto}" / "merge.json").read_text())
        merged = fgpt.load(str(out / f"merged-{onto}"))
        assert least <= report["read back"]["logit"] <= most
        assert least <= float((fgpt.apply(merged, tokens) - tuned).abs().max()) <= most
        assert f"{report['read back']['logit']:.3g}" in capsys.readouterr().err
    assert {p.name for p in out.glob("merged*")} == {"merged-dequantized", "merged-original"}  # each is still there
