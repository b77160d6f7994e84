"""How a model card says that its files are loaded: Python for fgpt, PEFT and transformers, commands for llama.cpp.

FOLDER stands for the folder of the files or the name of their repository, BASE for a base that no hub has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fgpt.cli.model_card.metadata import Form, hub_model

Fields = Mapping[str, Any]


def usage(run: Fields, form: Form, classes: Sequence[str], *, fused: bool) -> str:
    """How the files are loaded, by each library that reads them.

    Args:
        run: The fields of the run's recipe.
        form: Of the saved files.
        classes: Of a classifier.
        fused: Whether the adapter is on q, k and v as one matrix.
    """
    parts = [f"### {name}\n\n{code}" for name, code in snippets(run, form, classes, fused=fused)]
    placeholders: list[str] = []
    if any("FOLDER" in part for part in parts):
        placeholders.append("`FOLDER` is the folder of these files, for PEFT and transformers also their repository.")
    if any("BASE" in part for part in parts):
        placeholders.append(_where_is_base(str(run["base"])))
    return "\n\n".join(filter(None, [" ".join(placeholders), *parts]))


def snippets(run: Fields, form: Form, classes: Sequence[str], *, fused: bool) -> list[tuple[str, str]]:
    """The name of each library that reads the files, and the code that loads them; see `usage`."""
    if form == "gguf":
        return [("fgpt", _python('import fgpt\n\nparams = fgpt.load("FILE.gguf")')), ("llama.cpp", _gguf_command(""))]
    if form == "ollama":
        return [("Ollama", "```\nollama create NAME -f Modelfile\nollama run NAME\n```")]
    if form == "gguf-lora":
        return [("llama.cpp", _gguf_command(" --lora FILE.gguf"))]
    if form in ("peft", "adapters"):
        base = _base_of(run, classes, fused=fused)
        code = [("fgpt", _python(f"{base}\nparams = fgpt.adapt(base, {_adapters(form)})"))]
        return code + ([("PEFT", _python(_peft(run, classes)))] if form == "peft" else [])
    code = [("fgpt", _python('import fgpt\n\nparams = fgpt.load("FOLDER")\ntokenizer = fgpt.tokenizer("FOLDER")'))]
    return code + ([("transformers", _python(_transformers(classes)))] if form == "transformers" else [])


def _where_is_base(base: str) -> str:
    if base == "nano":
        return '`BASE` is what `fgpt.save(fgpt.load("nano"), "BASE", like="nano")` writes.'
    return f"`BASE` is the folder of the base, `{base}`."


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _gguf_command(adapter: str) -> str:
    model = "BASE.gguf" if adapter else "FILE.gguf"
    return f'```\nllama-cli -m {model}{adapter} -p "PROMPT"\n```'


def fgpt_base(run: Fields) -> str:
    """What `fgpt.load` takes for the base: a name that every fgpt knows, or BASE."""
    base = str(run["base"])
    return base if base == "nano" or hub_model(base) else "BASE"


def _base_of(run: Fields, classes: Sequence[str], *, fused: bool) -> str:
    """The lines that make the base as it was in training."""
    base, quantize = fgpt_base(run), run.get("quantize")
    options = {"rotated-int8": ', quantize="int8", rotate=True', None: ""}.get(quantize, f', quantize="{quantize}"')
    lines = ["import fgpt", "", f'base = fgpt.load("{base}"{options})', f'tokenizer = fgpt.tokenizer("{base}")']
    if run.get("new_tokens"):
        lines.append(f"base, tokenizer, _ = fgpt.add_tokens(base, tokenizer, {list(run['new_tokens'])})")
    if fused:
        lines.append("base = fgpt.fuse_qkv(base)")
    if classes:
        lines.append(f"base = fgpt.with_classification_head(base, {len(classes)}, fgpt.key(0))")
    return "\n".join(lines)


def _adapters(form: Form) -> str:
    if form == "peft":
        return 'fgpt.load_peft("FOLDER", base)'
    return 'fgpt.load_adapters("FOLDER/adapters.safetensors", base)'


def _peft(run: Fields, classes: Sequence[str]) -> str:
    name, options = _auto_class(classes)
    base = hub_model(str(run["base"])) or "BASE"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {name}, AutoTokenizer",
        "",
        f'base = {name}.from_pretrained("{base}"{options})',
        f'tokenizer = AutoTokenizer.from_pretrained("{"FOLDER" if run.get("new_tokens") else base}")',
    ]
    if run.get("new_tokens"):
        lines.append("base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))")
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "FOLDER")'])


def _transformers(classes: Sequence[str]) -> str:
    name, _ = _auto_class(classes)
    return "\n".join(
        [
            f"from transformers import {name}, AutoTokenizer",
            "",
            f'model = {name}.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    )


def _auto_class(classes: Sequence[str]) -> tuple[str, str]:
    """The class of transformers, and its further arguments for a base without a head."""
    if classes:
        return "AutoModelForSequenceClassification", f", num_labels={len(classes)}"
    return "AutoModelForCausalLM", ""
