"""`tailkd generate`: what the file holds, that no interruption changes it, and what its readers make of it."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import builders
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from test_cli import tailkd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tailkd import generation, recipe_file
from tailkd import run as tailkd_run
from tailkd.bill import bill, flops_per_token, settled
from tailkd.cli import corpora
from tailkd.data import packing, tokens
from tailkd.data.corpus import BadRecords, Source
from tailkd.errors import DataError, OutOfMemory, Preempted, Refusal
from tailkd.ledger import flops
from tailkd.ledger.anatomy import dissect
from tailkd.recipe_rules import WRITING
from tailkd.teacher import rollout
from tailkd.teacher.rollout import Prompt, Rollout, Sampling
from tailkd.written import Lines


@pytest.fixture
def writing(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Prefixes of the documents to train on, continued."""
    out = str(tmp_path / "teacher.jsonl")
    asked = {"out": out, "prefix_tokens": 9, "max_new_tokens": 12, "count": 20, "batch_size": 4, "seed": 5}
    return {**recipe, "generate": asked}


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).open()]


def write(recipe: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    values = {**recipe, "generate": {**recipe["generate"], **changed}}
    said: list[str] = []
    return read(generation.write(recipe_file.read(values, files=False), said.append))


def ending_teacher(stranger: SimpleNamespace, folder: Path, *, rows: int = 448) -> Path:
    """A teacher that comes to an end now and then; rows beyond the tokenizer's 400 ids, and likely ones."""
    model = AutoModelForCausalLM.from_pretrained(stranger.teacher)
    model.resize_token_embeddings(rows)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[400:] = 3 * weight[: rows - 400]
        weight[1] *= 2.5
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1, repetition_penalty=5.0, eos_token_id=1)
    model.save_pretrained(folder)
    stranger.tokenizer.save_pretrained(folder)
    return folder


