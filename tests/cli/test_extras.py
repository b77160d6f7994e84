"""Without the packages of an extra: `import fgpt` works, and what needs one says in one line which to install."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fgpt.__main__ import PACKAGES

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

HIDE = """
import sys

class Hiding:
    \"\"\"A finder to which some packages are not installed.\"\"\"
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

hidden = {hidden!r}
sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
"""


def run_without(hidden: tuple[str, ...], code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE.format(hidden=hidden) + code, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def modules_of(extra: str) -> set[str]:
    """What is imported of the distributions of an extra."""
    distributions = {re.split(r"[>=\[]", each)[0].lower().replace("-", "_") for each in EXTRAS[extra]}
    return {
        module
        for module, owners in packages_distributions().items()
        if distributions & {owner.lower().replace("-", "_") for owner in owners}
    }


def test_the_packages_of_the_commands_are_those_of_the_extra():
    assert set(PACKAGES) <= modules_of("cli")
    assert len(PACKAGES) == len([each for each in EXTRAS["cli"] if not each.startswith("fgpt")])


@pytest.mark.slow
def test_the_library_needs_no_extra(tmp_path: Path):
    """Training, generation and files work; GGUF, Parquet, zstd and folders of datasets name their extra."""
    code = """
from pathlib import Path
import torch
import fgpt
from fgpt.data.dataset_folders import read_folder
from fgpt.data.records import read_records

nano, tokenizer, folder = fgpt.load("nano"), fgpt.tokenizer("nano"), Path(sys.argv[1])
adapters = fgpt.lora(nano, fgpt.key(0), rank=2)
tokens = torch.tensor([tokenizer.encode("Once upon a time there was a fox.")])
batch = fgpt.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(1, tokens.shape[1] - 1))
gradient = torch.func.grad(lambda a: fgpt.loss(fgpt.adapt(nano, a), batch))(adapters)
assert any(leaf.b.abs().sum() > 0 for leaf in gradient.values())
assert fgpt.generate(nano, tokens.tolist(), eos_token_id=tokenizer.eos_token_id, max_new_tokens=3)[0].tokens
fgpt.save_adapters(adapters, folder / "a.safetensors")
assert fgpt.load_adapters(folder / "a.safetensors", nano).keys() == adapters.keys()
fgpt.save_peft(adapters, nano, folder / "peft", base="nano")
assert fgpt.load_peft(folder / "peft", nano).keys() == adapters.keys()
for read in (
    lambda: fgpt.load(str(folder / "model.gguf")),
    lambda: list(read_records(folder / "rows.parquet")),
    lambda: list(read_records(folder / "rows.jsonl.zst")),
    lambda: read_folder(folder),
):
    try:
        print("no error:", read())
    except fgpt.InputError as err:
        print(err)
"""
    for name in ("model.gguf", "rows.parquet", "rows.jsonl.zst"):
        (tmp_path / name).write_bytes(b"something")
    hidden = tuple({module for extra in EXTRAS for module in modules_of(extra)})
    done = run_without((*hidden, "lm_eval"), code, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "GGUF files need gguf: pip install 'fgpt[gguf]'",
        "Parquet files need pyarrow: pip install 'fgpt[data]'",
        "files compressed by zstd need pyarrow: pip install 'fgpt[data]'",
        "folders of datasets need datasets: pip install 'fgpt[data]'",
    ]


def test_the_commands_name_their_extra():
    """Any of its packages: here all are missing but one."""
    hidden = PACKAGES[1:]
    done = run_without(hidden, "from fgpt.__main__ import main\nsys.argv[:] = ['fgpt', '--help']\nsys.exit(main())")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: the commands of fgpt need {', '.join(hidden)}: pip install 'fgpt[cli]'\n"


def test_tasks_name_their_extra():
    code = """
from fgpt.cli.evaluation.lm_eval_tasks import find
try:
    find("hellaswag", None)
except ValueError as err:
    print(err)
"""
    done = run_without(("lm_eval",), code)
    assert "pip install 'fgpt[eval]'" in done.stdout, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.slow
def test_documents_name_their_extra():
    """Each of the two packages, before anything is embedded."""
    code = "from fgpt.__main__ import main\nsys.exit(main())"
    for hidden in ("lancedb", "pypdf"):
        done = run_without((hidden,), code, "index", "tests")
        assert done.returncode == 2
        assert done.stderr == f"error: indexes of documents need {hidden}: pip install 'fgpt[retrieval]'\n"
