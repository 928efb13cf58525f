"""Supervised documents -> token ids, and which of them are learned: answers, and the end token after each.

- Prompt and completion with a plain template are tokenised apart, so that the border between them is one between
  tokens. Blanks before the completion belong to it, as a model writes them: it is asked with ``Answer:``. A tokenizer
  that begins every text with a blank of its own gives one of them.
- Chat messages go through the tokenizer's own chat template. What it marks with ``{% generation %}`` is learned. In a
  template without marks an answer begins where the rendering of the messages before it ends, its generation prompt
  included, and ends with its content; where that rendering is no prefix of the whole the record is unusable.
- The special token that follows an answer, blanks between them or not, is learned; blanks after it are not.
- What follows the last answer is left out, and the end token closes the document unless the template has done so.

No id is ever told from its value to be padding: that a tokenizer pads with its end token does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any, NamedTuple

from tailkd.errors import Refusal

RULES = 1  # raised where the same record and template give other ids or another mask than before
PLAIN = "Question: {prompt}\nAnswer: {completion}"
CHAT = "chat"
ANSWERS = "assistant"
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
BLANKS = ("▁", "Ġ")  # how tokenizers spell a blank at the beginning of a token
SENTINEL = "\ue000\ue001\ue000"  # private characters, to find an answer's end in what a template renders


class Turn(NamedTuple):
    """One message: who speaks, and what."""

    role: str
    content: str


class Encoded(NamedTuple):
    """A document's ids, its end token included; 1 where an id is learned and 0 where not (None: all of them are).

    unusable: the reason why a record gives none, and what to add where it is named.
    """

    ids: Sequence[int]
    loss: Sequence[int] | None = None
    unusable: tuple[str, str] | None = None

    def without_end(self, end: int) -> Encoded:
        """The same of a conversation that was cut off: nothing says that its last answer ends there."""
        if not self.ids or self.loss is None or self.ids[-1] != end:
            return self
        return Encoded(self.ids[:-1], self.loss[:-1])


@dataclass(frozen=True, slots=True)
class Example:
    """A document of which only the answers are learned.

    template: `CHAT`, or a text with {prompt} and {completion} for two turns.
    """

    turns: tuple[Turn, ...]
    template: str

    @property
    def text(self) -> str:
        return "\n".join(turn.content for turn in self.turns)

    def pieces(self, *, begins_with_blank: bool) -> list[str]:
        """What is read and what is learned of a plain template; none of a chat."""
        if self.template == CHAT:
            return []
        (before, _, _, _), (between, _, _, _), *rest = Formatter().parse(self.template)
        after = rest[0][0] if rest else ""
        prompt, completion = self.turns
        read = between.rstrip(" ")
        blanks = between[len(read) :]
        if begins_with_blank:
            blanks = blanks[1:]
        return [before + prompt.content + read, blanks + completion.content + after]


def check_template(template: str) -> str:
    """The template, if it is `CHAT` or a text with {prompt} and, behind it, {completion}.

    Raises:
        ValueError: anything else.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError:
        parts = []
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if template != CHAT and fields != [("prompt", "", None), ("completion", "", None)]:
        raise ValueError(
            f"expected {CHAT!r} or a text with {{prompt}} and then {{completion}}, each once (other braces doubled)"
        )
    return template


def begins_with_blank(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a blank before every text, as those of Llama-2 do."""
    ids = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return bool(ids) and tokenizer.convert_ids_to_tokens(ids[0]).startswith(BLANKS)


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template.

    Raises:
        Refusal: it has none, or cannot say where its tokens stand in a text.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise Refusal(
            f"{_name(tokenizer)} has no chat template, which data.train.messages and template: chat need; put a "
            "chat_template.jinja into its folder, or give data.train.prompt and completion with a plain template"
        ) from error
    if not tokenizer.is_fast:
        raise Refusal(
            f"{_name(tokenizer)} cannot say where its tokens stand in a text (it is no fast tokenizer), which chats "
            "need to tell answers from prompts; save a tokenizer.json into its folder, or give data.train.prompt and "
            "completion with a plain template"
        )
    return template


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__})"


class Unusable(Exception):
    """A conversation that the template cannot show, or of which it shows no answer."""


class Chat:
    """``Chat(tokenizer).encode(turns)`` is a conversation as the tokenizer's template writes it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marked = MARK.search(chat_template(tokenizer)) is not None

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        import jinja2

        try:
            ids, loss = self._marked(turns) if self.marked else self._rendered(turns)
            return self._ended(ids, loss)
        except jinja2.TemplateError as error:
            return Encoded((), None, ("refused by the chat template", f" ({error})"))
        except Unusable as error:
            return Encoded((), None, (str(error), ""))

    def _marked(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        found = self.tokenizer.apply_chat_template(
            _messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _rendered(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        whole = self._text(turns)
        spans = [self._span(whole, turns, at) for at, turn in enumerate(turns) if turn.role == ANSWERS]
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        loss = [int(any(a <= start < b for a, b in spans)) for start, _ in found["offset_mapping"]]
        return list(found["input_ids"]), loss

    def _span(self, whole: str, turns: Sequence[Turn], at: int) -> tuple[int, int]:
        """Where the answer at `at` stands in the whole conversation's text."""
        start = len(before) if whole.startswith(before := self._text(turns[:at], add_generation_prompt=True)) else None
        content = turns[at].content
        bare = content.rstrip()
        marked = self._text([*turns[:at], Turn(ANSWERS, bare + SENTINEL + content[len(bare) :]), *turns[at + 1 :]])
        stop = marked.find(SENTINEL)
        if start is None or stop < start or marked.replace(SENTINEL, "", 1) != whole:
            raise Unusable(
                "the chat template renders an answer otherwise than after its prompt (marks of "
                "{% generation %} in the template would show it)"
            )
        return start, stop

    def _text(self, turns: Sequence[Turn], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(_messages(turns), tokenize=False, **options)

    def _ended(self, ids: list[int], loss: list[int]) -> Encoded:
        """The same with the token that ends each answer learned, up to the last one, which the end token follows."""
        count, at = len(ids), 0
        while at < count:
            if not loss[at]:
                at += 1
                continue
            start = at
            while at < count and loss[at]:
                at += 1
            stop = at  # of the answer
            while stop > start and self._is_blank(ids[stop - 1]):
                stop -= 1
            ahead = at
            while ahead < count and self._is_blank(ids[ahead]):
                ahead += 1
            if stop > start and ids[stop - 1] in self._special:
                loss[stop:at] = [0] * (at - stop)
            elif ahead < count and ids[ahead] in self._special:
                loss[at : ahead + 1] = [1] * (ahead + 1 - at)
                at = ahead + 1
        if 1 not in loss:
            raise Unusable("the chat template shows no answer")
        last = count - loss[::-1].index(1)
        ids, loss = ids[:last], loss[:last]
        end = self.tokenizer.eos_token_id
        return Encoded(ids, loss) if ids[-1] == end else Encoded([*ids, end], [*loss, 1])

    def _is_blank(self, token: int) -> bool:
        return token not in self._special and not self.tokenizer.decode([token]).strip()

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {token for token, how in added if how.special}


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [turn._asdict() for turn in turns]
