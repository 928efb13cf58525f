"""`tailkd export`: what goes and what stays, folders that are whole or not there, a hub that says no; no connection."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from test_cli import tailkd
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailkd import export as sharing
from tailkd.cli import sharing as verb
from tailkd.errors import DataError, Refusal
from tailkd.report.record import Run

NOW = Path(__file__).parent / "golden" / "run-format-1" / "now"
FILES = {
    "model.safetensors": "weights",
    "generation_config.json": "{}",
    "tokenizer.json": '{"vocab": {"password=secret": 0}}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "README.md": "an older card",
    "notes.txt": "mine",
    ".env": "HF_TOKEN=x",
}
GO = {"README.md", "config.json", *FILES} - {"notes.txt", ".env"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = Run(Path(shutil.copytree(NOW, tmp_path / "now")))
    for name, content in FILES.items():
        (found.student / name).write_text(content)
    return found


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(Refusal, match=message):
        verb.export(*arguments, **options)


# ----- what goes


def test_what_goes_and_what_stays(run: Run, tmp_path: Path) -> None:
    to = tmp_path / "deep" / "shared"
    found = json.loads(tailkd("export", str(run.folder), "--to", str(to), "--json")[0])
    assert {path.name for path in to.iterdir()} == set(found["files"]) == GO
    assert found["left"] == [".env", "notes.txt"]
    assert all((to / name).stat().st_size == size for name, size in found["files"].items())
    assert (to / "tokenizer.json").read_bytes() == (run.student / "tokenizer.json").read_bytes()
    assert ModelCard.load(to / "README.md").data.eval_results  # written anew
    assert (run.student / "README.md").read_text() == "an older card"


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    before = sorted(tmp_path.rglob("*"))
    for place in (("--to", str(tmp_path / "shared")), ("--push", "org/small")):
        said = tailkd("export", str(run.folder), *place, "--dry-run")[0]
        assert re.search(r"model.safetensors +7 bytes", said)
        assert re.search(rf"would go to .*{place[1]}.*: [\d,]+ bytes", said)
        assert "stays: .env, notes.txt" in said
    assert "org/small (private)" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_go(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to, there = tmp_path / "shared", run.student / "tokenizer_config.json"
    refused("takes one of --to DIR and --push ORG/NAME", run.folder)
    refused("takes one of --to DIR and --push ORG/NAME", run.folder, to, "org/small")
    refused("is there already and not an empty folder; give another --to", run.folder, run.student)
    refused(r"--push 'org/a/b' is no id on the hub \(.*\); give ORG/NAME", run.folder, push="org/a/b")
    refused("--push 'small' names no owner; give ORG/NAME", run.folder, push="small")
    monkeypatch.setenv("MY_API_KEY", "canary-1234567")
    there.write_text('{"note": "canary-1234567"}')
    refused(r"tokenizer_config\.json holds what looks like a secret", run.folder, to)
    there.write_text("{}")
    (run.student / "model.safetensors").unlink()
    refused(r"student holds no weights: run `tailkd distill` on its recipe again", run.folder, to)
    (run.student / "model.safetensors").write_text("weights")
    origins = run.folder / "origins.json"
    origins.write_text(origins.read_text().replace('"hub": null', '"hub": "/models/teacher"', 1))
    refused(r"origins\.json has hub '/models/teacher', which is no id there but a path", run.folder, to)
    (run.folder / "evaluation.json").unlink()
    refused("holds no finished run", run.folder, to)
    assert not to.exists()


# ----- a folder


def test_a_folder_is_whole_or_not_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, copied = sharing.prepared(run), []

    def copy(source: Path, target: Path) -> None:
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        copied.append(target)
        assert not (tmp_path / "shared").exists()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copy)
        with pytest.raises(DataError, match=r"shared cannot be written \(No space left on device\); nothing is left"):
            sharing.into_folder(prepared, tmp_path / "shared")
    assert len(copied) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["now"]
    (tmp_path / "shared").mkdir()
    sharing.into_folder(prepared, tmp_path / "shared")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["now", "shared"]
    with pytest.raises(Refusal, match=r"cannot be made \(Not a directory\); give another --to"):
        sharing.into_folder(prepared, run.folder / "recipe.yaml" / "shared")


# ----- the hub


class Hub:
    """What `HfApi` is asked; a repository of some visibility; an error where one is to come."""

    def __init__(self, *, private: bool | None = None, error: Exception | None = None) -> None:
        self.private, self.error, self.calls = private, error, []

    def __call__(self, **options: Any) -> Hub:
        return self

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append("create")
        if isinstance(self.error, Exception):
            raise self.error
        assert exist_ok
        self.private = private if self.private is None else self.private

    def model_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> SimpleNamespace:
        self.calls.append("commit")
        self.sent = {one.path_in_repo: one.path_or_fileobj for one in operations}
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


def hub_of(monkeypatch: pytest.MonkeyPatch, **state: Any) -> Hub:
    hub = Hub(**state)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_aToken1234567890123")
    return hub


@pytest.mark.parametrize("option", ["", "--private", "--public"])
def test_one_commit_of_exactly_what_a_dry_run_lists(option: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of(monkeypatch)
    arguments = ("export", str(run.folder), "--push", "org/small", *filter(None, [option]))
    listed = json.loads(tailkd(*arguments, "--dry-run", "--json")[0])["files"]
    assert hub.calls == []
    assert "went to https://hub/org/small/commit/1" in tailkd(*arguments)[0]
    assert hub.calls == ["create", "commit"]
    assert hub.private == (option != "--public")
    assert set(hub.sent) == set(listed) == GO
    assert b'from_pretrained("org/small")' in hub.sent["README.md"]
    assert len(hub.sent["README.md"]) == listed["README.md"]


@pytest.mark.parametrize(("private", "public"), [(False, False), (True, True)])
def test_nobody_else_sees_it_than_was_asked(
    private: bool, public: bool, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hub_of(monkeypatch, private=private)
    now = "private; push with --private" if private else "public; push with --public"
    refused(rf"org/small is there already and {now}", run.folder, push="org/small", public=public)
    assert hub.calls == ["create"]
    verb.export(run.folder, push="org/small", public=not private)
    assert hub.calls[-1] == "commit"


def answer(code: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=code, headers={}, request=None, text="")
    return HfHubHTTPError(f"{code} Client Error", response=response)


def lost_connection() -> Exception:
    base = next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
    return base("Name or service not known")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (answer(401), r"answer 401 of the hub: the hub does not know this token: `hf auth login`"),
        (answer(403), r"answer 403 of the hub: this token may not write to org/small"),
        (answer(500), r"answer 500 of the hub: nothing was uploaded; .* \(500 Client Error\)"),
        (lost_connection(), r"cannot be reached \(Name or service not known\); nothing was uploaded"),
        (ConnectionError("offline mode"), r"cannot be reached \(offline mode\); nothing was uploaded"),
    ],
)
def test_a_hub_that_says_no(error: Exception, message: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of(monkeypatch, error=error)
    refused(message, run.folder, push="org/small")
    assert hub.calls == ["create"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("no token of the hub: `hf auth login`, or set HF_TOKEN", run.folder, push="org/small")
    assert hub.calls == ["create"]


# ----- the whole way


def test_the_documents_examples_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported loads in transformers alone and computes the same."""
    text = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    builders.write_corpus(Path("corpus.jsonl"), documents=60)
    for name, source in (("teacher", stranger.teacher), ("start", stranger.student)):
        shutil.copytree(source, name)
    Path("teacher/README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Teacher\n")
    hub = hub_of(monkeypatch)
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^tailkd .*", text, re.MULTILINE)]
    said = [tailkd(*command[1:])[0] for command in commands]
    assert len(said) == 4
    assert "would go to https://huggingface.co/my-org/my-student (private)" in said[2]
    loaded: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], loaded)
    run = Run(Path("runs/my-student"))
    ids = loaded["tokenizer"]("the river", return_tensors="pt")["input_ids"]
    assert (
        ids.tolist()
        == AutoTokenizer.from_pretrained(run.student)("the river", return_tensors="pt")["input_ids"].tolist()
    )
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(run.student)(ids).logits
        assert torch.equal(loaded["model"](ids).logits, expected)
    found = ModelCard.load("shared/README.md").data
    assert (found.license, found.language) == ("apache-2.0", "en")
    assert set(hub.sent) == {path.name for path in Path("shared").iterdir()}
    assert run.bill is not None
    shutil.rmtree("teacher")
    assert (run.student / "README.md").read_text() == Path("shared/README.md").read_text() == sharing.prepared(run).card
