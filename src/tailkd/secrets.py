"""Secrets, and texts without them: what is written to a file or said to a user has passed here."""

from __future__ import annotations

import os
import re
from typing import Any

# Not TOKENIZER or MAX_TOKENS: their values are paths and numbers that belong into messages.
NAMES = re.compile(r"TOKEN(?!IZ|S$)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
FORMS = (
    (re.compile(r"://[^/\s@]+@"), "://***@"),
    # A token is long and mixed: a folder named hf_transformers or sk_experiments is none.
    (re.compile(r"\b(hf|sk|ghp|wandb)_(?=[A-Za-z]*(\d|[a-z][A-Z]))[A-Za-z0-9]{16,}"), "***"),
    (re.compile(r"(?i)((?:token|secret|password|[?&]key|api_?key|access_?key)=)[^&\s'\"]+"), r"\1***"),
)


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that look secret, credentials in URLs, and known tokens."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    for form, shown in FORMS:
        text = form.sub(shown, text)
    return text


def masked(value: Any) -> Any:
    """A value of dicts, lists and strings with every string `without_secrets`."""
    if isinstance(value, dict):
        return {key: masked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
