"""A model answers mathematics sets: as alone, as word by word, and into the same file however often it is killed."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailkd.errors import OutOfMemory, Refusal
from tailkd.evaluate.mathematics import extract, grade, solving, tasks
from tailkd.evaluate.mathematics.solving import Solver, measured
from tailkd.teacher import rollout
from tailkd.teacher.rollout import Prompt, Rollout, Sampling

STORIES = Path(os.environ.get("TAILKD_DATA", "nowhere")) / "models" / "stories260k"
SHOTS = "\n\n\n".join(f"Question: the river had {n} stones and lost {n}.\nAnswer: The answer is 0." for n in (3, 8, 11))


@pytest.fixture(scope="module", params=["made", "stories260k"])
def writer(request: pytest.FixtureRequest, stranger: SimpleNamespace) -> SimpleNamespace:
    """A made Llama and, where it lies, a really pretrained one, in float32."""
    folder = stranger.teacher if request.param == "made" else STORIES
    if not folder.is_dir():
        pytest.skip("TAILKD_DATA names no folder with models/stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder like the published ones: questions of many lengths, few words and small answers."""
    draw = random.Random(1)
    for folder in ("data/math", "data/prompts/cot"):
        (tmp_path / folder).mkdir(parents=True)
    with (tmp_path / "data" / "math" / "gsm8k.jsonl").open("w") as file:
        for number in range(9):
            words = " ".join(draw.choice(builders.WORDS) for _ in range(draw.randrange(1, 14)))
            file.write(
                json.dumps({"question": f"{number} {words}?", "answer": f"so\n#### {number}", "idx": number}) + "\n"
            )
    (tmp_path / "data" / "prompts" / "cot" / "gsm8k.md").write_text(SHOTS)
    return tmp_path / "data" / "math"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solving, "MAX_NEW_TOKENS", 16)


def asked(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "data": data,
        "prompts": None,
        "out": out,
        "limit": None,
        "batch_size": 4,
        "command": "tailkd evaluate x",
    }
    return {**options, "say": lambda line: None, **changes}


def plain(writer: SimpleNamespace, ids: Sequence[int], tokens: int) -> list[int]:
    """The likeliest token after token, each from all before it: no cache, no padding, no batch."""
    written: list[int] = []
    while len(written) < tokens and (not written or written[-1] != writer.tokenizer.eos_token_id):
        with torch.no_grad():
            scores = writer.model(torch.tensor([[*ids, *written]])).logits[0, -1, : len(writer.tokenizer)]
        written.append(int(scores.argmax()))
    return written


def prompts_of(data: Path) -> list[str]:
    return [item.prompt for item in tasks.read_items("gsm8k", data)]


# ----- what is written


