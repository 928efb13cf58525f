"""Text that a server writes: any that speaks OpenAI's /v1/completions, such as vLLM, SGLang, `transformers serve`."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from tailkd.errors import DataError, Refusal
from tailkd.teacher.rollout import HALF_A_CHARACTER, Pairs, Prompt, Sampling, Written

KEY = "TAILKD_API_KEY"
"""Environment variable with the server's key, where it asks for one; it is sent and written nowhere."""

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
SHOWN = 300  # letters of what a server answers
OWNERS = ("vllm", "sglang")  # as their lists of models say


@dataclass
class Server:
    """A server as an `Engine` (see `teacher.rollout`): one string prompt a request, in the prompts' order.

    model: its name there. ends: ids of the end tokens, which `transformers serve` has to be told. A completion has
    a seed of its own; `transformers serve` sets it for the whole process, so that what it draws is the same again only
    with `requests` 1.

    Raises:
        Refusal: no server, or one that does not take the request (4xx).
        DataError: a request failed `retries` times more.
    """

    url: str
    model: str
    sampling: Sampling
    ends: tuple[int, ...] = ()
    kind: str = "auto"
    requests: int = 8
    timeout: float = 600.0
    retries: int = 6
    _open: set[http.client.HTTPConnection] = field(default_factory=set)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.kind == "auto":
            self.kind = self._asked_kind()

    def __call__(self, prompts: Iterable[Prompt], done: int = 0) -> Pairs:
        left = islice(prompts, done, None)
        under_way: deque[tuple[Prompt, Future[Written]]] = deque()
        pool = ThreadPoolExecutor(self.requests)
        try:
            for prompt in left:
                under_way.append((prompt, pool.submit(self._complete, prompt)))
                if len(under_way) >= 2 * self.requests:
                    yield _first(under_way)
            while under_way:
                yield _first(under_way)
        finally:
            self._stop(pool)

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        """Nobody waits for answers that nobody reads."""
        self._stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for connection in list(self._open):
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(2)
        pool.shutdown()
        self._stopped.clear()

    def _complete(self, prompt: Prompt) -> Written:
        answer = self._patiently("/v1/completions", self._body(prompt))
        try:
            choice = answer["choices"][0]
            text, finished = choice["text"], choice["finish_reason"] == "stop"
            tokens = (answer.get("usage") or {}).get("completion_tokens")
            return Written(text if finished else text.rstrip(HALF_A_CHARACTER), finished, tokens)
        except (LookupError, TypeError, AttributeError) as error:
            raise Refusal(
                f"{self.url} answers what is no completion ({json.dumps(answer)[:SHOWN]}); expected choices with text "
                "and finish_reason: give the URL of an OpenAI-compatible server"
            ) from error

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        asked = self.sampling
        body: dict[str, Any] = {"model": self.model, "prompt": prompt.text, "max_tokens": asked.max_new_tokens}
        if asked.temperature:
            body["seed"] = asked.seed_of(prompt) % 2**32
        if self.kind == "transformers":  # refuses top_k, and draws only where this string says so
            return {**body, "generation_config": json.dumps(self._generation_config())}
        body |= {"temperature": asked.temperature, "top_p": asked.top_p}
        if self.kind == "vllm":  # else the model's own generation_config.json would hold
            body |= {"top_k": asked.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return body

    def _generation_config(self) -> dict[str, Any]:
        asked = self.sampling
        drawing = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": asked.top_k}
        return {
            "max_new_tokens": asked.max_new_tokens,
            "do_sample": bool(asked.temperature),
            **(drawing if asked.temperature else {}),
            "repetition_penalty": 1.0,
            "eos_token_id": list(self.ends),
            "pad_token_id": self.ends[0],
        }

    def _asked_kind(self) -> str:
        """What the server says of itself.

        Raises:
            Refusal: none is there.
        """
        status, content = self._once("GET", "/openapi.json")
        with suppress(ValueError, TypeError, AttributeError):
            if status == 200 and "/load_model" in json.loads(content)["paths"]:
                return "transformers"
        status, content = self._once("GET", "/v1/models")
        with suppress(ValueError, LookupError, TypeError):
            if status == 200 and json.loads(content)["data"][0]["owned_by"] in OWNERS:
                return "vllm"
        return "openai"

    def _once(self, method: str, path: str) -> tuple[int, bytes]:
        try:
            status, _, content = self._send(method, path, None)
            return status, content
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(
                f"generate.server.url: no server answers at {self.url} ({_words(error)}); start one there, such as "
                f"`transformers serve {self.model}` or `vllm serve {self.model}`, or give another URL"
            ) from error

    def _patiently(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        said = "stopped"
        for attempt in range(self.retries + 1):
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)
            try:
                status, asked_pause, content = self._send("POST", path, body)
                if status == 200:
                    return json.loads(content)
                said = f"{status} {_short(content)}"
                if status not in AGAIN:
                    raise Refusal(f"{self.url} refuses the request: {said}{_hint(status)}")
                pause = max(pause, asked_pause)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                said = _words(error)
            if attempt < self.retries and self._stopped.wait(pause):
                break
        raise DataError(
            f"{self.url} failed {self.retries + 1} times ({said}); what is written stands: see to the server and run "
            "the same command again"
        )

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, float, bytes]:
        """Status, seconds to wait that it asks for, content."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        self._open.add(connection)
        try:
            connection.connect()
            if self._stopped.is_set():  # it was not connected yet when all others were closed
                raise OSError("stopped")
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path.rstrip("/").removesuffix("/v1") + path, content, headers)
            answer = connection.getresponse()
            return answer.status, _seconds(answer.getheader("Retry-After")), answer.read()
        finally:
            self._open.discard(connection)
            connection.close()


def _first(under_way: deque[tuple[Prompt, Future[Written]]]) -> tuple[Prompt, Written]:
    prompt, future = under_way.popleft()
    return prompt, future.result()


def _seconds(header: str | None) -> float:
    with suppress(ValueError, TypeError):
        return min(LONGEST_PAUSE, max(0.0, float(header or 0)))
    return 0.0


def _short(content: bytes) -> str:
    return " ".join(content.decode("utf-8", "replace").split())[:SHOWN]


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"; put the server's key into the environment variable {KEY}"
    return "; set generate.server.model to the name it serves the model by" if status == 404 else ""
