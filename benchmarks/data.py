"""What preparing costs: throughput against batched `encode_batch`, memory of the process tree, and a kill survived.

Run: python benchmarks/data.py [--bytes N] [--out FILE] [--folder FOLDER]. The text is made on the spot: the sources and
documentation of this Python and its packages, again and again with other numbers and names in it, as JSONL; the
tokenizer is a byte-level BPE of 32,000 ids trained on a part of it. Then, in processes of their own:

- `encode_batch`: `tokenizers` alone on as many cores, which gets ready-made lists of texts and throws the ids away;
- `prepare`: from the JSONL file to the finished store, with hashes of files and records;
- `killed`: the same, killed with SIGKILL at a random moment and started again; its manifest's hash must be the same.

The first two take turns; ratio is the median of prepare's throughput by that of encode_batch. The peak is the sum of
PSS over the process tree, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "data.jsonl"
GOALS = {"peak_pss_bytes": 1.5e9, "ratio": 0.8}
VOCABULARY, DOCUMENT_LETTERS = 32_000, 4_000
SUFFIXES = (".py", ".rst", ".txt", ".md", ".pyi")


# ----- text


def pieces() -> Iterator[str]:
    """Paragraph-long pieces of this Python's sources and of its packages, over and over."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    files = sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    random.Random(0).shuffle(files)
    while True:
        for path in files:
            with suppress(OSError, UnicodeDecodeError):
                text = path.read_text("utf-8")
                yield from (text[i : i + DOCUMENT_LETTERS] for i in range(0, len(text), DOCUMENT_LETTERS))


def varied(text: str, generator: random.Random) -> str:
    """The same text with some words replaced by made-up ones, so that no cache sees the whole of it twice."""
    made_up = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=7))
    number = str(generator.randrange(10**6))
    return (
        re.sub(r"\b(self|return|import|value|name)\b", lambda m: m.group() if m.start() % 3 else made_up, text) + number
    )


def write_text(path: Path, size: int) -> None:
    generator, written = random.Random(1), 0
    with path.open("w", encoding="utf-8") as file:
        for piece in pieces():
            if not piece.strip() or "\x00" in piece:
                continue
            text = varied(piece, generator)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= size:
                return


def texts_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def write_tokenizer(folder: Path, corpus: Path, vocabulary: int = VOCABULARY) -> None:
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(islice(texts_of(corpus), 2_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


# ----- what is measured, each in a process of its own


def rival(tokenizer: Path, corpus: Path) -> None:
    """Seconds of `encode_batch` alone on lists of 1,000 texts, with `tokenizers`' own threads."""
    from tokenizers import Tokenizer

    backend, seconds, batch = Tokenizer.from_file(str(tokenizer / "tokenizer.json")), 0.0, []

    def encode() -> float:
        started = time.perf_counter()
        backend.encode_batch(batch, add_special_tokens=False)
        return time.perf_counter() - started

    for text in texts_of(corpus):
        batch.append(text)
        if len(batch) == 1_000:
            seconds += encode()
            batch = []
    print(json.dumps({"seconds": seconds + (encode() if batch else 0.0)}))


def ours(tokenizer: Path, corpus: Path, store: Path) -> None:
    """Seconds of the whole of `prepare`, and of opening what it made."""
    from transformers import AutoTokenizer

    from tailkd.data.corpus import Source
    from tailkd.data.tokens import prepare

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        made = prepare(
            Source(path=str(corpus)), loaded, store, usable=len(loaded), max_bad=0.0, say=lambda message: None
        )
        assert made.offsets[len(made)] == len(made.tokens)
        times.append(time.perf_counter() - started)
    totals = {name: made.manifest[name] for name in ("documents", "tokens", "bytes")}
    print(json.dumps({"seconds": times[0], "open_seconds": times[1], "hash": made.hash, **totals}))


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--work", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    )


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    found, peak, over = "", 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, pss(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = process.communicate()[0]
    over.set()
    watcher.join()
    assert process.returncode == 0, found
    return {**json.loads(found), "peak_pss_bytes": peak}


def pss(root: int) -> int:
    """Proportional set size in bytes of a process and all below it."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            with suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss
    return total


def kill_and_resume(folder: Path, seconds: float) -> tuple[str, float]:
    """The manifest's hash after a kill at a random moment and a second start, and how long that took."""
    store, finished, moment = folder / "killed", True, seconds + 3.0  # it has to load first
    while finished:
        shutil.rmtree(store, ignore_errors=True)
        moment *= random.SystemRandom().uniform(0.2, 0.9)
        finished = killed(folder, store, moment)
    again = outcome(started("ours", str(folder / "tokenizer"), str(folder / "text.jsonl"), str(store)))
    return again["hash"], again["seconds"]


def killed(folder: Path, store: Path, moment: float) -> bool:
    """Whether it had finished before it was killed."""
    process = started("ours", str(folder / "tokenizer"), str(folder / "text.jsonl"), str(store))
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    finished = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    print(f"killed after {moment:.1f} s" + (" (too late: it had finished)" if finished else ""), flush=True)
    return finished


def measured(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    corpus, tokenizer = folder / "text.jsonl", folder / "tokenizer"
    if not corpus.is_file():
        write_text(corpus, size)
        write_tokenizer(tokenizer, corpus)
    rivals, mine = [], []
    for _ in range(repeats):
        shutil.rmtree(folder / "store", ignore_errors=True)
        rivals.append(outcome(started("rival", str(tokenizer), str(corpus))))
        mine.append(outcome(started("ours", str(tokenizer), str(corpus), str(folder / "store"))))
    hashed, resumed = kill_and_resume(folder, min(one["seconds"] for one in mine))
    assert {one["hash"] for one in mine} == {hashed}, "the resumed store is another one"
    seconds = statistics.median(one["seconds"] for one in mine)
    last = mine[-1]
    return {
        "bytes": last["bytes"],
        "documents": last["documents"],
        "tokens": last["tokens"],
        "seconds": seconds,
        "bytes_per_second": last["bytes"] / seconds,
        "encode_batch_seconds": statistics.median(one["seconds"] for one in rivals),
        "ratio": statistics.median(
            theirs["seconds"] / our["seconds"] for theirs, our in zip(rivals, mine, strict=True)
        ),
        "peak_pss_bytes": max(one["peak_pss_bytes"] for one in mine),
        "open_seconds": last["open_seconds"],
        "resumed_seconds": resumed,
        "manifest_hash": hashed,
        "repeats": repeats,
    }


def about() -> dict[str, Any]:
    from importlib.metadata import version

    from tailkd.data.writing import cores

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    with Path("/proc/cpuinfo").open() as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": cores(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tailkd", "tokenizers", "transformers", "numpy")},
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=lambda text: int(float(text)), default=10**9, help="of text; default 1e9")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the text and the stores; default a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        verb, *paths = chosen.work
        {"rival": rival, "ours": ours}[verb](*map(Path, paths))
        return
    environment = about()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        row = {**measured(Path(folder), chosen.bytes, chosen.repeats), **environment}
    chosen.out.parent.mkdir(exist_ok=True)
    with chosen.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    missed = [
        f"{name} is {row[name]:.3g}, the goal is {goal:g}"
        for name, goal in GOALS.items()
        if (row[name] > goal if name == "peak_pss_bytes" else row[name] < goal)
    ]
    print("goals missed: " + "; ".join(missed) if missed else "all goals met")


if __name__ == "__main__":
    main()
