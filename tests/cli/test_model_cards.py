"""README.md of saved folders: metadata that the Hub reads, a command that makes the run again, code that loads it."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import close, tokens
from builders.command_line import training_options
from builders.gguf_files import MODELS, random_model, write_gguf
from huggingface_hub import ModelCard

import fgpt
from fgpt import recipes
from fgpt.cli import run_dir
from fgpt.cli.main import main
from fgpt.cli.model_card.card import run_card
from fgpt.cli.model_card.metadata import base_license, hub_datasets, metadata
from fgpt.cli.options import parse
from fgpt.cli.tasks import task_type

TOKENS = tokens(4096, 2, 12)


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


def code_of(card: ModelCard, library: str, **paths: Path) -> dict[str, Any]:
    """The names that the code for a library leaves, with its placeholders filled in."""
    (code,) = re.findall(rf"### {library}\n\n```python\n(.*?)```", card.text, flags=re.S)
    for name, path in paths.items():
        code = code.replace(f'"{name}', f'"{path}')
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def tuned(folder: Path) -> fgpt.GPT:
    recipe: Any = run_dir.read_run(folder)
    return run_dir.load_tuned(folder, task_type(recipe).load_base(recipe))


def test_the_card_of_an_adapter(project: Path):
    run = project / "runs" / "it[b]"
    card = card_of(run / "adapter")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fgpt", "sft", "lora"],
    }
    assert str(project) not in card.content
    assert ".../base" in card.text
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"| training loss of the last tenth of the steps | {losses[-1]:.4g} |" in card.text
    scores = json.loads((run / "compare.json").read_text())["scores"]
    name = "held-out response loss (nats per token)"
    assert f"| {name} | " + " | ".join(f"{side[name]:.4g}" for side in scores.values()) + " |" in card.text
    expected = fgpt.apply(tuned(run), TOKENS)
    names = code_of(card, "fgpt", BASE=project / "base", FOLDER=run / "adapter")
    assert torch.equal(fgpt.apply(names["params"], TOKENS), expected)
    names = code_of(card, "PEFT", BASE=project / "base", FOLDER=run / "adapter")
    with torch.no_grad():
        close(names["model"](TOKENS).logits, expected, 1e-5)


def test_the_command_makes_the_run_again(project: Path):
    run = project / "runs" / "it[b]"
    (command,) = re.findall(r"```\n(fgpt train .*)\n```", card_of(run / "adapter").text)
    _, _, name, *options = shlex.split(command)
    recipe: Any = run_dir.read_run(run)
    again = parse(type(recipe), options, recipes.find(name), "fgpt train")
    ours = {"base": ".../base", "data": (".../rows.json",), "out": Path(".../runs")}
    assert again == dataclasses.replace(recipe, **ours)


def test_the_card_of_a_classifier(project: Path):
    run = project / "runs" / "told[b]"
    card = card_of(run / "adapter")
    assert card.data["pipeline_tag"] == "text-classification"
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert f"| accuracy | {' | '.join(format(side['accuracy'], '.4g') for side in scores.values())} |" in card.text
    names = code_of(card, "fgpt", BASE=project / "base", FOLDER=run / "adapter")
    assert torch.equal(fgpt.apply(names["params"], TOKENS), fgpt.apply(tuned(run), TOKENS))


@pytest.fixture(scope="module")
def runs(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cards")
    kinds = {
        "full": ["--adapter.kind", "full"],
        "fused": ["--adapter.target", r"blocks\..*\.(qkv|o)"],
        "words": ["--adapter.kind", "dora", "--new-tokens", "<|user|>", "--quantize", "int8"],
        "bias": ["--adapter.kind", "bias"],
    }
    for name, options in kinds.items():
        common = [*training_options(project), "--compare-prompts", "0", "--lr", "1e-2", "--out", str(out)]
        assert main(["train", *common, *options, "--name", name]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "fused", "words", "bias"])
def test_the_code_loads_what_was_trained(name: str, runs: Path, project: Path):
    run = runs / name
    folder = run / ("model" if name == "full" else "adapter")
    names = code_of(card_of(folder), "fgpt", BASE=project / "base", FOLDER=folder)
    close(fgpt.apply(names["params"], TOKENS), fgpt.apply(tuned(run), TOKENS), 1e-6)
    if name == "full":
        names = code_of(card_of(folder), "transformers", FOLDER=folder)
        with torch.no_grad():
            close(names["model"](TOKENS).logits, fgpt.apply(tuned(run), TOKENS), 1e-5)
    if name == "words":
        assert names["tokenizer"].encode_special("<|user|>") == [4096]
        names = code_of(card_of(folder), "PEFT", BASE=project / "base", FOLDER=folder)
        assert names["tokenizer"].convert_tokens_to_ids("<|user|>") == 4096


def test_cards_of_merged_combined_and_quantized_models(runs: Path, project: Path, tmp_path: Path):
    assert main(["merge", str(runs / "bias")]) == 0
    card = card_of(runs / "bias" / "merged")
    names = code_of(card, "transformers", FOLDER=runs / "bias" / "merged")
    with torch.no_grad():
        close(names["model"](TOKENS).logits, fgpt.apply(tuned(runs / "bias"), TOKENS), 1e-5)
    assert card.data.to_dict()["library_name"] == "transformers"
    assert main(["combine", "full", "bias", "--name", "both", "--out", str(runs), "--weights", "0.5", "-1"]) == 0
    text = card_of(next((runs / "both").glob("*/README.md")).parent).text
    assert "combine .../full .../bias --method linear --weights 0.5 -1.0 --name both" in text
    for layout, library in (("fgpt", "fgpt"), ("bitsandbytes", "transformers")):
        at = tmp_path / layout
        to = ["--to", "int8", "--layout", layout, "--out", str(at)]
        assert main(["quantize", str(project / "base"), *to]) == 0
        card = card_of(at)
        assert (card.data["library_name"], card.data["tags"][:2]) == (library, ["fgpt", "int8"])
        names = code_of(card, "fgpt", FOLDER=at)
        assert torch.equal(fgpt.apply(names["params"], TOKENS), fgpt.apply(fgpt.load(at), TOKENS))


def test_a_private_run_shows_no_figures(project: Path):
    run = project / "runs" / "it[b]"
    recipe: Any = run_dir.read_run(run)
    privacy = recipes.Privacy(epsilon=8.0, delta=1e-5, seed=4242)
    text = run_card(run, dataclasses.replace(recipe, privacy=privacy), "peft")
    assert "ε = 8, δ = 1e-05" in text
    for secret in ("training loss", "held-out", "4242"):
        assert secret not in text


@pytest.mark.slow
def test_names_of_the_hub():
    run = recipes.find("dora-medium").to_json() | {"base": "openai-community/gpt2@main"}
    found = metadata(run, "instruction", "peft")
    assert found["base_model"] == "openai-community/gpt2"
    assert found["base_model_relation"] == "adapter"
    assert "base_model:adapter:openai-community/gpt2" in found["tags"]
    assert found["datasets"] == ["tatsu-lab/alpaca"]
    assert hub_datasets({"train": "emotion"}) == ["dair-ai/emotion"]
    assert hub_datasets({"data": [], "source": "tinystories"}) == ["roneneldan/TinyStories"]
    assert metadata(recipes.find("lora-smollm2").to_json(), "instruction", "gguf")["base_model"].startswith("Hugging")


@pytest.mark.parametrize("front", ["license: other\nlicense_name: mine\nlicense_link: LICENSE", "license: [a", "a: b"])
def test_the_license_is_that_of_the_base(front: str, tmp_path: Path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n\ntext")
    expected = {"license": "other", "license_name": "mine", "license_link": "LICENSE"} if "name" in front else {}
    assert base_license(str(tmp_path)) == expected
    assert base_license(str(tmp_path / "nowhere")) == {}


def test_the_license_of_a_gguf_file(tmp_path: Path):
    arch, config = MODELS["gpt2"]
    path = tmp_path / "a.gguf"
    write_gguf(path, arch, random_model(config), fields={"general.license": "apache-2.0"})
    assert base_license(str(path)) == {"license": "apache-2.0"}
