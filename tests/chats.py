"""Chat templates as models have them, in small, and a tokenizer with their tokens."""

from __future__ import annotations

from typing import Any

import builders

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
MARKED_FURTHER = MARKED.replace("{% endgeneration %}{% else", "<|im_end|>\n{% endgeneration %}{% else").replace(
    "{% endif %}<|im_end|>\n", "<|im_end|>\n{% endif %}"
)
"""The marks take in the end of the turn and the blank behind it."""
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant may speak') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
"""Only the last answer shows that there was a thought."""
SPOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BACKWARDS = "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer(template: str | None, **tokens: str) -> Any:
    """Over the words of the tests' corpora; by default its end token ends a turn too."""
    texts = [" ".join(builders.WORDS), "Question: how many?\nAnswer: 12 and 345.", "system user assistant"]
    made = builders.build_tokenizer(texts, size=360, specials=SPECIALS)
    made.chat_template = template
    for name, token in {"eos_token": "<|im_end|>", **tokens}.items():
        setattr(made, name, token)
    return made
