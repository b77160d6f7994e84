"""Hints: options of other libraries, runs of another kind, what to do next."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from builders.command_line import OPTION_CLASSES

from fgpt.cli import run_dir
from fgpt.cli.config_diff import command
from fgpt.cli.errors import explain
from fgpt.cli.main import main
from fgpt.cli.option_hints import MODULES, OPTIONS
from fgpt.cli.options import option_names
from fgpt.errors import InputError
from fgpt.recipes import InstructionRecipe, find

# ------------------------------------------------------------------------------------------------------- errors, advice


def test_what_is_no_defect_is_one_line():
    assert explain(InputError("two\nlines")) == "two lines"
    assert explain(OSError("a plain one")) == "a plain one"
    assert explain(PermissionError(13, "Permission denied", "there")) == (
        "there: Permission denied; choose another place, or change its permissions"
    )
    assert explain(FileNotFoundError(2, "No such file or directory", "there")) == "there: No such file or directory"
    assert "not enough memory" in str(explain(MemoryError()))
    assert "not enough memory" in str(explain(torch.OutOfMemoryError("CUDA out of memory.")))
    assert "not enough memory" in str(explain(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(UnicodeEncodeError) as no_text:
        "\ud83d".encode()
    assert "is not a character of UTF-8" in str(explain(no_text.value))
    assert explain(RuntimeError("a defect")) is None
    assert explain(KeyError("a defect")) is None


@pytest.fixture
def finished_commands(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with runs of a name that is no recipe's: `real` was interrupted, `done` has finished."""
    monkeypatch.chdir(tmp_path)
    for name, state in (("real", "interrupted"), ("done", "finished")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        values = json.loads((project / "runs" / "it[b]" / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(values | {"name": name}))
        (run / "status.json").write_text(json.dumps({"state": state}))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "advice", "never"),
    [
        (
            ["generate", "real", "hi"],
            "has not finished; resume it: fgpt train runs/real --resume",
            "first",
        ),
        (["generate", "lora-nano", "hi"], "train it first: fgpt train lora-nano", "--resume"),
        (["generate", "reel", "hi"], "did you mean real?", "fgpt train reel"),
        (["generate", "done", "hi"], "has neither adapter/ nor model/ any more; train it again", "--resume"),
        (["train", "real"], "give that recipe, and --name real", "did you mean"),
        (["doctor", "real"], "give that recipe, and --name real", "did you mean"),
        (["train", "done", "--resume"], "nothing to resume: runs/done has finished", "fgpt train done"),
        (["train", "nobody", "--resume"], "fgpt train RECIPE makes one", "fgpt train nobody"),
        (["train", "lora-nano", "--name", "done", "--resume"], "runs/done has finished", "there is no run"),
        (
            ["train", "real", "--resume", "--out", "elsewhere"],
            "no run 'real' under elsewhere/",
            "fgpt train real",
        ),
        (["train", "real", "--resume", "--lr", "1"], "leave it out, or start a new run", "leave out --resume"),
        (["compare"], "under runs/ there are done, real", "fgpt runs"),
        (["classify", "real", "hi"], "runs/real has not finished", "train it first"),
    ],
)
def test_advice_can_be_followed(
    args: list[str], advice: str, never: str, finished_commands: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(args) == 2
    output = capsys.readouterr().err
    assert advice in output
    assert never not in output


def test_a_run_of_another_kind_is_told_what_it_is_for(tmp_path: Path):
    pretrained, tuned = find("pretrain-nano"), find("lora-nano")
    assert pretrained.suggest_use(tmp_path) == (
        f"tune it first, fgpt train RECIPE --base {tmp_path}/model, or fgpt eval text FILE --base {tmp_path}/model"
    )
    assert tuned.suggest_use(Path("runs/a b")) == "it answers: fgpt generate 'runs/a b' PROMPT"
    assert run_dir.resume_command(Path("runs/a b")) == "fgpt train 'runs/a b' --resume"


def test_a_run_with_a_name_of_its_own_is_had_again_by_its_recipe():
    run = dataclasses.replace(find("dora-nano"), name="real", lr=1e-3)  # pyright: ignore[reportCallIssue]
    assert command(run.to_json()) == "fgpt train dora-nano --name real --lr 0.001"
    assert command(find("dora-nano").to_json()) == "fgpt train dora-nano"
    assert isinstance(run, InstructionRecipe)


# ------------------------------------------------------------------------------------------------- options and help


@pytest.mark.slow
def test_hints_are_options_that_exist(capsys: pytest.CaptureFixture[str]):
    """By the names of transformers, TRL, litgpt and PEFT, with dashes or underscores."""
    known = {option: cls for cls in reversed(OPTION_CLASSES) for option in option_names(cls)} | {"--resume": None}
    recipes = ("lora-nano", "emotion-small", "pretrain-nano")
    commands = [["train", name] for name in recipes] + [["generate", "r", "p"], ["eval", "tasks", "t"]]
    assert len(OPTIONS) > 100
    for name, hint in OPTIONS.items():
        option, *value = hint.split(" ")
        assert option in known, name
        for spelling in (name, name.replace("-", "_")):
            lines = []
            for args in commands:
                assert main([*args, f"--{spelling}", "1"]) == 2
                lines.append(capsys.readouterr().err)
                if f"did you mean {hint}?" in lines[-1]:
                    break
            else:
                assert f"--{name}" in known, lines  # an option of ours elsewhere, as --batch-size
        if value:
            assert any(main([*args, option, *value, "--help"]) == 0 for args in commands)
            capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--learning_rate", "--lr"),
        ("--per_device_train_batch_size", "--micro-batch-size"),
        ("--max_length", "--max-seq-len"),
        ("--load_in_4bit", "--quantize nf4"),
        ("--gradient_checkpointing", "--remat"),
        ("--batch_size", "--micro-batch-size"),
        ("--r", "--adapter.rank"),
        ("--report-to=wandb", "--tracker"),
        ("--lrr", "--lr"),
    ],
)
def test_an_option_of_another_library_is_hinted_at(option: str, hint: str, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", option]) == 2
    name = option.partition("=")[0]
    expected = f"error: no option {name}; did you mean {hint}? fgpt train lora-nano --help lists them\n"
    assert capsys.readouterr().err == expected


def test_module_names_of_transformers_are_hinted_at(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "lora-nano", "--adapter.target", "q_proj|v_proj|lm_head"]) == 2
    assert r'--adapter.target "blocks\..*\.(q|v)|head"' in capsys.readouterr().err
    for module in MODULES:
        assert main(["train", "lora-nano", "--adapter.target", f".*{module}"]) == 2
        assert "matches no path" in capsys.readouterr().err