def test_together_as_alone_and_as_token_after_token(
    writer: SimpleNamespace, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(data)
    ids = [writer.tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert len({len(row) for row in ids}) > 5
    solver = Solver(writer.model, writer.tokenizer)
    shared: list[int] = []
    real = Rollout._padded
    monkeypatch.setattr(Rollout, "_padded", lambda *a: shared.append(a[-1]) or real(*a))
    together = solver(prompts)
    assert rollout.SHARED < shared[0] < min(map(len, ids))
    assert together == [solver([prompt])[0] for prompt in prompts]
    assert shared[1:] == [0] * len(prompts)
    for row, answer in zip(ids, together, strict=True):
        written = plain(writer, row, 16)
        assert answer.tokens == len(written)
        before, whole = (writer.tokenizer.decode(one, skip_special_tokens=True) for one in (row, row + written))
        assert before + answer.text == whole.rstrip("\ufffd")
    monkeypatch.setattr(rollout, "SHARED", 10_000)
    assert solver(prompts) == together
    assert shared[-1] == 0


@pytest.mark.parametrize(("window", "reads_once"), [(None, True), (24, False)])
def test_what_layers_with_a_window_read(
    stranger: SimpleNamespace, data: Path, window: int | None, reads_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding inside a prompt would push tokens out of a window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=400, num_key_value_heads=2, sliding_window=window, initializer_range=0.3, **sizes)
    model = MistralForCausalLM(config).eval()
    shared: list[int] = []
    real = Rollout._padded
    monkeypatch.setattr(Rollout, "_padded", lambda *a: shared.append(a[-1]) or real(*a))
    prompts = prompts_of(data)
    together = Solver(model, stranger.tokenizer)(prompts)
    assert (shared[0] > 0) == reads_once
    windowed = SimpleNamespace(model=model, tokenizer=stranger.tokenizer)
    for prompt, answer in zip(prompts, together, strict=True):
        row = stranger.tokenizer(prompt)["input_ids"]
        written = plain(windowed, row, 16)
        whole = stranger.tokenizer.decode(row + written, skip_special_tokens=True).rstrip("\ufffd")
        assert prompt + answer.text == whole


def test_a_text_ends_with_its_first_stop_string(writer: SimpleNamespace, data: Path) -> None:
    """At the token that completes it, in each row of a batch where it happens."""
    rows = [tuple(writer.tokenizer(prompt)["input_ids"]) for prompt in prompts_of(data)]
    prompts = [Prompt("", number, row, "", "") for number, row in enumerate(rows)]
    options = {"usable": len(writer.tokenizer), "batch_size": len(rows)}
    free = Rollout(writer.model, writer.tokenizer, Sampling(24, 0.0), **options).write(prompts)
    letters = "".join(one.completion for one in free)
    stops = (letters[len(letters) // 3 :][:2], letters[len(letters) // 2 :][:1])
    stopped = Rollout(writer.model, writer.tokenizer, Sampling(24, 0.0), **options, stops=stops).write(prompts)
    ended = 0
    for prompt, one, other in zip(prompts, free, stopped, strict=True):
        if not any(stop in one.completion for stop in stops):
            assert other == one
            continue
        ended += 1
        assert other.finished
        assert one.completion.startswith(other.completion)
        assert any(stop in other.completion for stop in stops)
        assert other.tokens is not None
        written = plain(writer, prompt.ids, other.tokens - 1)
        before, less = (
            writer.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt.ids, [*prompt.ids, *written])
        )
        assert not any(stop in less[len(before) :] for stop in stops)
    assert ended > 2


def test_answers_have_the_room_that_the_positions_leave(stranger: SimpleNamespace) -> None:
    """Whole powers of two, so that an answer does not depend on the prompts beside it."""
    solver = Solver(builders.build_model(400, max_position_embeddings=30), stranger.tokenizer)
    rooms = [solver._room(Prompt("", 0, (5,) * length, "", "")) for length in (1, 14, 15, 22, 23, 28, 29, 30, 31)]
    assert rooms == [16, 16, 8, 8, 4, 2, 1, 0, 0]
    answers = solver(["a" * 5, "the river and the stone " * 4, "the river", "x " * 40])
    assert [answer.tokens for answer in answers] == [
        solver([text])[0].tokens for text in ("aaaaa", "the river and the stone " * 4, "the river", "x " * 40)
    ]
    endless = copy.deepcopy(solver)
    endless.positions = None
    assert endless._room(Prompt("", 0, (5,) * 99, "", "")) == 16


def test_an_end_token_behind_the_prompt_is_dropped(stranger: SimpleNamespace) -> None:
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(stranger.tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    solver = Solver(builders.build_model(400), ending)
    assert solver._ids("the river") == (0, *stranger.tokenizer("the river")["input_ids"])


def test_a_batch_that_does_not_fit(stranger: SimpleNamespace, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(stranger.teacher)

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Rollout, "_generate", full)
    with pytest.raises(OutOfMemory, match=r"4 answers of up to 16 tokens after \d+ do not fit .*: lower --batch-size"):
        measured(model, stranger.tokenizer, ["gsm8k"], **asked(data, tmp_path))


# ----- the results


def test_an_entry_and_its_samples(writer: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (entry,) = measured(writer.model, writer.tokenizer, ["gsm8k"], **asked(data, tmp_path, say=said.append, limit=7))
    samples = [json.loads(line) for line in (tmp_path / entry["samples"]).open()]
    assert entry["samples"] == "tasks/mathematics/gsm8k-3-first-7.jsonl"
    assert [sample["id"] for sample in samples] == [str(number) for number in range(7)]
    for sample, score in zip(samples, entry["scores"], strict=True):
        assert sample["correct"] == score == grade("gsm8k", sample["generated"], sample["gold"])
        assert sample["extracted"] == extract("gsm8k", sample["generated"])
        assert sample["prompt"].startswith(SHOTS)
        assert sample["question"] in sample["prompt"]
        assert 0 < sample["tokens"] <= 16
    expected = {"task": "gsm8k", "suite": "mathematics", "shots": 3, "metric": "exact", "items": 7, "limit": 7}
    expected |= {"data": "gsm8k.jsonl", "unasked": 0, "command": "tailkd evaluate x"}
    assert entry.items() >= expected.items()
    assert entry["value"] == sum(entry["scores"]) / 7
    assert len(entry["items_hash"]) == 16
    assert said[0] == "gsm8k: 7 items"
    whole = measured(writer.model, writer.tokenizer, ["gsm8k"], **asked(data, tmp_path))[0]
    assert whole["samples"] == "tasks/mathematics/gsm8k-3.jsonl"
    assert whole["items_hash"] != entry["items_hash"]
    assert json.loads(json.dumps([entry, whole])) == [entry, whole]


def test_a_prompt_that_is_too_long_counts_as_wrong(stranger: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    lengths = [len(stranger.tokenizer(prompt)["input_ids"]) for prompt in prompts_of(data)]
    positions = sorted(lengths)[5]
    model, said = builders.build_model(400, max_position_embeddings=positions), list[str]()
    (entry,) = measured(model, stranger.tokenizer, ["gsm8k"], **asked(data, tmp_path, say=said.append))
    samples = [json.loads(line) for line in (tmp_path / entry["samples"]).open()]
    long = [length >= positions for length in lengths]
    assert 0 < sum(long) == entry["unasked"] < len(long)
    for sample, length in zip(samples, lengths, strict=True):
        why = f"a prompt of {length} tokens leaves no room among the model's {positions} positions"
        assert sample["unasked"] == (why if length >= positions else "")
        assert length < positions or (sample["correct"], sample["tokens"], sample["generated"]) == (False, 0, "")
    assert [line.endswith("such items count as wrong") for line in said] == [False, True]


def test_another_models_samples_are_refused(stranger: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    model = builders.build_model(400)
    first = measured(model, stranger.tokenizer, ["gsm8k"], **asked(data, tmp_path))
    again = measured(copy.deepcopy(model), stranger.tokenizer, ["gsm8k"], **asked(data, tmp_path, batch_size=3))
    assert again == [{**first[0], "seconds": None}]
    with torch.no_grad():
        next(model.parameters())[7, 7] += 1e-6
    with pytest.raises(Refusal, match="holds samples of another model"):
        measured(model, stranger.tokenizer, ["gsm8k"], **asked(data, tmp_path))
    assert Solver(model, stranger.tokenizer).name != Solver(model.to(torch.bfloat16), stranger.tokenizer).name


def test_every_file_is_there_before_the_first_answer(stranger: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"has no svamp\.jsonl, nor svamp\.jsonl\.gz"):
        measured(builders.build_model(400), stranger.tokenizer, ["gsm8k", "svamp"], **asked(data, tmp_path))
    assert not (tmp_path / "tasks").exists()


def test_the_example_of_the_documentation(stranger: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import measured" in block)
    for shown, here in (("runs/demo/student", stranger.teacher), ("data/math", data), ("runs/demo", tmp_path)):
        code = code.replace(f'"{shown}"', f'"{here}"')
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["results"][0]["items"] == 9
    assert (tmp_path / names["results"][0]["samples"]).is_file()


# ----- interrupted


def test_an_interrupted_measurement_ends_with_the_same_bytes(
    writer: SimpleNamespace, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = measured(writer.model, writer.tokenizer, ["gsm8k"], **asked(data, tmp_path / "whole"))
    real, calls = Rollout.write, 0

    def write(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 4):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Rollout, "write", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measured(writer.model, writer.tokenizer, ["gsm8k"], **asked(data, tmp_path / "cut"))
    (again,) = measured(writer.model, writer.tokenizer, ["gsm8k"], **asked(data, tmp_path / "cut"))
    assert calls == 5  # three batches, and two that were cut off
    assert again == {**entry, "seconds": again["seconds"]}
    whole, cut = (tmp_path / name / entry["samples"] for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()
    assert list(cut.parent.iterdir()) == [cut]


MEASURE = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from tailkd.evaluate.mathematics import solving
torch.set_num_threads(1)
folder, data, out = map(Path, sys.argv[1:])
solving.MAX_NEW_TOKENS = 64
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
options = dict(data=data, prompts=None, out=out, limit=None, batch_size=2, say=print, command="")
solving.measured(model, AutoTokenizer.from_pretrained(folder), ["gsm8k"], **options)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_measurement_ends_with_the_same_bytes(stranger: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    """SIGKILL as soon as another batch is written, or a moment later, until none is left."""
    name = "tasks/mathematics/gsm8k-3.jsonl"

    def start(out: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", MEASURE, str(stranger.teacher), str(data), str(tmp_path / out)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)

    def batches() -> int:
        partial = tmp_path / "killed" / f"{name}.partial"
        return partial.read_bytes().count(b"\n") if partial.is_file() else 0

    assert start("whole").wait() == 0
    draw, kills = random.Random(2), 0
    while True:
        before, process = batches(), start("killed")
        while process.poll() is None and batches() <= before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
        assert batches() > before or (tmp_path / "killed" / name).is_file()
    assert kills > 1
    assert process.returncode == 0
    whole, killed = (tmp_path / out / name for out in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert list(killed.parent.iterdir()) == [killed]
