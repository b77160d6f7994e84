"""`fgpt export`: what is written computes as the run does, and says how it is prompted."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, tokens
from builders.command_line import training_options
from builders.ollama import modelfile_parts, ollama_prompt
from builders.runs import one_line
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fgpt
from fgpt import extras
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.tasks import task_type
from fgpt.data.prompt_templates import InstructionRow, template
from fgpt.io.gguf_header import read_header

CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
GPTJ: dict[str, Any] = {
    "interleaved": True,
    "parallel_residual": True,
    "n_norms": 1,
    "rotary_dim": 4,
    "tie_word_embeddings": False,
    "biases": frozenset({"up", "down", "norm", "head"}),
}
TOKENS = tokens(4096, 2, 12)
ASK = [{"role": "user", "content": "Say 3."}]


def tuned(folder: Path) -> fgpt.GPT:
    recipe: Any = run_dir.read_run(folder)
    return run_dir.load_tuned(folder, task_type(recipe).load_base(recipe))


@pytest.fixture(scope="module")
def runs(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports")
    chat = out / "chat-base"
    fgpt.save(fgpt.load(project / "base"), chat, like="nano")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    cfg = dataclasses.replace(fgpt.load(chat).cfg, **GPTJ)
    fgpt.save(fgpt.init(cfg, fgpt.key(0)), out / "gptj-base", like="nano")
    kinds = {
        "lora": ["--adapter.kind", "lora", "--template", "tulu"],
        "full": ["--adapter.kind", "full"],
        "words": ["--new-tokens", "<|user|>"],
        "int8": ["--quantize", "int8"],
        "bias": ["--adapter.kind", "bias"],
        "dora": ["--adapter.kind", "dora"],
        "chat": ["--base", str(chat), "--template", "auto"],
        "gptj": ["--base", str(out / "gptj-base")],
    }
    for name, options in kinds.items():
        common = [*training_options(project), "--compare-prompts", "0", "--lr", "1e-2", "--out", str(out)]
        assert main(["train", *common, *options, "--name", name]) == 0
    return out


def export(run: Path, to: str, *options: str) -> Path:
    """The folder of an export, in its usual place."""
    kinds = [x for x in options if not x.startswith("-")]
    folder = run / "-".join(["export", to, *kinds])
    if not folder.exists():
        assert main(["export", str(run), "--to", to, *options]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "full", "words", "bias", "dora"])
def test_merged(name: str, runs: Path):
    folder = export(runs / name, "merged")
    expected = fgpt.apply(tuned(runs / name), TOKENS)
    close(fgpt.apply(fgpt.load(folder), TOKENS), expected, 1e-5)
    with torch.no_grad():
        close(AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits, expected, 1e-5)
    assert ModelCard((folder / "README.md").read_text()).data["library_name"] == "transformers"
    ids = AutoTokenizer.from_pretrained(folder).encode("<|user|> hi")
    assert (4096 in ids) == (name == "words")


def test_peft(runs: Path, project: Path):
    folder = export(runs / "lora", "peft")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project / "base"), folder)
    with torch.no_grad():
        close(model(TOKENS).logits, fgpt.apply(tuned(runs / "lora"), TOKENS), 1e-5)


@pytest.mark.parametrize("name", ["lora", "full", "words", "bias"])
def test_gguf(name: str, runs: Path):
    folder = export(runs / name, "gguf", "--type", "f32")
    path = folder / f"{name}-F32.gguf"
    close(fgpt.apply(fgpt.load(path), TOKENS), fgpt.apply(tuned(runs / name), TOKENS), 1e-5)
    assert fgpt.tokenizer(path).encode_special("<|user|>")[:1] == ([4096] if name == "words" else [27])
    fields = read_header(path).fields
    assert fields["general.name"] == name
    prompt = template("tulu" if name == "lora" else "plain").prompt(InstructionRow("Say 3."))
    assert fgpt.tokenizer(path).render_chat_template(ASK) == prompt


def test_the_default_type_is_f16(runs: Path):
    path = export(runs / "lora", "gguf") / "lora-F16.gguf"
    assert read_header(path).entries["blk.0.attn_qkv.weight"].kind == "F16"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_gguf_of_a_quantized_base(base: str, runs: Path, project: Path):
    folder = export(runs / "int8", "gguf", "--type", "f32", "--merge-base", base)
    assert main(["merge", str(runs / "int8"), "--merge-base", base]) == 0
    expected = fgpt.apply(fgpt.load(runs / "int8" / f"merged-{base}"), TOKENS)
    close(fgpt.apply(fgpt.load(folder / "int8-F32.gguf"), TOKENS), expected, 1e-6)


@pytest.mark.parametrize("name", ["lora", "int8", "chat"])
def test_the_lora_alone(name: str, runs: Path):
    folder = export(runs / name, "gguf-lora")
    file = read_header(folder / f"{name}-LoRA.gguf")
    (rank, _) = file.entries["blk.0.ffn_up.weight.lora_a"].shape
    assert file.fields["adapter.lora.alpha"] / rank == 32 / 16


def test_ollama(runs: Path, capsys: pytest.CaptureFixture[str]):
    folder = export(runs / "lora", "ollama", "--type", "q8_0")
    said = capsys.readouterr().err
    assert f"next: ollama create lora -f {folder}/Modelfile" in said
    parts = modelfile_parts((folder / "Modelfile").read_text())
    assert parts["FROM"] == ["./model.gguf"]
    assert parts["PARAMETER stop"] == ["<|endoftext|>"]
    expected = template("tulu").prompt(InstructionRow("Say 3."))
    assert ollama_prompt(parts["TEMPLATE"][0], ASK) == expected
    assert read_header(folder / "model.gguf").entries["token_embd.weight"].kind == "F16"  # rows of 16


def test_ollama_of_a_chat_model(runs: Path):
    folder = export(runs / "chat", "ollama")
    parts = modelfile_parts((folder / "Modelfile").read_text())
    expected = "<user>Say 3.\n<assistant>"
    assert ollama_prompt(parts["TEMPLATE"][0], ASK) == expected
    assert read_header(folder / "model.gguf").fields["tokenizer.chat_template"] == CHAT


def test_a_chat_template_without_pieces(runs: Path, capsys: pytest.CaptureFixture[str]):
    config = runs / "chat-base" / "tokenizer_config.json"
    before = config.read_text()
    odd = "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}"
    config.write_text(json.dumps(json.loads(before) | {"chat_template": odd}))
    folder = runs / "odd"
    assert main(["export", str(runs / "chat"), "--to", "ollama", "--out", str(folder)]) == 0
    config.write_text(before)
    assert "has no TEMPLATE" in capsys.readouterr().err
    assert modelfile_parts((folder / "Modelfile").read_text()).keys() == {"FROM", "PARAMETER stop"}


def test_llama_cpp_answers_as_the_run_does(runs: Path):
    """Greedily, from the prompt in the file's own chat template."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = export(runs / "words", "gguf", "--type", "f32") / "words-F32.gguf"
    model = llama_cpp.Llama(str(path), n_ctx=96, verbose=False, n_threads=1)
    text = template("plain").prompt(InstructionRow("Say 3."))
    ours = fgpt.tokenizer(path)
    (expected,) = fgpt.generate(tuned(runs / "words"), [ours.encode(text)], eos_token_id=4095, max_new_tokens=12)
    found = model.create_completion(text, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    assert found == ours.decode(expected.tokens)


ERRORS = {
    "no format": (["lora"], "nothing to do: give --to peft|merged|gguf|gguf-lora|ollama|hub"),
    "another format": (["lora", "--to", "gguff"], "(did you mean gguf?)"),
    "no run": (["nowhere", "--to", "gguf"], "no trained run 'nowhere'"),
    "no format of PEFT's": (["bias", "--to", "peft"], "PEFT has no format for what"),
    "no adapter": (["full", "--to", "peft"], "has no adapter: --to merged writes it"),
    "no LoRA": (["dora", "--to", "gguf-lora"], "this is DoRA: merge it and write the model; --to gguf does both"),
    "all parameters": (["full", "--to", "gguf-lora"], "has no adapter: --to gguf writes it"),
    "a quantized base": (["int8", "--to", "gguf"], "was trained over int8: give --merge-base dequantized"),
    "a type of no file": (["lora", "--to", "peft", "--type", "f16"], "--type f16 is of gguf and ollama"),
    "a base of nothing": (
        ["lora", "--to", "peft", "--merge-base", "original"],
        "--merge-base original is of a merged model",
    ),
    "GPT-J": (["gptj", "--to", "ollama"], "llama.cpp has nothing that computes this gptj"),
    "a classifier": (["told[b]", "--to", "gguf"], "is a classifier, which no GGUF file holds"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name: str, runs: Path, project: Path, capsys: pytest.CaptureFixture[str]):
    (run, *options), message = ERRORS[name]
    folder = project / "runs" / run if run == "told[b]" else runs / run if run != "nowhere" else Path(run)
    capsys.readouterr()
    assert main(["export", str(folder), *options, "--out", str(runs / "never")]) == 2
    assert message in one_line(capsys)
    assert not (runs / "never").exists()
    assert not list(runs.glob(".never*"))


def test_a_run_that_has_not_finished(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(runs / "lora", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "status.json").write_text('{"state": "interrupted", "steps": 3}')
    assert main(["export", str(tmp_path / "run"), "--to", "gguf"]) == 2
    assert "has not finished; resume it" in one_line(capsys)


def test_a_folder_that_exists(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", str(runs / "lora"), "--to", "peft", "--out", str(tmp_path)]) == 2
    assert "exists: give another --out, or remove it" in one_line(capsys)


def test_without_gguf(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert main(["export", str(runs / "lora"), "--to", "ollama", "--out", str(runs / "never")]) == 2
    assert "GGUF files need gguf: pip install 'fgpt[gguf]'" in one_line(capsys)
    assert not (runs / "never").exists()
