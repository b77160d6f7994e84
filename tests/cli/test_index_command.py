"""fgpt index, and the passages of its index in the prompts of generate, chat and train."""

import json
from pathlib import Path

import pytest
from builders.command_line import training_options
from builders.retrieval import save_embedder
from builders.runs import one_line

from fgpt.cli.inference import generation
from fgpt.cli.inference.options import DEFAULT_SAMPLING, DocumentOptions
from fgpt.cli.main import main
from fgpt.cli.run_dir import instruction_run
from fgpt.cli.training.examples import encoding_of, load_heldout_rows, load_instruction_data
from fgpt.data.prompt_templates import encode, encode_prompt, template
from fgpt.data.rows import InstructionRow
from fgpt.retrieval.passages import augment
from fgpt.retrieval.retriever import open_retriever

pytest.importorskip("lancedb")
pytest.importorskip("pypdf")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project") / "notes"
    folder.mkdir()
    (folder / "fox.md").write_text("Say 3: a fox.")
    (folder / "bear.txt").write_text("Say 7: a bear.")
    return folder


@pytest.fixture(scope="module")
def index(notes: Path, embedder: Path) -> Path:
    out = notes.parent / "index"
    options = ["--embedder", str(embedder), "--chunk-size", "40", "--chunk-overlap", "5"]
    assert main(["index", str(notes), "--out", str(out), *options]) == 0
    return out


