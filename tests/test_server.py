"""Text from a server: one that speaks the protocol here, and `transformers serve`, really running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib import request

import pytest
from test_generate import ending_teacher, read, write, writing

from tailkd import generation
from tailkd.errors import DataError, Preempted, Refusal
from tailkd.teacher import server

__all__ = ["writing"]  # a fixture

Answer = tuple[int, Any]


class Stub:
    """A server that completes a prompt with its number of words, unless `before` has another answer to a request."""

    def __init__(self, kind: str, before: Callable[[int, dict[str, Any]], Answer | None]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most = self.now = 0
        self.url = ""
        self.kind, self.before, self.lock = kind, before, threading.Lock()

    def get(self, path: str) -> Answer:
        if path == "/openapi.json" and self.kind == "transformers":
            return 200, {"paths": {"/load_model": {}, "/v1/completions": {}}}
        if path == "/v1/models" and self.kind == "vllm":
            return 200, {"data": [{"id": "teacher", "owned_by": "vllm"}]}
        return 404, {"error": "no such page"}

    def post(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self.lock:
            self.bodies.append(body)
            self.headers.append(headers)
            number = len(self.bodies)
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            told = self.before(number, body)
        finally:
            with self.lock:
                self.now -= 1
        if told is not None:
            return told
        words = len(body["prompt"].split())
        choice = {"text": f" {words} words", "finish_reason": "length" if words % 2 else "stop"}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}


@contextmanager
def serving(
    kind: str = "openai", before: Callable[[int, dict[str, Any]], Answer | None] = lambda n, b: None
) -> Iterator[Stub]:
    stub = Stub(kind, before)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*stub.get(self.path))

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(*stub.post(body, dict(self.headers)))

        def answer(self, status: int, content: Any) -> None:
            if status == 0:
                return  # hangs up
            with suppress(BrokenPipeError):  # nobody waits any more
                self.send(status, content)

        def send(self, status: int, content: Any) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *arguments: None  # a client that has gone away
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        stub.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield stub
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.001)


def test_a_server_writes_in_the_prompts_order(writing: dict[str, Any], tmp_path: Path) -> None:
    """Though its answers come in another."""
    with serving(before=lambda number, body: time.sleep(0.03 * (number % 4))) as stub:
        lines = write(writing, server={"url": stub.url, "requests": 4})
    assert 1 < stub.most <= 4
    assert all(isinstance(body["prompt"], str) and "n" not in body for body in stub.bodies)
    assert len({body["seed"] for body in stub.bodies}) == 20
    local = write(writing, out=str(tmp_path / "local.jsonl"), max_new_tokens=1)
    assert {line["id"] for line in lines} == {line["id"] for line in local}
    numbers = [int(line["id"].rpartition(":")[2]) for line in lines]
    assert numbers == sorted(numbers)
    for line in lines:
        words = len(line["prompt"].split())
        assert line["completion"] == f" {words} words"
        assert line["text"] == line["prompt"] + line["completion"]
        assert line["finished"] == (words % 2 == 0)
        assert line["tokens"] == 3
    assert {line["finished"] for line in lines} == {True, False}


def test_each_kind_of_server_is_told_the_sampling_its_own_way(writing: dict[str, Any], tmp_path: Path) -> None:
    shared = {"model", "prompt", "max_tokens", "seed"}
    for kind in ("openai", "vllm", "transformers"):
        with serving(kind) as stub:
            out, asked = str(tmp_path / f"{kind}.jsonl"), {"url": f"{stub.url}/v1/", "model": "teacher"}
            write(writing, out=out, server=asked, count=1, temperature=0.7, top_p=0.9)
        body = stub.bodies[0]
        assert (body["model"], body["max_tokens"]) == ("teacher", 12)
        if kind == "transformers":
            assert body.keys() == {*shared, "generation_config"}
            config = json.loads(body["generation_config"])
            assert config["do_sample"]
            assert config["eos_token_id"] == [1]
            assert (config["temperature"], config["top_p"], config["top_k"], config["max_new_tokens"]) == (
                0.7,
                0.9,
                0,
                12,
            )
        else:
            extra = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0} if kind == "vllm" else {}
            assert body.items() >= {"temperature": 0.7, "top_p": 0.9, **extra}.items()
            assert body.keys() == {*shared, "temperature", "top_p", *extra}


def test_what_fails_is_tried_again(writing: dict[str, Any]) -> None:
    """Too many requests, an error within, no answer at all, half an answer, one that takes too long."""
    troubles = {1: (429, "wait"), 2: (500, "oh"), 3: (0, ""), 4: (200, b'{"choices": ['), 6: (503, "busy")}

    def before(number: int, body: dict[str, Any]) -> Answer | None:
        if number == 5:
            time.sleep(0.6)
        return troubles.get(number)

    with serving(before=before) as stub:
        lines = write(writing, server={"url": stub.url, "requests": 2, "timeout": 0.3})
    assert len(lines) == 20
    assert len(stub.bodies) == 26


def test_a_server_that_stays_broken_ends_it_and_the_same_command_goes_on(
    writing: dict[str, Any], tmp_path: Path
) -> None:
    broken = True
    with serving(before=lambda number, body: (500, "no memory left") if broken and number > 9 else None) as stub:
        asked = {"url": stub.url, "requests": 3, "retries": 2}
        with pytest.raises(DataError, match=r"failed 3 times \(500 .*no memory left.*what is written stands"):
            write(writing, server=asked)
        partial = Path(writing["generate"]["out"] + ".partial")
        begun = partial.read_bytes()
        assert 5 <= begun.count(b"\n") <= 9
        broken = False
        seen = len(stub.bodies)
        lines = write(writing, server=asked)
        # What was tried again when the first command ended may come late; it is of lines that are missing.
        assert len({body["prompt"] for body in stub.bodies[seen:]}) == 20 - begun.count(b"\n")
        whole = write(writing, server=asked, out=str(tmp_path / "whole.jsonl"))
    assert lines == whole
    assert Path(writing["generate"]["out"]).read_bytes().startswith(begun)


def test_no_server_a_refusing_one_and_one_of_another_kind(
    writing: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        Refusal, match=rf"generate.server.url: no server answers at {url} \(.*refused\); start one there"
    ):
        write(writing, server={"url": url})
    cases: dict[str, Answer] = {
        r"refuses the request: 404 .*no such model.*; set generate.server.model": (404, {"error": "no such model"}),
        r"refuses the request: 401 .*environment variable TAILKD_API_KEY": (401, {"error": "who are you"}),
        r"answers what is no completion \(.*hello.*\); expected choices": (200, {"hello": 1}),
    }
    for words, answer in cases.items():
        with serving(before=lambda number, body, answer=answer: answer) as stub, pytest.raises(Refusal, match=words):
            write(writing, server={"url": stub.url})
        assert not Path(writing["generate"]["out"] + ".partial").exists()
    monkeypatch.setenv("TAILKD_API_KEY", "a-key-of-letters")
    with serving(before=lambda number, body: (403, "bad key a-key-of-letters")) as stub:
        with pytest.raises(Refusal) as refused:
            write(writing, server={"url": stub.url})
        assert stub.headers[0]["Authorization"] == "Bearer a-key-of-letters"
    assert "bad key ***" in str(refused.value)
    with serving() as stub:
        write(writing, server={"url": stub.url})
    folder = Path(writing["generate"]["out"]).parent
    assert not [path for path in folder.rglob("*") if path.is_file() and b"a-key-of-letters" in path.read_bytes()]


def test_a_signal_waits_for_no_answer(writing: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()

    def before(number: int, body: dict[str, Any]) -> None:
        if number > 4:
            slow.wait(20)

    real = generation.Lines.append

    def append(lines: Any, record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(lines, record)

    monkeypatch.setattr(generation.Lines, "append", append)
    with serving(before=before) as stub:
        start = time.monotonic()
        with pytest.raises(Preempted):
            write(writing, server={"url": stub.url, "requests": 8})
        assert time.monotonic() - start < 5
        slow.set()
    assert len(read(writing["generate"]["out"] + ".partial")) == 1


# ----- transformers serve


@pytest.mark.slow
def test_transformers_serve_writes_what_transformers_write(
    writing: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path
) -> None:
    """Greedy: the same file. Drawn: by our settings and not the model's own, and the same again with one request."""
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: pip install 'tailkd[serve]'")
    teacher = ending_teacher(stranger, tmp_path / "teacher", rows=400)
    values = {**writing, "teacher": {"model": str(teacher)}}
    local = write(values, temperature=0, out=str(tmp_path / "local.jsonl"))
    with _transformers_serve(teacher) as url:
        asked = {"url": url, "requests": 4}
        served = write(values, temperature=0, server=asked, out=str(tmp_path / "served.jsonl"))
        one = {**asked, "requests": 1}
        drawn = [write(values, server=one, out=str(tmp_path / f"drawn-{n}.jsonl")) for n in range(2)]
        likely = write(values, server=one, top_k=1, out=str(tmp_path / "likely.jsonl"))
    texts = {line["id"]: (line["text"], line["finished"], line["tokens"]) for line in local}
    assert {line["id"]: (line["text"], line["finished"], line["tokens"]) for line in served} == texts
    assert len({line["finished"] for line in served}) == 2
    assert drawn[0] == drawn[1] != served
    assert likely == served


@contextmanager
def _transformers_serve(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = model.with_name("serve.log").open("w+")
    process = subprocess.Popen([*command, "--device", "cpu"], stdout=log, stderr=log, env=variables)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                request.urlopen(f"{url}/health", timeout=5).read()
                break
            except OSError:
                log.flush()
                said = Path(log.name).read_text()
                assert process.poll() is None, said
                assert time.monotonic() < until, said
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()
        log.close()
