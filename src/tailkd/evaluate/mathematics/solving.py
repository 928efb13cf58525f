"""A loaded model answers the mathematics sets; results as a run's tasks.json holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import xxhash

from tailkd.data.tokens import tokenizer_fingerprint
from tailkd.errors import OutOfMemory
from tailkd.evaluate.mathematics.scoring import Answer, Scored, score, summary
from tailkd.evaluate.mathematics.tasks import MAX_NEW_TOKENS, STOPS, TASKS, Item, examples, read_items
from tailkd.models.vocabulary import tokenizer_usable_ids
from tailkd.teacher.rollout import Prompt, Rollout, Sampling

FOLDER = Path("tasks") / "mathematics"  # of the samples, in `out`


class Options(TypedDict):
    """data: the folder of the published files. prompts: that of their shots; None for ``data/../prompts/cot``.

    out: the folder of the results. limit: the first so many items of each task; None for all. command: what the user
    typed, for the record.
    """

    data: Path
    prompts: Path | None
    out: Path
    limit: int | None
    batch_size: int
    say: Callable[[str], None]
    command: str


def measured(model: Any, tokenizer: Any, tasks: Iterable[str], **options: Unpack[Options]) -> list[dict[str, Any]]:
    """The model's accuracy on each task, with all of its shots: entries of `results` in tasks.json.

    Each sample is a line of ``out/tasks/mathematics/TASK-SHOTS.jsonl`` (with ``-first-LIMIT`` where there is one). The
    same call goes on where it was interrupted, and ends with the same bytes. docs/evaluation.md has the rules.

    Raises:
        Refusal: an unknown task, a file that is missing or broken, samples of another model in `out`.
        OutOfMemory: a batch does not fit.
    """
    data, prompts = options["data"], options["prompts"]
    read = {task: read_items(task, data, prompts=prompts, limit=options["limit"]) for task in tasks}
    solver = Solver(model, tokenizer, options["say"])
    return [_measured(solver, task, items, options) for task, items in read.items()]


def _measured(solver: Solver, task: str, items: list[Item], options: Options) -> dict[str, Any]:
    shots, limit = len(examples(task, options["data"], options["prompts"])), options["limit"]
    name = FOLDER / (f"{task}-{shots}" + ("" if limit is None else f"-first-{limit}") + ".jsonl")
    scored: Scored = score(
        task,
        items,
        solver,
        log=options["out"] / name,
        generator=solver.name,
        batch_size=options["batch_size"],
        say=options["say"],
    )
    return {
        "task": task,
        "suite": "mathematics",
        "shots": shots,
        "metric": "exact",
        **summary(scored.samples),
        "seconds": scored.seconds,
        "limit": limit,
        "data": TASKS[task].file,
        "items_hash": xxhash.xxh3_64_hexdigest("\0".join(item.question for item in items).encode()),
        "samples": name.as_posix(),
        "model": solver.model.name_or_path,
        "command": options["command"],
    }


class Solver:
    """Greedy answers to prompts: ``solver(prompts)[i].text`` is the likeliest token after token, up to a stop string.

    A prompt is what the tokenizer makes of it, its begin token included, and without a chat template. An answer has at
    most `MAX_NEW_TOKENS` tokens; where the model's positions leave less room, the largest power of two that they
    leave. So it does not depend on what else is in its batch, but for rounding: products of other shapes are summed
    in another order.

    name: a hash of all that answers depend on, but for the prompts.
    """

    def __init__(self, model: Any, tokenizer: Any, say: Callable[[str], None] = lambda line: None) -> None:
        self.model, self.tokenizer, self.say = model, tokenizer, say
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.usable = tokenizer_usable_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
        self.name = _fingerprint(model, tokenizer)
        self._told = False

    def __call__(self, prompts: Sequence[str]) -> list[Answer]:
        asked = [Prompt("", number, self._ids(text), text, text) for number, text in enumerate(prompts)]
        rooms = [self._room(prompt) for prompt in asked]
        answers: dict[int, Answer] = {}
        for room in sorted(set(rooms)):
            together = [prompt for prompt in asked if rooms[prompt.number] == room]
            found = self._written(together, room) if room else [self._unasked(prompt) for prompt in together]
            answers |= {prompt.number: answer for prompt, answer in zip(together, found, strict=True)}
        return [answers[number] for number in range(len(prompts))]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        ended = len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
        return tuple(ids[:-1] if ended else ids)  # some tokenizers end what is to go on

    def _room(self, prompt: Prompt) -> int:
        """Tokens that an answer may have."""
        if self.positions is None:
            return MAX_NEW_TOKENS
        left = max(0, self.positions - len(prompt.ids))
        return min(MAX_NEW_TOKENS, 1 << left.bit_length() >> 1)

    def _written(self, prompts: Sequence[Prompt], room: int) -> list[Answer]:
        writer = Rollout(
            self.model,
            self.tokenizer,
            Sampling(room, temperature=0.0),
            usable=self.usable,
            batch_size=len(prompts),
            stops=STOPS,
        )
        try:
            return [Answer(text, tokens, finished) for text, finished, tokens in writer.write(prompts)]
        except OutOfMemory as error:
            raise OutOfMemory(
                f"{len(prompts)} answers of up to {room} tokens after {len(prompts[0].ids)} do not fit into memory; "
                "what is written stands: lower --batch-size"
            ) from error

    def _unasked(self, prompt: Prompt) -> Answer:
        why = f"a prompt of {len(prompt.ids)} tokens leaves no room among the model's {self.positions} positions"
        if not self._told:
            self._told = True
            self.say(f"{why}; such items count as wrong")
        return Answer("", 0, False, why)


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """16 digits for the weights as they are loaded, the configuration, the tokenizer and the rules of `Solver`."""
    of_files = ("_name_or_path", "transformers_version", "architectures", "quantization_config")
    config = {key: value for key, value in model.config.to_dict().items() if key not in of_files}
    digest = xxhash.xxh3_64()
    digest.update(f"{config} {tokenizer_fingerprint(tokenizer)} {MAX_NEW_TOKENS} {STOPS}".encode())
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
