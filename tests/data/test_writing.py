"""Preparing on many processes, killed and resumed: the same bytes; and what is said of a store that is damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import torch

from tailkd.data import encoding, tokens, writing
from tailkd.data.corpus import Document, Source
from tailkd.data.files import BadRecords
from tailkd.data.overlap import Overlap
from tailkd.data.tokens import Options, TokenStore
from tailkd.errors import DataError, Refusal


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """300 documents in blocks of 16, some records of it bad, the last one too."""
    monkeypatch.setattr(writing, "BLOCK_DOCUMENTS", 16)
    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.0)
    path = builders.write_corpus(tmp_path / "corpus.jsonl", documents=300)
    lines = path.read_text().splitlines()
    for place in (40, 170, 301):
        lines.insert(place, '{"text": null}')
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(path: Path, tokenizer: Any, folder: Path, said: list[str] | None = None, **options: Any) -> TokenStore:
    def say(message: str) -> None:
        if said is not None:
            said.append(message)

    values = {"usable": len(tokenizer), "max_bad": 0.1, "say": say, "options": Options(**options)}
    return tokens.prepare(Source(path=str(path)), tokenizer, folder, **values)


def content(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


def stopped_after(blocks: int, error: type[BaseException]) -> Callable[..., Any]:
    plain = encoding.ids_of

    def encode(tokenizer: Any, texts: list[str]) -> Any:
        nonlocal blocks
        blocks -= 1
        if blocks < 0:
            raise error
        return plain(tokenizer, texts)

    return encode


def test_any_number_of_processes_writes_the_same(stranger: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    made = [content(prepare(corpus, stranger.tokenizer, tmp_path / str(n), processes=n)) for n in (1, 2, 5)]
    assert made[0] == made[1] == made[2]
    manifest = json.loads(made[0]["manifest.json"])
    assert (manifest["documents"], manifest["skipped"]) == (300, {"field 'text' is not text": 3})
    assert set(made[0]) == {"manifest.json", "tokens.bin", "offsets.bin", "hashes.bin"}


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_interrupted_goes_on_and_ends_the_same(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    whole = prepare(corpus, stranger.tokenizer, tmp_path / "whole")
    folder, said = tmp_path / "store", []
    for blocks in (3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(encoding, "ids_of", stopped_after(blocks, KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare(corpus, stranger.tokenizer, folder, processes=1)
    (partial,) = folder.glob(".*-partial")
    with (partial / "tokens.bin").open("ab") as file:
        file.write(b"what a killed process had not committed")
    resumed = prepare(corpus, stranger.tokenizer, folder, said, processes=processes)
    assert said[0].startswith("tokens: going on behind 112 documents")
    assert content(resumed) == content(whole)
    assert resumed.hash == whole.hash
    assert [path.name for path in folder.iterdir()] == [resumed.folder.name]


SLOW = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from tailkd.data import encoding, tokens, writing
from tailkd.data.corpus import Source
writing.BLOCK_DOCUMENTS, writing.COMMIT_SECONDS = 16, 0.0
plain = encoding.ids_of
def encode(tokenizer, texts):
    time.sleep(0.05)
    return plain(tokenizer, texts)
encoding.ids_of = encode
corpus, tokenizer, folder = sys.argv[1:]
loaded = AutoTokenizer.from_pretrained(tokenizer)
options = tokens.Options(processes=2)
def say(message):
    print(message, flush=True)
tokens.prepare(Source(path=corpus), loaded, Path(folder), usable=len(loaded), max_bad=0.1, say=say, options=options)
"""


def test_killed_processes_leave_none_behind_and_the_next_ends_the_same(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path
) -> None:
    import psutil

    whole = prepare(corpus, stranger.tokenizer, tmp_path / "whole")
    command = [sys.executable, "-c", SLOW, str(corpus), str(stranger.teacher), str(tmp_path / "store")]
    for blocks in (3, 7):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        assert process.stdout is not None
        for _ in range(blocks):
            assert "documents" in process.stdout.readline()
        below = psutil.Process(process.pid).children()
        assert len(below) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not psutil.wait_procs(below, timeout=10)[1]
    assert list((tmp_path / "store").glob(".*-partial"))
    resumed = prepare(corpus, stranger.tokenizer, tmp_path / "store")
    assert (resumed.hash, content(resumed)) == (whole.hash, content(whole))