def greedy(model: Any, tokenizer: Any, ids: list[int], tokens: int) -> list[int]:
    """One token at a time, without a cache, out of the tokenizer's ids alone."""
    written: list[int] = []
    while len(written) < tokens:
        with torch.no_grad():
            scores = model(torch.tensor([ids + written])).logits[0, -1, : len(tokenizer)]
        written.append(int(scores.argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    return written


def test_greedy_text_is_the_teachers_own_word_by_word(writing: dict[str, Any], stranger: SimpleNamespace) -> None:
    lines = write(writing, temperature=0)
    tokenizer, model = stranger.tokenizer, AutoModelForCausalLM.from_pretrained(stranger.teacher)
    bodies = {json.loads(line)["body"] for line in stranger.corpus.open()}
    assert len(lines) == 20
    for line in lines:
        assert list(line) == ["id", "prompt", "completion", "text", "finished", "tokens"]
        assert line["text"] == line["prompt"] + line["completion"]
        body = next(body for body in bodies if body.startswith(line["prompt"]))
        ids = tokenizer(body, add_special_tokens=False)["input_ids"][:9]
        written = greedy(model, tokenizer, ids, 12)
        assert line["tokens"] == len(written)
        assert line["finished"] == (written[-1] == tokenizer.eos_token_id)
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert line["completion"] == (text if line["finished"] else text.rstrip("\ufffd")).replace("\0", "")


def test_padded_rows_are_never_written_and_ends_are_known(
    writing: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's own generation_config.json (a low temperature, a penalty) has no say either."""
    folder = ending_teacher(stranger, tmp_path / "padded")
    seen: list[torch.Tensor] = []
    real = Rollout._generate
    monkeypatch.setattr(Rollout, "_generate", lambda *a: seen.append(real(*a)) or seen[-1])
    lines = write({**writing, "teacher": {"model": str(folder)}}, count=60, temperature=1.5)
    assert max(int(ids.max()) for ids in seen) < 400
    finished = [line for line in lines if line["finished"]]
    assert 5 < len(finished) < 55
    assert all(line["tokens"] == 12 for line in lines if not line["finished"])
    assert any(line["tokens"] < 12 for line in finished)
    assert not any("</s>" in line["text"] for line in lines)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = stranger.tokenizer("the river", add_special_tokens=False)["input_ids"]
    one = Prompt("", 0, tuple(ids), "the river", "the river")
    found = Rollout(model, stranger.tokenizer, Sampling(8, 0.0), usable=400, batch_size=1)
    written = found._generate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), [one])[0, len(ids) :]
    plain = greedy(model, stranger.tokenizer, ids, 8)
    assert written[: len(plain)].tolist() == plain
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.6, 0), (1.3, 1.0, 3)])
def test_what_is_drawn_has_the_teachers_distribution(
    stranger: SimpleNamespace, temperature: float, top_p: float, top_k: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(stranger.teacher)
    ids = tuple(stranger.tokenizer("the river", add_special_tokens=False)["input_ids"])
    sampling = Sampling(1, temperature, top_p, top_k, seed=3)
    writer = Rollout(model, stranger.tokenizer, sampling, usable=400, batch_size=500)
    count = 4_000
    drawn = Counter[int]()
    with torch.no_grad():
        for start in range(0, count, 500):
            asked = [Prompt("", n, ids, "", "") for n in range(start, start + 500)]
            rows = torch.tensor([ids] * 500)
            drawn.update(writer._generate(rows, torch.ones_like(rows), asked)[:, -1].tolist())
        wanted = (model(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)
    order = wanted.argsort(descending=True)
    keep = torch.ones(len(order), dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    if top_p < 1:
        keep &= wanted[order].cumsum(0) - wanted[order] < top_p
    allowed = order[keep]
    share = wanted[allowed] / wanted[allowed].sum()
    assert set(drawn) <= set(allowed.tolist())
    for token, probability in zip(allowed.tolist()[:20], share.tolist()[:20], strict=False):
        error = (probability * (1 - probability) / count) ** 0.5
        assert drawn[token] / count == pytest.approx(probability, abs=4.5 * error + 1e-9)


def test_a_completion_does_not_depend_on_its_neighbours(writing: dict[str, Any], tmp_path: Path) -> None:
    texts = [" ".join(builders.WORDS[n : 2 * n + 1]) for n in range(20)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    writing["generate"] |= {"prompts": {"path": str(path)}, "prefix_tokens": None}
    written = write(writing)
    assert sorted(line["prompt"] for line in written) == sorted(texts)
    assert len(written[0]["prompt"]) > len(written[-1]["prompt"])  # the longest first
    lines = {line["id"]: line for line in written}
    for size in (1, 7):
        others = write(writing, batch_size=size, out=str(tmp_path / f"{size}.jsonl"))
        assert [lines[line["id"]] for line in others] == others
    assert {line["id"]: line for line in write(writing, seed=6, out=str(tmp_path / "seed.jsonl"))} != lines


def test_samples_of_a_prompt_differ_and_have_names(writing: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the river", "a stone in the garden")))
    template = "Question: {prompt}\nAnswer:"
    asked = {"prompts": {"path": str(path)}, "prefix_tokens": None, "count": None, "samples": 3, "template": template}
    lines = write(writing, **asked)
    assert Counter(line["prompt"] for line in lines) == {"the river": 3, "a stone in the garden": 3}
    assert len({line["id"] for line in lines}) == len({line["completion"] for line in lines}) == 6
    assert all(line["text"] == template.replace("{prompt}", line["prompt"]) + line["completion"] for line in lines)


def test_folded_probability_is_written_as_what_it_is_folded_into() -> None:
    scores = torch.randn(2, 6)
    folded = rollout.Usable(4, {5: 1})(torch.zeros(2, 1), scores)
    wanted = scores.softmax(-1)
    wanted[:, 1] += wanted[:, 5]
    torch.testing.assert_close(folded.softmax(-1)[:, :4], wanted[:, :4] / wanted[:, :4].sum(-1, keepdim=True))
    assert (folded[:, 4:] == -torch.inf).all()


def test_a_space_before_the_first_word_is_kept() -> None:
    """Decoders of such tokenizers strip it from the front of what they decode."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁the": 2, "▁river": 3, "▁sang": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer.decode([4]) == "sang"
    writer = Rollout(builders.build_model(5), tokenizer, Sampling(3), usable=5, batch_size=1)
    prompt = Prompt("", 0, (0, 2, 3), "the river", "the river")
    assert writer._written(prompt, [4, 1, 1]) == (" sang", True, 2)
    assert writer._written(prompt, [4, 4, 4]) == (" sang sang sang", False, 3)


# ----- what is held out, skipped, refused


def test_held_out_documents_are_no_prompts(writing: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Neither by a share of the corpus, a large one or a small, nor by a file of their own."""
    documents = list(Source(path=str(stranger.corpus), text="body").documents(BadRecords()))
    hashes = np.asarray([document.hash for document in documents], dtype=np.uint64)

    def prompted(name: str, data: dict[str, Any]) -> set[str]:
        values = {**writing, "data": {**writing["data"], **data}}
        return {line["id"] for line in write(values, out=str(tmp_path / name), count=None, max_new_tokens=1)}

    for number, share in enumerate((0.1, 0.5)):  # looked at 500 documents, more than there are, and 100
        ids = prompted(f"{number}.jsonl", {"heldout": {"fraction": share}})
        assert ids == {documents[index].id for index in packing.split(hashes, share)[0]}
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"body": document.text}) + "\n" for document in documents[:7]))
    ids = prompted("own.jsonl", {"heldout": {"path": str(held), "text": "body"}})
    assert ids == {document.id for document in documents[7:]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix_tokens": None}, "generate.prefix_tokens: is needed where prompts are prefixes"),
        ({"template": "{prompt}!"}, "generate.template: does not go with generate.prefix_tokens"),
        ({"template": "x", "prefix_tokens": None}, "generate.template: expected {prompt} in it"),
        ({"temperature": 0, "samples": 2}, "generate.samples: at temperature 0 all samples of a prompt are the same"),
        (
            {"server": {"url": "127.0.0.1:8000"}},
            "generate.server.url: expected http://HOST:PORT; came '127.0.0.1:8000'",
        ),
        ({"server": {"url": "http://[x"}}, "generate.server.url: expected http://HOST:PORT; came 'http://[x'"),
        ({"prompts": {"path": "nowhere.jsonl"}}, "generate.prompts.path: no file, folder or match at 'nowhere.jsonl'"),
        ({"top_p": 0}, "generate.top_p: expected greater than 0; came 0"),
        ({"count": 0}, "generate.count: expected greater than or equal to 1"),
        ({"temprature": 1}, "generate.temprature: unknown key; did you mean 'temperature'?"),
    ],
)
def test_bad_values_are_refused_before_the_start(change: dict[str, Any], message: str, writing: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=re.escape(message)):
        recipe_file.read({**writing, "generate": {**writing["generate"], **change}}, files=WRITING)