def test_a_folder_is_indexed_and_brought_up_to_date(
    notes: Path, embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    command = ["index", str(notes), "--embedder", str(embedder), "--chunk-size", "40", "--chunk-overlap", "5"]
    assert main(command) == 0
    assert "notes.index: 2 files, 2 chunks; 2 read, 0 unchanged, 0 removed" in capsys.readouterr().err
    assert (tmp_path / "notes.index" / "index.json").is_file()
    stamp = (tmp_path / "notes.index" / "index.json").stat()
    assert main(command) == 0
    assert capsys.readouterr().err.splitlines() == ["notes.index: up to date, 2 files, 2 chunks"]
    assert (tmp_path / "notes.index" / "index.json").stat() == stamp
    for name, content in (("latin.txt", b"\xe9"), ("cut.pdf", b"%PDF-1.4"), ("a.png", b"1"), ("b.png", b"1")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "new").mkdir()
    for path in [*notes.iterdir(), *tmp_path.glob("*.*")]:
        if path.is_file():
            (tmp_path / "new" / path.name).write_bytes(path.read_bytes())
    assert main(["index", "new", "--out", "notes.index", *command[2:]]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "notes.index: 4 files, 2 chunks; 2 read, 2 unchanged, 0 removed"
    assert lines[1] == "not in the index: 2 that could not be read or have no text"
    assert lines[2].startswith("  cut.pdf: not a PDF that can be read")
    assert lines[3].startswith("  latin.txt: not UTF-8 text")
    assert lines[4] == "passed over, of other kinds: 2 (2 .png)"


def test_bad_options_of_index(notes: Path, embedder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refused(*options: str) -> str:
        assert main(["index", str(notes), "--out", str(tmp_path / "i"), *options]) == 2
        return one_line(capsys)

    small = ("--embedder", str(embedder), "--chunk-size", "40")
    assert "--chunk-overlap is 40: expected less than --chunk-size, 40" in refused(*small, "--chunk-overlap", "40")
    assert "--chunk-size is 4: expected 16 or more" in refused("--chunk-size", "4")
    assert "expected at most 126 tokens" in refused("--embedder", str(embedder))
    assert "no such folder; expected that of an embedder" in refused("--embedder", "./missing")
    assert not (tmp_path / "i").exists()


def test_generate_puts_passages_into_the_prompt_and_names_their_sources(
    project: Path, index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prompts: list[str] = []
    write = generation.generate_text

    def record(run: generation.LoadedRun, prompt: list[int], *rest: object):
        prompts.append(run.tokenizer.decode(prompt))
        return write(run, prompt, *rest)  # pyright: ignore

    monkeypatch.setattr(generation, "generate_text", record)
    run = str(project / "runs" / "it[b]")
    options = ["--documents", str(index), "--max-new-tokens", "3"]
    assert main(["generate", run, "Say 7.", *options, "--num-passages", "1"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == "sources: [1] bear.txt"
    assert "Say 7.\n\nInput: [1] bear.txt\nSay 7: a bear.\n\nResponse:\n" in prompts[0]
    assert "dropped" not in output.err
    assert main(["generate", run, "Say 7.", *options, "--max-new-tokens", "60"]) == 0  # of a context of 96
    output = capsys.readouterr()
    assert "sources" not in output.out or "; [2]" not in output.out
    assert "of 2 passages, for which the context has no room: lower --max-new-tokens" in output.err
    assert main(["generate", run, "Say 7.", "--max-new-tokens", "3"]) == 0
    assert "sources" not in capsys.readouterr().out
    assert "a bear" not in prompts[-1]


def test_bad_documents(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = str(project / "runs" / "it[b]")
    assert main(["generate", run, "Say 7.", "--documents", str(tmp_path)]) == 2
    assert "no index of documents; expected a folder with index.json" in one_line(capsys)
    assert main(["chat", run, "--num-passages", "2"]) == 2
    assert "--num-passages is of --documents" in one_line(capsys)
    assert main(["train", *training_options(project), "--num-passages", "2"]) == 2
    assert "--num-passages is of --documents" in one_line(capsys)
    assert main(["train", *training_options(project), "--documents", str(tmp_path)]) == 2
    assert "no index of documents" in one_line(capsys)
    assert main(["train", "lora-nano", "--documents", str(tmp_path)]) == 2
    assert "--data nano asks none" in one_line(capsys)
    assert main(["train", "dpo-nano", "--base", str(project / "base"), "--documents", str(tmp_path)]) == 2
    assert "--documents" in one_line(capsys)


def test_a_chat_has_the_passages_of_its_newest_question(project: Path, index: Path, capsys: pytest.CaptureFixture[str]):
    run = generation.load_run(str(project / "runs" / "it[b]"))
    retriever = open_retriever(index, 1)
    turns = [InstructionRow("Say 3.", "", "No."), InstructionRow("Say 7.")]
    prompt = generation.conversation_prompt(run, turns, 3, retriever)
    text = run.tokenizer.decode(prompt.tokens)
    assert "Say 7.\n\n[1] bear.txt\nSay 7: a bear." in text
    assert "a fox" not in text
    assert [passage.where for passage in prompt.last.passages] == ["bear.txt"]
    (first,) = retriever.find(["Say 7."])
    alone = generation.conversation_prompt(run, turns[1:], 3, retriever)
    row = augment(turns[1], first)
    assert alone.tokens == list(encode_prompt(row, template(run.recipe.template), run.tokenizer))  # that of generate
    lines = iter(["Say 7.", "/quit"])
    documents = DocumentOptions(str(index), 1)
    generation.chat(str(project / "runs" / "it[b]"), DEFAULT_SAMPLING, documents=documents, read=lambda _: next(lines))
    assert capsys.readouterr().out.splitlines()[-1] == "sources: [1] bear.txt"


@pytest.mark.slow
def test_training_has_the_prompts_of_generation(
    project: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Examples and held-out rows with their passages, the same in the command that trains and in the run."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    training = [*training_options(project), "--data", str(tmp_path / "rows.json"), "--documents", str(index)]
    options = ["--num-passages", "1", "--name", "documents", "--compare-prompts", "1", "--max-new-tokens", "3"]
    assert main(["train", *training, *options]) == 0
    assert "24 passages in the prompts of 24 rows" in capsys.readouterr().err
    recipe = instruction_run(project / "runs" / "documents")
    encoding = encoding_of(recipe)
    data = load_instruction_data(recipe, encoding)
    retriever = open_retriever(index, 1)
    expected = set[tuple[int, ...]]()
    for row in rows:
        (passages,) = retriever.find([row["instruction"]])
        plain = InstructionRow(row["instruction"], "", row["output"])
        expected.add(tuple(encode(augment(plain, passages), encoding.template, encoding.tokenizer).tokens))
    examples = {tuple(example.tokens) for example in data.examples}
    assert len(examples) == 20
    assert examples <= expected
    assert len(data.heldout) == 4
    assert all(row.input.startswith("[1] ") for row in data.heldout)
    assert load_heldout_rows(recipe, encoding) == data.heldout
    capsys.readouterr()
    assert main(["train", *training, *options, "--max-seq-len", "44", "--num-passages", "2"]) == 0
    assert "for which --max-seq-len 44 has no room" in capsys.readouterr().err