def test_a_process_that_is_killed_is_said(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(tokenizer: Any, texts: list[str]) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "ids_of", encode)
        with pytest.raises(DataError, match=r"a process that tokenises was killed.*data.processes: fewer need less"):
            prepare(corpus, stranger.tokenizer, tmp_path / "store", processes=2)
    assert len(prepare(corpus, stranger.tokenizer, tmp_path / "store")) == 300


def test_a_disk_that_takes_nothing_more_is_said(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, encoded: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing._Writer, "append", full)
        with pytest.raises(DataError, match=r"stopped \(\[Errno 28\] No space left on device\); what is done stands"):
            prepare(corpus, stranger.tokenizer, tmp_path / "store")
    assert len(prepare(corpus, stranger.tokenizer, tmp_path / "store")) == 300


def test_a_second_process_waits_for_the_first(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, made, plain = [], [], encoding.ids_of

    def slow(tokenizer: Any, texts: list[str]) -> Any:
        time.sleep(0.05)
        return plain(tokenizer, texts)

    monkeypatch.setattr(encoding, "ids_of", slow)

    def work() -> None:
        made.append(prepare(corpus, stranger.tokenizer, tmp_path / "store", said, processes=1))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0].folder == made[1].folder
    assert sum("waiting for another process" in message for message in said) == 1
    assert sum(message.startswith("tokens: 300 documents") for message in said) == 1


def test_refusals_come_out_of_processes_and_leave_nothing(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=rf"{corpus}:\d+: token .* lies outside the 399 ids"):
        tokens.prepare(
            Source(path=str(corpus)),
            stranger.tokenizer,
            tmp_path / "new" / "store",
            usable=399,
            max_bad=0.1,
            say=lambda message: None,
            options=Options(processes=2),
        )
    assert not (tmp_path / "new").exists()


# ----- a limit


@pytest.mark.parametrize("processes", [1, 3])
def test_a_limit_takes_whole_documents_from_the_first(
    stranger: SimpleNamespace, corpus: Path, tmp_path: Path, processes: int
) -> None:
    whole = prepare(corpus, stranger.tokenizer, tmp_path)
    limit = int(whole.offsets[57]) + 3
    store = prepare(corpus, stranger.tokenizer, tmp_path, limit=limit, processes=processes)
    assert store.folder != whole.folder
    assert (len(store), store.manifest["tokens"]) == (57, whole.offsets[57])
    assert store.tokens.tolist() == whole.tokens[: whole.offsets[57]].tolist()
    assert store.manifest["skipped"] == {"field 'text' is not text": 1}
    assert prepare(corpus, stranger.tokenizer, tmp_path, limit=10**9).manifest["documents"] == 300
    exact = prepare(corpus, stranger.tokenizer, tmp_path, limit=int(whole.offsets[57]))
    assert len(exact) == 57
    with pytest.raises(Refusal, match=r"its first document alone has more than tokens = 5; give more"):
        prepare(corpus, stranger.tokenizer, tmp_path, limit=5)


# ----- an overlap check


def test_documents_that_share_words_are_marked_exactly(
    stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"question": "How many apples, then, has Ann-Marie?"}\n{"question": "Short."}\n')
    path = tmp_path / "corpus.jsonl"
    texts = [
        "they ask HOW many\n apples then has... ann marie and go",
        "how many apples then has",
        "how many apples has ann marie then",
        "many apples then has Ann Marie",
        "",
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:4], "short"]))
    overlap = Overlap.of([Source(path=str(exam), text="question")], 6)
    assert (overlap.items, overlap.short) == (2, 1)
    for processes in (1, 2):
        monkeypatch.setattr(writing, "BLOCK_DOCUMENTS", 2)
        store = prepare(path, stranger.tokenizer, tmp_path / str(processes), overlap=overlap, processes=processes)
        assert store.overlaps.tolist() == [True, False, False, True, False]
    plain = prepare(path, stranger.tokenizer, tmp_path / "1")
    assert plain.folder != prepare(path, stranger.tokenizer, tmp_path / "1", overlap=overlap).folder
    assert not plain.overlaps.any()
    with pytest.raises(Refusal, match=r"none of the 2 texts of .*exam.jsonl has 13 words, so nothing could be found"):
        Overlap.of([Source(path=str(exam), text="question")], 13)