def test_the_file_to_write_is_no_corpus_of_prompts(writing: dict[str, Any], tmp_path: Path) -> None:
    """But it may be what is trained on, and until it is there the recipe says who writes it."""
    out = writing["generate"]["out"]
    trained = {**writing, "data": {**writing["data"], "train": {"path": out}}}
    with pytest.raises(Refusal, match=r"generate.out: '.*' is also what prompts are taken of"):
        recipe_file.read(trained, files=False)
    prompts = {"path": str(writing["data"]["train"]["path"]), "text": "body"}
    trained["generate"] = {**writing["generate"], "prompts": prompts}
    with pytest.raises(Refusal, match=r"data.train.path: no file.*; `tailkd generate` with this recipe writes it"):
        recipe_file.read(trained)
    recipe_file.read(trained, files=WRITING)
    with pytest.raises(Refusal, match=r"generate: needs a teacher, which is null"):
        recipe_file.read({**writing, "teacher": None, "objective": {"divergence": "none"}})


def test_nothing_is_written_where_nothing_can_be(
    writing: dict[str, Any], stranger: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = Path(writing["generate"]["out"])
    with pytest.raises(Refusal, match=r"makes a prompt: .* texts: no longer than generate.prefix_tokens"):
        write(writing, prefix_tokens=200)
    with pytest.raises(Refusal, match=r"250 tokens after a prompt of 9 are more than the 256 positions of the teacher"):
        write(writing, max_new_tokens=250)
    with pytest.raises(Refusal, match="no field 'prompt'; it has 'id', 'body'"):
        write(writing, prompts={"path": str(stranger.corpus)})
    with pytest.raises(Refusal, match="the recipe has no section generate"):
        generation.write(recipe_file.read({**writing, "generate": None}), print)
    with pytest.raises(Refusal, match=r"cannot be written \(File exists\); give another generate.out"):
        write(writing, out=str(stranger.corpus / "below.jsonl"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match="generate writes in one process"):
        write(writing)
    monkeypatch.delenv("WORLD_SIZE")
    assert not out.exists()
    out.write_text("mine\n")
    with pytest.raises(Refusal, match="is there already and `tailkd generate` did not write it"):
        write(writing)
    with pytest.raises(Refusal, match="did not write it"):
        generation.write(recipe_file.read(writing, files=False), print, fresh=True)
    assert out.read_text() == "mine\n"


def test_long_and_foreign_prompts_are_skipped_and_counted(writing: dict[str, Any], tmp_path: Path) -> None:
    path, said = tmp_path / "prompts.jsonl", list[str]()
    texts = ["the river", "the stone " * 300, "a <extra> window", "  "]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tokenizer = AutoTokenizer.from_pretrained(writing["student"]["model"])
    tokenizer.add_tokens(["<extra>"])  # for which no model has a row
    student = tmp_path / "student"
    AutoModelForCausalLM.from_pretrained(writing["student"]["model"]).save_pretrained(student)
    tokenizer.save_pretrained(student)
    values = {**writing, "student": {"model": str(student)}, "data": {**writing["data"], "max_bad": 1.0}}
    values["generate"] |= {"prompts": {"path": str(path)}, "prefix_tokens": None, "count": None}
    out = generation.write(recipe_file.read(values), said.append)
    assert [line["prompt"] for line in read(out)] == ["the river"]
    found = json.loads(out.with_name(f"{out.name}.manifest").read_text())
    assert (found["lines"], sum(found["skipped"].values())) == (1, 3)
    assert "1 texts: more than 244 tokens, which with its completion the teacher has no positions for" in said[-1]
    assert "1 texts: a token outside the ids that teacher and student share" in said[-1]
    assert "1 texts: empty text" in said[-1]


# ----- interruptions


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_interrupted_file_ends_as_an_uninterrupted_one(
    temperature: float, writing: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every line, and in the middle of one."""
    whole = tmp_path / "whole.jsonl"
    write(writing, out=str(whole), temperature=temperature)
    values = {**writing, "generate": {**writing["generate"], "temperature": temperature}}
    checked, real = recipe_file.read(values), Lines.append
    out = Path(checked.generate.out)  # type: ignore[union-attr]
    partial = out.with_name(f"{out.name}.partial")
    left = 0

    def append(lines: Lines, record: dict[str, Any]) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGTERM)
        left -= 1
        real(lines, record)

    monkeypatch.setattr(Lines, "append", append)
    for number in range(4):
        left = 2 + number
        with pytest.raises(Preempted, match="SIGTERM came; the same command goes on"):
            generation.write(checked, print)
        assert not out.exists()
        assert len(read(partial)) == sum(range(3, 4 + number))
        with partial.open("ab") as file:
            file.write(b'{"id": "half a li' if number % 2 else b"\x00\x00\n{}\n")
    monkeypatch.setattr(Lines, "append", real)
    said: list[str] = []
    before = [line for line in partial.read_bytes().splitlines() if line.startswith(b'{"id": "/')]
    generation.write(checked, said.append)
    assert f"going on after line {len(before):,} of {out}" in said
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    generation.write(checked, said.append)
    assert f"already written: {out}; --fresh writes it anew" in said[-1]


@pytest.mark.slow
def test_a_killed_process_leaves_whole_lines(writing: dict[str, Any], tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write(writing, out=str(whole), count=None)
    writing["generate"]["count"] = None
    file, out = tmp_path / "recipe.yaml", Path(writing["generate"]["out"])
    file.write_text(json.dumps(writing))
    command = [sys.executable, "-m", "tailkd", "generate", str(file)]
    for lines in (10, 40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        partial = out.with_name(f"{out.name}.partial")
        while process.poll() is None and (not partial.exists() or len(partial.read_bytes().splitlines()) < lines):
            time.sleep(0.002)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert out.read_bytes() == whole.read_bytes()


def test_what_is_made_of_something_else_is_not_gone_on_with(
    writing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(writing)
    with pytest.raises(
        Refusal, match=r"made of something else:\n  generate.seed: was 5, is 6\ngive another"
    ) as refused:
        write(writing, seed=6)
    assert "--fresh" in str(refused.value)
    before = read(writing["generate"]["out"])
    values = {**writing, "generate": {**writing["generate"], "seed": 6}}
    generation.write(recipe_file.read(values), print, fresh=True)
    assert read(writing["generate"]["out"]) != before
    lines = Lines(Path(writing["generate"]["out"]), {})
    with lines.growing(), pytest.raises(Refusal, match="is being written by another process"):
        generation.write(recipe_file.read(values), print, fresh=True)


def test_a_disk_or_a_memory_that_gives_out_ends_it_and_keeps_the_lines(
    writing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(writing, out=writing["generate"]["out"] + ".other.jsonl")

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 3

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, line: bytes) -> int:
            self.left -= 1
            if not self.left and refuses:
                raise OSError(28, "No space left on device")
            return self.file.write(line if self.left else line[:7])

    real = Lines.append

    def append(lines: Lines, record: dict[str, Any]) -> None:
        if not isinstance(lines._file, Full):
            lines._file = Full(lines._file)  # type: ignore[assignment]
        real(lines, record)

    monkeypatch.setattr(Lines, "append", append)
    refuses = False
    for words in ("it takes no whole line", "No space left on device"):
        with pytest.raises(DataError, match=rf"{words}.*make room"):
            write(writing)
        refuses = True
    monkeypatch.setattr(Lines, "append", real)
    generate = Rollout._generate
    monkeypatch.setattr(Rollout, "_generate", mock.Mock(side_effect=torch.OutOfMemoryError("no")))
    with pytest.raises(OutOfMemory, match=r"4 completions of 12 tokens after .* lower"):
        write(writing)
    monkeypatch.setattr(Rollout, "_generate", generate)
    assert write(writing) == expected


# ----- what reads it


def test_an_unfinished_text_ends_without_an_end_token(tmp_path: Path, stranger: SimpleNamespace) -> None:
    """And what stands behind it in a row is not learned as its continuation."""
    path = tmp_path / "teacher.jsonl"
    texts = ["the river", "a stone", "the sea sang", "bread"]
    finished = [True, False, False, True]
    path.write_text(
        "".join(json.dumps({"text": t, "finished": f}) + "\n" for t, f in zip(texts, finished, strict=True))
    )
    tokenizer = stranger.tokenizer
    store = tokens.prepare(
        Source(path=str(path)), tokenizer, tmp_path / "store", usable=400, max_bad=0.0, say=lambda line: None
    )
    wanted = [
        tokenizer(t, add_special_tokens=False)["input_ids"] + [1] * f for t, f in zip(texts, finished, strict=True)
    ]
    assert [store.tokens[a:b].tolist() for a, b in pairwise(store.offsets)] == wanted
    row = packing.Rows(store, np.arange(4), context=64, begin=0, end=1)[0]
    run = [token for document in wanted for token in document]
    labels = list(run)
    for document in (2, 3):
        labels[sum(map(len, wanted[:document]))] = packing.IGNORED
    assert row.labels[: len(run)].tolist() == labels
    assert row.input_ids[: len(run)].tolist() == [0, *run[:-1]]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told = pyarrow.Table.from_pylist([{"text": t, "finished": f} for t, f in zip(texts, finished, strict=True)])
    parquet.write_table(told, tmp_path / "told.parquet")
    read = {
        name: list(Source(path=str(tmp_path / name)).documents(BadRecords())) for name in (plain.name, "told.parquet")
    }
    assert [d.finished for d in read[plain.name]] == [True] * 4
    assert [d.finished for d in read["told.parquet"]] == finished


# ----- its cost


def test_the_bill_counts_what_the_teacher_writes(writing: dict[str, Any], stranger: SimpleNamespace) -> None:
    trained = {**writing, "objective": {"divergence": "none"}}
    checked = recipe_file.read(trained)
    plain = bill(settled(recipe_file.read({**trained, "generate": None})))
    made = bill(settled(checked))
    config = AutoModelForCausalLM.from_pretrained(stranger.teacher).config
    written = 20 * 12 * flops.generation(dissect(config), 9, 12)
    assert made.executed.generation == pytest.approx(written / 6_000 * 1e6 / 1e15)
    assert made.executed.total == pytest.approx(plain.executed.total + made.executed.generation)
    assert plain.executed.generation == 0
    trained["generate"] = {**writing["generate"], "count": None}
    once = bill(settled(recipe_file.read(trained)))
    assert once.executed.generation == pytest.approx(12 / 21 * flops.generation(dissect(config), 9, 12) * 1e6 / 1e15)


def test_budgets_pay_for_what_the_teacher_writes(writing: dict[str, Any], tmp_path: Path) -> None:
    for count in (20, None):
        values = {**writing, "objective": {"divergence": "none"}}
        values["generate"] = {**writing["generate"], "count": count}
        spent = 3e10
        values["training"] = {**writing["training"], "tokens": None, "flops": spent, "save_every_tokens": None}
        values["evaluate"] = {}
        found = settled(recipe_file.read(values))
        total = bill(found).pflop_per_million_tokens.total * 1e15 / 1e6 * found.tokens
        batch = 8 * 48 * flops_per_token(found)
        assert spent - 2 * batch < total <= spent


# ----- the verb


def test_the_verb_writes_trains_and_shows(
    writing: dict[str, Any], tmp_path: Path, stranger: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "seq-kd.yaml", writing["generate"]["out"]
    prompts = {"path": str(stranger.corpus), "text": "body"}
    values = {
        **writing,
        "data": {**writing["data"], "train": {"path": out}, "context": 16},
        "objective": {"divergence": "none"},
        "training": {"tokens": 256, "batch_size": 4},
        "evaluate": {"tokens": 200},
        "generate": {**writing["generate"], "prompts": prompts},
    }
    path.write_text(json.dumps(values))
    assert "goes on" not in tailkd("generate", str(path), "generate.count=12")[1]
    found = json.loads(tailkd("check", str(path), "--json")[0])
    assert found["executed"]["generation"] > 0
    tailkd("distill", str(path))
    shown = json.loads(tailkd("generate", str(values["out"]), "--prompt", "the river", "--json")[0])
    assert list(shown) == ["prompt", "teacher", "student_before", "student"]
    model = AutoModelForCausalLM.from_pretrained(Path(values["out"]) / "student")
    ids = stranger.tokenizer("the river", add_special_tokens=False)["input_ids"]
    text = stranger.tokenizer.decode(greedy(model, stranger.tokenizer, ids, 60), skip_special_tokens=True)
    assert shown["student"] == text.rstrip("\ufffd") or shown["student"] == text
    monkeypatch.setenv("COLUMNS", "120")
    table = tailkd("generate", str(values["out"]), "--prompt", "the river", "--temperature", "0.5", "--tokens", "5")[0]
    assert re.search(r"teacher +.*student before +.*student", table)
    with pytest.raises(Refusal, match="is a folder; give a recipe file, or with a run folder --prompt TEXT"):
        corpora.generate(Path(values["out"]))
    with pytest.raises(Refusal, match="the prompt is empty; give --prompt some text"):
        corpora.generate(Path(values["out"]), prompt="")
    (Path(values["out"]) / "evaluation.json").unlink()
    with pytest.raises(Refusal, match="holds no finished run"):
        corpora.generate(Path(values["out"]), prompt="the river")


def test_side_by_side_without_a_teacher_and_with_a_cut_student(recipe: dict[str, Any], tmp_path: Path) -> None:
    training = {"training": {"tokens": 800, "batch_size": 4}, "evaluate": {"tokens": 200}}
    alone = {**recipe, **training, "teacher": None, "objective": {"divergence": "none"}, "out": str(tmp_path / "alone")}
    cut = {**recipe, **training, "student": {"from_teacher": {"layers": 1}}, "out": str(tmp_path / "cut")}
    for values, roles in ((alone, ["student_before", "student"]), (cut, ["teacher", "student_before", "student"])):
        run = tailkd_run.distill(values)
        assert list(generation.side_by_side(run, "the river", tokens=8)) == roles


# ----- real text, a really pretrained teacher


DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
STORIES, QUESTIONS = DATA / "models" / "stories260k", DATA / "instruct" / "gsm8k_train.jsonl.gz"
KL = """
name: kl
teacher: {{model: {teacher}}}
student: {{from_teacher: {{layers: 2}}}}
data: {{train: {{path: {corpus}, text: question}}, heldout: {{path: {heldout}, text: question}}, context: 64}}
objective: {{divergence: forward_kl}}
training: {{flops: 1.0e+11, batch_size: 8, learning_rate: 1.0e-3}}
evaluate: {{tokens: 2000}}
"""
SEQ_KD = """extends: kl.yaml
name: seq-kd
data: {{train: {{path: {written}, text: text}}}}
objective: {{divergence: none}}
generate: {{out: {written}, prompts: {{path: {corpus}, text: question}}, prefix_tokens: 16, max_new_tokens: 47}}"""


@pytest.mark.slow
@pytest.mark.skipif(not (STORIES.is_dir() and QUESTIONS.is_file()), reason="TAILKD_DATA names no data folder")
def test_seq_kd_beside_kl_on_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two recipes, four lines apart, through the commands, at the same FLOPs, in one report."""
    monkeypatch.chdir(tmp_path)
    with gzip.open(QUESTIONS, "rt", encoding="utf-8") as lines:
        questions = [line for line, _ in zip(lines, range(700), strict=False)]
    Path("questions.jsonl").write_text("".join(questions[:600]))
    Path("heldout.jsonl").write_text("".join(questions[600:]))
    names = {"teacher": STORIES, "corpus": "questions.jsonl", "heldout": "heldout.jsonl", "written": "teacher.jsonl"}
    Path("kl.yaml").write_text(KL.format(**names))
    Path("seq-kd.yaml").write_text(SEQ_KD.format(**names))
    assert len(SEQ_KD.splitlines()) == 1 + 4
    for command in ("generate seq-kd.yaml", "distill seq-kd.yaml", "distill kl.yaml"):
        tailkd(*command.split())
    shown = json.loads(tailkd("report", "runs/kl", "runs/seq-kd", "--json")[0])
    costs = []
    for name, one in zip(("kl", "seq-kd"), shown, strict=True):
        before, after = one["evaluation"]["student_before"], one["evaluation"]["student"]
        assert after["cross_entropy"] < before["cross_entropy"] - 0.2, name
        found = settled(recipe_file.read(f"{name}.yaml"))
        costs.append(bill(found).pflop_per_million_tokens.total * found.tokens * 1e9)
    assert costs == pytest.approx([1e11] * 2, rel=0.05)


# ----- the documentation


def test_the_documents_examples_run(stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both recipes as they stand, every command, and both runs at the same FLOPs."""
    text = (Path(__file__).parents[1] / "docs" / "generate.md").read_text()
    recipes = re.findall(r"`([a-z-]+\.yaml)`, [^\n]*:\n\n```yaml\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^tailkd .*", text, re.MULTILINE)]
    assert ([name for name, _ in recipes], len(commands)) == (["kl.yaml", "seq-kd.yaml"], 5)
    monkeypatch.chdir(tmp_path)
    for name, content in recipes:
        Path(name).write_text(content)
    builders.write_corpus(Path("corpus.jsonl"), documents=60)
    builders.write_corpus(Path("heldout.jsonl"), documents=8, seed=9)
    Path("student").symlink_to(stranger.student)
    Path("untrained").symlink_to(stranger.teacher)
    alone = {"teacher": None, "objective.divergence": "none", "student.model": "untrained", "out": "trained"}
    Path("teacher").symlink_to(tailkd_run.distill("kl.yaml", **alone, **{"training.tokens": 80_000}).student)
    said = [tailkd(*command[1:])[0] for command in commands]
    assert "student before" in said[-1]
    kl, seq_kd = (settled(recipe_file.read(name)) for name, _ in recipes)
    costs = [bill(one).pflop_per_million_tokens.total * one.tokens for one in (kl, seq_kd)]
    assert 0.8 * costs[0] < costs[1] <= costs[0]
    server = re.search(r"```yaml\n(generate:.*?)```", text, re.DOTALL)
    assert server is not None
    Path("server.yaml").write_text("extends: kl.yaml\n" + server.group(1))
    assert recipe_file.read("server.yaml", files=WRITING).generate.server.requests == 32  # type: ignore[union-attr]
