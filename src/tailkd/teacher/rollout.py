"""Text that a model writes after prompts, in batches with its cache of keys and values."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tailkd.data.batches import mixed_seed
from tailkd.errors import OutOfMemory

WINDOW = 16  # batches whose prompts are sorted by length together
HALF_A_CHARACTER = "�"  # what a tokenizer of bytes makes of a character that is cut in two


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logits over `temperature` (0: the likeliest), then `top_k` (0: all), then `top_p`."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def seed_of(self, prompt: Prompt) -> int:
        """Of one completion alone: it does not depend on what else is written beside it."""
        return mixed_seed(self.seed, prompt.number)


class Prompt(NamedTuple):
    """A text to go on from, as `text` and as the `ids` that a model reads; `number` tells its completion's seed.

    shown: the text before its template, which is what stands in the file.
    """

    id: str
    number: int
    ids: tuple[int, ...]
    text: str
    shown: str


class Written(NamedTuple):
    """A completion without its end token; `finished` is whether it came to one. `tokens` counts that one too."""

    completion: str
    finished: bool
    tokens: int | None


Pairs = Generator[tuple[Prompt, Written], None, None]


class Engine(Protocol):
    """What writes: pairs in an order that is the same every time, without the first `done` of them."""

    def __call__(self, prompts: Iterable[Prompt], done: int = 0) -> Pairs: ...


class Rollout:
    """A causal language model of transformers as an `Engine`.

    The distribution is the model's own over the usable ids: what its generation_config.json asks for (penalties, a
    temperature) is left out, `fold` adds the probability of ids to that of others as in training. A draw is the
    largest of logit plus Gumbel noise out of a generator of the completion's own, so that a batch of another size
    writes the same but for rounding. It ends with the tokenizer's end token, or one that the model's generation
    config names.

    Prompts are sorted by length within `WINDOW` batches, the longest first, and come out in that order.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sampling: Sampling,
        *,
        usable: int,
        batch_size: int,
        fold: Mapping[int, int] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.usable, self.batch_size, self.fold = usable, batch_size, dict(fold or {})
        named = model.generation_config.eos_token_id
        also = named if isinstance(named, list) else [named]
        self.ends = sorted({i for i in (tokenizer.eos_token_id, *also) if i is not None and i < usable})

    def __call__(self, prompts: Iterable[Prompt], done: int = 0) -> Pairs:
        for batch in _batches(prompts, self.batch_size):
            if done < len(batch):
                yield from list(zip(batch, self.write(batch), strict=True))[done:]
            done = max(0, done - len(batch))

    @torch.no_grad()
    def write(self, prompts: Sequence[Prompt]) -> list[Written]:
        """What follows each prompt, all of them in one batch.

        Raises:
            OutOfMemory: the batch does not fit.
        """
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.ends[0])
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        try:
            found = self._generate(ids.to(self.model.device), mask.to(self.model.device), prompts)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{len(prompts)} completions of {self.sampling.max_new_tokens} tokens after {width} do not fit into "
                "memory; lower generate.batch_size"
            ) from error
        return [self._written(prompt, row) for prompt, row in zip(prompts, found[:, width:].tolist(), strict=True)]

    def _generate(self, ids: Tensor, mask: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        from transformers import GenerationConfig, LogitsProcessorList

        asked = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # the noise is in the scores
            eos_token_id=self.ends,
            pad_token_id=self.ends[0],
        )
        scores = LogitsProcessorList([Usable(self.usable, self.fold), *self._drawing(prompts)])
        with _own_generation_config(self.model, GenerationConfig()):
            return self.model.generate(ids, attention_mask=mask, generation_config=asked, logits_processor=scores)

    def _drawing(self, prompts: Sequence[Prompt]) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        asked = self.sampling
        if asked.temperature == 0:
            return []
        seeds = [asked.seed_of(prompt) for prompt in prompts]
        return [
            *([TemperatureLogitsWarper(asked.temperature)] if asked.temperature != 1 else []),
            *([TopKLogitsWarper(asked.top_k)] if asked.top_k else []),
            *([TopPLogitsWarper(asked.top_p)] if asked.top_p < 1 else []),
            Gumbel(seeds, self.model.device),
        ]

    def _written(self, prompt: Prompt, row: list[int]) -> Written:
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        new = row if end is None else row[:end]
        before, whole = self._decoded(list(prompt.ids)).rstrip(HALF_A_CHARACTER), self._decoded([*prompt.ids, *new])
        # Decoded alone, a completion would lose the space that some tokenizers strip from the front.
        text = whole[len(before) :] if whole.startswith(before) else self._decoded(new)
        if end is None:
            return Written(text.rstrip(HALF_A_CHARACTER), False, len(row))
        return Written(text, True, end + 1)

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Usable:
    """Scores (rows, ids) of transformers: folded ids added to others, and none beyond the usable ones."""

    def __init__(self, usable: int, fold: Mapping[int, int]) -> None:
        self.usable, self.fold = usable, fold

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for source, target in self.fold.items():
            scores[:, target] = torch.logaddexp(scores[:, target], scores[:, source])
        scores[:, self.usable :] = -torch.inf
        return scores


class Gumbel:
    """Scores plus Gumbel noise, each row from its own seed: their largest is a draw from the scores' softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_(min=torch.finfo(torch.float32).tiny).log_()


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills what a call does not say from the model's own; here there is nothing to fill in."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _batches(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    left = iter(prompts)
    while window := list(islice(left, size * WINDOW)):
        window.sort(key=lambda prompt: -len(prompt.ids))  # stable
        yield from (window[start : start + size] for start in range(0, len(window), size))
