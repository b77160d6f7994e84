"""`fgpt export --to hub`: one commit of all files to a hub on this machine, or none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders.command_line import training_options
from builders.hub import hub_is_away
from builders.hub_uploads import TOKEN, UploadHub
from builders.runs import one_line
from huggingface_hub import constants

import fgpt
from fgpt.cli.main import main
from fgpt.cli.model_card.card import run_card
from fgpt.cli.run_json import read_run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    hub = UploadHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that the hub here has not
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def full_run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pushed")
    options = [*training_options(project), "--compare-prompts", "0", "--out", str(out), "--name", "full"]
    assert main(["train", *options, "--adapter.kind", "full"]) == 0
    return out / "full"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_adapter(project: Path, hub: UploadHub, capsys: pytest.CaptureFixture[str]):
    run = project / "runs" / "it[b]"
    assert main(["export", str(run), "--to", "hub", "--repo", "me/it"]) == 0
    assert f"pushed to {hub.url}/me/it, in one commit" in capsys.readouterr().err
    card = run_card(run, read_run(run), "peft").encode()  # of now: other tests have evaluated this run since
    assert hub.commits == [("me/it", content(run / "adapter") | {"README.md": card})]
    (repo,) = hub.repos
    assert (repo["organization"], repo["name"]) == ("me", "it")
    assert not {"private", "visibility"} & repo.keys()  # the owner's default
    assert not list(run.glob("export*"))


def test_a_model_in_a_private_repository(full_run: Path, hub: UploadHub, tmp_path: Path):
    assert main(["export", str(full_run), "--to", "hub", "--repo", "me/it", "--private"]) == 0
    ((_, files),) = hub.commits
    assert files == content(full_run / "model")
    assert hub.repos[0].get("visibility") == "private" or hub.repos[0].get("private") is True
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert fgpt.load(tmp_path).cfg == fgpt.load(full_run / "model").cfg


@pytest.mark.parametrize(
    ("fails_at", "status", "message"),
    [
        ("/api/repos/create", 403, "(HTTP 403), and nothing was pushed: run `hf auth login`"),
        ("/preupload/", 400, "(HTTP 400), and nothing was pushed:"),
        ("/objects/", 400, "(HTTP 400), and nothing was pushed:"),
        ("/commit/", 412, "(HTTP 412), and nothing was pushed:"),
    ],
)
def test_nothing_is_pushed_half(
    fails_at: str, status: int, message: str, project: Path, hub: UploadHub, capsys: pytest.CaptureFixture[str]
):
    hub.fails_at, hub.status = fails_at, status
    capsys.readouterr()
    assert main(["export", str(project / "runs" / "it[b]"), "--to", "hub", "--repo", "me/it"]) == 2
    assert message in one_line(capsys)
    assert hub.commits == []


def test_without_a_token(project: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    assert main(["export", str(project / "runs" / "it[b]"), "--to", "hub", "--repo", "me/it"]) == 2
    assert "the hub refuses me/it (HTTP 401)" in one_line(capsys)


def test_without_a_hub(project: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, capsys):
    args = ["export", str(project / "runs" / "it[b]"), "--to", "hub", "--repo", "me/it"]
    hub_is_away(monkeypatch)
    assert main(args) == 2
    assert "the hub cannot be reached (ConnectError), and nothing was pushed" in one_line(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(args) == 2
    assert "HF_HUB_OFFLINE forbids requests to the hub" in one_line(capsys)
