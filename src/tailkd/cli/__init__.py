"""The verbs, nothing else. A verb reads its arguments, checks the recipe, and only then loads what it needs."""

from tailkd.cli import corpora, measuring, planning, sharing, training  # noqa: F401
from tailkd.cli.app import app, main

__all__ = ["app", "main"]
