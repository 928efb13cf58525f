"""What tests are made of: tiny models, tokenizers and corpora, made on the spot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# fmt: off
WORDS = [
    "the", "a", "of", "to", "and", "in", "that", "it", "was", "for", "on", "with", "as", "his", "her", "they", "at",
    "by", "this", "had", "not", "but", "from", "or", "have", "an", "she", "which", "there", "river", "stone", "light",
    "morning", "window", "garden", "letter", "winter", "bread", "road", "house", "mountain", "child", "sea", "horse",
    "lamp", "music", "dance", "slowly", "quickly", "never", "often", "always", "almost", "under", "over", "behind",
    "before", "after", "walked", "sang", "opened", "closed", "carried", "found", "lost",
]
# fmt: on


def sentence(generator: torch.Generator, words: int) -> str:
    """Words with some structure: each one draws its successor from a few."""
    index = int(torch.randint(len(WORDS), (1,), generator=generator))
    found = [WORDS[index]]
    for _ in range(words - 1):
        index = (index * 7 + int(torch.randint(4, (1,), generator=generator))) % len(WORDS)
        found.append(WORDS[index])
    return " ".join(found) + "."


def write_corpus(path: Path, *, documents: int = 120, field: str = "text", seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(sentence(generator, 9) for _ in range(6))
            file.write(json.dumps({"id": number, field: f"{number} {text}"}) + "\n")
    return path


def build_tokenizer(texts: list[str], *, size: int = 400, specials: tuple[str, ...] = ("<s>", "</s>")) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_model(vocabulary: int, *, hidden: int = 32, layers: int = 2, seed: int = 0, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **config})).eval()


def save_model(folder: Path, tokenizer: Any | None, **config: Any) -> Path:
    vocabulary = config.pop("vocabulary", None) or len(tokenizer)
    build_model(vocabulary, **config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def numbered_store(lengths: list[int]) -> SimpleNamespace:
    """Documents of these lengths (end token included) with a number per token that says where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return SimpleNamespace(tokens=np.arange(10, 10 + offsets[-1]), offsets=offsets, loss=None, manifest={})


def fresh_python(code: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter; it can import what the tests can."""
    # A fixed threshold: glibc otherwise learns to keep large freed blocks, and peaks would depend on chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done
