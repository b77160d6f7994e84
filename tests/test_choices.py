"""A word that is none of those to choose from is an error where it is given, and never taken for another."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from dataclasses import replace
import fgpt
from fgpt.data.mixtures import MixtureSource, mix
from fgpt.io.gguf_writer import save_gguf

config = fgpt.Config(n_layer=1, n_head=2, d_model=8, n_ctx=16, vocab_size=11, d_mlp=16)
params = fgpt.init(config, fgpt.key(0))
adapters = fgpt.lora(params, fgpt.key(0), rank=2)
calls = {
    "activation": lambda: fgpt.init(replace(config, activation="other"), fgpt.key(0)),
    "norm_type": lambda: fgpt.init(replace(config, norm_type="other"), fgpt.key(0)),
    "n_norms": lambda: fgpt.init(replace(config, n_norms="other"), fgpt.key(0)),
    "method": lambda: fgpt.combine(params, [adapters, adapters], method="other"),
    "format": lambda: fgpt.quantize(params, "other"),
    "adjust_lr": lambda: fgpt.muon(0.1, adjust_lr="other"),
    "unit": lambda: mix([MixtureSource("a", 1.0, 10, 100)], "other"),
    "layout": lambda: fgpt.save(params, "model", layout="other"),
    "type": lambda: save_gguf(params, "model.gguf", type="other"),
}
for name, call in calls.items():
    try:
        print(name, "takes", call())
    except fgpt.InputError as err:
        assert str(err).startswith(f"{name} is 'other': expected one of "), err
        print(name, "refuses")
"""
"""A process of its own: here beartype, which users do not have, would refuse the words first."""


def test_another_word(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refuses") == len(done.stdout.splitlines()) == 9, done.stdout
    assert not any(tmp_path.iterdir())
