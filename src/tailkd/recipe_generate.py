"""The recipe's text that a teacher writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tailkd.recipe_types import Count, NonNegative, NotNegative, Number, Positive, Section


class Prompts(Section):
    path: str
    """A file (JSONL, parquet, text; .gz too), a folder of such files, or a glob."""
    text: str = "prompt"
    """The field that holds the prompt, or the document that a prefix is taken of."""


class Server(Section):
    url: str
    """Where an OpenAI-compatible server listens, such as http://127.0.0.1:8000."""
    kind: Literal["auto", "vllm", "transformers", "openai"] = "auto"
    """How it takes sampling settings: as vllm (SGLang too), `transformers serve` or OpenAI; auto asks it."""
    model: str | None = None
    """The model's name on the server; null is teacher.model."""
    requests: Count = 8
    """Requests under way at once."""
    timeout: Positive = 600.0
    """Seconds that one request may take."""
    retries: NonNegative = 6
    """How often a request that failed is sent again, after a pause that doubles from half a second to 30."""


class Generate(Section):
    """What `tailkd generate` writes: one line of JSON for each sample of each prompt."""

    out: str
    """JSONL file to write."""
    prompts: Prompts | None = None
    """Where prompts come from; null are prefixes of the documents of data.train."""
    template: str = "{prompt}"
    """What the teacher reads of a prompt."""
    prefix_tokens: Count | None = None
    """Take this many first tokens of each text as its prompt; null is the whole text."""
    count: Count | None = None
    """Prompts to write to, the first ones; null for all."""
    samples: Count = 1
    """Completions of each prompt."""
    max_new_tokens: Count = 256
    """Where a completion is cut off that has not come to its end."""
    temperature: NotNegative = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """Draw from the likeliest tokens that hold this probability."""
    top_k: NonNegative = 0
    """Draw from so many likeliest tokens; 0 for all."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Number] = 0
    """Of the drawing."""
    batch_size: Count = 16
    """Completions written at once by the teacher in this process."""
    server: Server | None = None
    """A server that writes; null writes in this process, with transformers."""
