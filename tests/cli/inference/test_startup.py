"""What `fgpt generate` imports: the first token waits for it. Seconds depend on the machine, so modules are counted."""

import json
import subprocess
import sys
from pathlib import Path

from builders import ROOT

NOT_NEEDED = (
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "rouge_score",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "torch._dynamo",
    "torch._inductor",
    "transformers",
    "yaml",
)


def test_generate_imports_what_it_needs(project: Path):
    args = ["generate", str(project / "runs" / "it[b]"), "Say 3.", "--max-new-tokens", "2"]
    code = (
        "import sys, json; from fgpt.cli.main import main; code = main(json.loads(sys.argv[1])); "
        "print(json.dumps([code, [m for m in json.loads(sys.argv[2]) if m in sys.modules]]), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, json.dumps(args), json.dumps([*NOT_NEEDED, "torch"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == [0, ["torch"]]