def test_a_hash_that_meets_by_chance_is_no_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailkd.data import overlap as module

    monkeypatch.setattr(module, "_hashed", lambda windows: np.zeros(len(windows), dtype=np.uint64))
    (tmp_path / "exam.jsonl").write_text('{"text": "one two three four"}\n')
    found = Overlap.of([Source(path=str(tmp_path / "exam.jsonl"))], 3).found
    assert [found(text) for text in ("two three four", "three two one", "one two four")] == [True, False, False]


def test_overlaps_equal_a_search_by_hand(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    exam = builders.write_corpus(tmp_path / "exam.jsonl", documents=20, seed=5)
    questions = [json.loads(line)["text"].lower().replace(".", " ").split() for line in exam.open()]
    runs = {tuple(words[i : i + 5]) for words in questions for i in range(len(words) - 4)}
    overlap = Overlap.of([Source(path=str(exam))], 5)
    hits = 0
    for _ in range(300):
        text = " ".join(builders.sentence(generator, 9) for _ in range(4))
        words = text.lower().replace(".", " ").split()
        expected = any(tuple(words[i : i + 5]) in runs for i in range(len(words) - 4))
        assert overlap.found(text) == expected
        hits += expected
    assert 20 < hits < 280


# ----- opening


def test_a_damaged_store_is_said(stranger: SimpleNamespace, corpus: Path, tmp_path: Path) -> None:
    store = prepare(corpus, stranger.tokenizer, tmp_path)
    store.verify()
    kept = (store.folder / "tokens.bin").read_bytes()
    (store.folder / "tokens.bin").write_bytes(kept[:-2])
    with pytest.raises(
        Refusal, match=r"tokens.bin is [\d,]+ bytes long, expected [\d,]+ bytes: delete the folder, and"
    ):
        prepare(corpus, stranger.tokenizer, tmp_path)
    (store.folder / "tokens.bin").unlink()
    with pytest.raises(Refusal, match=r"tokens.bin is missing, expected"):
        prepare(corpus, stranger.tokenizer, tmp_path)
    (store.folder / "tokens.bin").write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(Refusal, match=r"tokens.bin is damaged: delete the folder, and the same command makes it anew"):
        prepare(corpus, stranger.tokenizer, tmp_path).verify()
    (store.folder / "manifest.json").write_text("{")
    with pytest.raises(Refusal, match=r"manifest.json is damaged .*: delete the folder"):
        prepare(corpus, stranger.tokenizer, tmp_path)


def test_a_large_store_opens_at_once(tmp_path: Path) -> None:
    """20 million documents and 60 GB of (sparse) tokens: what is opened is mapped, not read."""
    documents, length = 20_000_000, 1_500
    sizes = {"tokens.bin": 2 * documents * length, "offsets.bin": 8 * (documents + 1), "hashes.bin": 8 * documents}
    for name, size in sizes.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    files = {name: {"bytes": size, "hash": ""} for name, size in sizes.items()}
    manifest = {"dtype": "uint16", "documents": documents, "files": files, "made_of": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    started = time.perf_counter()
    store = tokens.open_store(tmp_path, {})
    assert (len(store), len(store.tokens), len(store.hashes)) == (documents, documents * length, documents)
    assert store.offsets[7] == 0
    assert time.perf_counter() - started < 1


def test_memory_stays_flat(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """40 MB of records of 4 kB: the reader is only a few blocks ahead, however slow the work is."""
    ahead = most = 0

    def documents(bad: BadRecords) -> Iterator[Document]:
        nonlocal ahead, most
        for number in range(10_000):
            ahead += 1
            most = max(most, ahead)
            yield Document(str(number), "a " * 2_000, number)

    def encode(block: list[Document]) -> writing.Block:
        lengths = np.full(len(block), 3)
        return writing.Block(
            lengths, {"bytes": lengths}, {"tokens": np.zeros(3 * len(block), np.uint16)}, {}, len(block)
        )

    class Counted(writing._Writer):
        def append(self, block: writing.Block) -> None:
            nonlocal ahead
            ahead -= len(block.lengths)
            super().append(block)

    for processes in (1, 2):
        ahead = most = 0
        folder = tmp_path / str(processes)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "_Writer", Counted)
            done, _ = writing.write(
                documents, encode, folder, limit=None, processes=processes, say=lambda message: None
            )
        assert (done.documents, ahead) == (10_000, 0)
        assert most <= (writing.BLOCK_LETTERS // 4_000 + 1) * (2 * processes + 2)
