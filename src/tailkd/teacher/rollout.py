"""Text that a model writes after prompts, in batches with its cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tailkd.data.batches import mixed_seed
from tailkd.errors import OutOfMemory

WINDOW = 16  # batches whose prompts are sorted by length together
SHARED = 32  # tokens that all prompts of a batch begin with: so many and more are read once, not once a row
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
    """A completion without its end token; `finished` is whether it came to one. `tokens` counts that one too.

    A text that came to a stop string is finished as well; that string is in it, and its tokens are counted.
    """

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
    config names, or as soon as it holds one of `stops`.

    Prompts are sorted by length within `WINDOW` batches, the longest first, and come out in that order. What all
    of a batch begin with (the shots of a task) is read once, where no layer's cache forgets.
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
        stops: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.stops = model, tokenizer, sampling, tuple(stops)
        self.usable, self.batch_size, self.fold = usable, batch_size, dict(fold or {})
        named = model.generation_config.eos_token_id
        also = named if isinstance(named, list) else [named]
        self.ends = sorted({i for i in (tokenizer.eos_token_id, *also) if i is not None and i < usable})
        self.padding = self.ends[0] if self.ends else 0

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
        stops = Stops(self.stops, self._decoded, width, len(prompts))
        try:
            cache, shared = self._read_once(prompts)
            ids, mask = self._padded(prompts, width, shared)
            found = self._generate(ids, mask, prompts, cache, stops)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{len(prompts)} completions of {self.sampling.max_new_tokens} tokens after {width} do not fit into "
                "memory; lower generate.batch_size"
            ) from error
        rows = zip(found[:, width:].tolist(), stops.places, strict=True)
        return [self._written(prompt, row[:stop], stop) for prompt, (row, stop) in zip(prompts, rows, strict=True)]

    def _read_once(self, prompts: Sequence[Prompt]) -> tuple[Any, int]:
        """The cache of what all prompts begin with, repeated for each, and how many tokens that are: none where few.

        Padding then follows them. That is exact where places come from the mask alone: not where a layer sees a window.
        """
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        shared = _shared([prompt.ids for prompt in prompts])
        if shared < SHARED or len(prompts) == 1 or "position_ids" not in signature(self.model.forward).parameters:
            return None, 0
        cache = DynamicCache(config=self.model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None, 0
        ids = torch.tensor([prompts[0].ids[:shared]], device=self.model.device)
        self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
        return cache, shared

    def _padded(self, prompts: Sequence[Prompt], width: int, shared: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, (prompts, width) each, with padding after the first `shared` tokens."""
        ids, mask = [], []
        for prompt in prompts:
            padding = width - len(prompt.ids)
            ids.append([*prompt.ids[:shared], *[self.padding] * padding, *prompt.ids[shared:]])
            mask.append([*[1] * shared, *[0] * padding, *[1] * (len(prompt.ids) - shared)])
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _generate(
        self, ids: Tensor, mask: Tensor, prompts: Sequence[Prompt], cache: Any = None, stops: Stops | None = None
    ) -> Tensor:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        asked = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # the noise is in the scores
            eos_token_id=self.ends or None,
            pad_token_id=self.padding,
        )
        scores = LogitsProcessorList([Usable(self.usable, self.fold), *self._drawing(prompts)])
        with _own_generation_config(self.model, GenerationConfig()):
            return self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=asked,
                logits_processor=scores,
                stopping_criteria=StoppingCriteriaList([stops] if stops is not None and stops.strings else []),
                **({} if cache is None else {"past_key_values": cache}),
            )

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

    def _written(self, prompt: Prompt, row: list[int], stop: int | None = None) -> Written:
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        new = row if end is None else row[:end]
        before, whole = self._decoded(list(prompt.ids)).rstrip(HALF_A_CHARACTER), self._decoded([*prompt.ids, *new])
        # Decoded alone, a completion would lose the space that some tokenizers strip from the front.
        text = whole[len(before) :] if whole.startswith(before) else self._decoded(new)
        if end is None and stop is None:
            return Written(text.rstrip(HALF_A_CHARACTER), False, len(row))
        return Written(text, True, len(row) if end is None else end + 1)

    def _decoded(self, ids: Sequence[int]) -> str:
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


class Stops:
    """Ends each row of `generate` once what it wrote from place `start` on holds one of `strings`.

    places: for each row the number of tokens that this took, None where it did not happen.
    """

    def __init__(self, strings: Sequence[str], decoded: Callable[[Sequence[int]], str], start: int, rows: int) -> None:
        self.strings, self.decoded, self.start = strings, decoded, start
        self.places: list[int | None] = [None] * rows
        self.enough = 2 * max((len(string.encode()) for string in strings), default=0)  # tokens that hold one

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        width = input_ids.shape[1]
        tails = input_ids[:, max(self.start, width - self.enough) :].tolist()
        for row, tail in enumerate(tails):
            if self.places[row] is None and any(string in self.decoded(tail) for string in self.strings):
                self.places[row] = width - self.start
        return torch.tensor([place is not None for place in self.places], device=input_ids.device)


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """`generate` fills what a call does not say from the model's own; here there is nothing to fill in."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many ids all rows begin with; at least one of each is left over."""
    first, last = min(rows), max(rows)  # what these two share, all between them share
    common = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(common, *(len(row) - 1 for row in rows))


def _batches(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    left = iter(prompts)
    while window := list(islice(left, size * WINDOW)):
        window.sort(key=lambda prompt: -len(prompt.ids))  # stable
        yield from (window[start : start + size] for start in range(0, len(window), size))
