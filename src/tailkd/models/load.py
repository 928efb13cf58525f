"""Id or path, revision and dtype -> model and tokenizer."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash

from tailkd.errors import Refusal

PINNED = re.compile(r"[0-9a-f]{40}")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
WEIGHTS = (".safetensors", ".bin", ".gguf")
GGUF_PACKAGES = ("gguf", "accelerate")
OFFLINE_HINT = (
    "give a folder written by save_pretrained, or a hub id that can be reached (`hf auth login` for gated ones)"
)


def check_remote_code(role: str, revision: str | None, remote_code: bool) -> None:
    """Code from a model repository runs only at a pinned commit, for teacher and student apart."""
    if remote_code and not (revision and PINNED.fullmatch(revision)):
        raise Refusal(
            f"{role}.remote_code runs code from the model's repository, so {role}.revision must pin it by a 40-digit "
            f"commit hash; it is {revision!r}"
        )


def load_config(
    role: str, model: str, *, revision: str | None = None, remote_code: bool = False, gguf_file: str | None = None
) -> Any:
    """The model's configuration alone."""
    from transformers import AutoConfig

    check_remote_code(role, revision, remote_code)
    check_gguf(role, gguf_file)
    try:
        if gguf_file:
            return _gguf_config(model, gguf_file, revision)
        return AutoConfig.from_pretrained(_expanded(model), revision=revision, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(role, model, "configuration", error) from error


def check_gguf(role: str, gguf_file: str | None) -> None:
    """GGUF files are read by packages of their own."""
    missing = [name for name in GGUF_PACKAGES if find_spec(name) is None] if gguf_file else []
    if missing:
        raise Refusal(f"{_key(role, 'gguf_file')} needs {' and '.join(missing)}: pip install 'tailkd[gguf]'")


def _gguf_config(model: str, gguf_file: str, revision: str | None) -> Any:
    from transformers.utils.hub import cached_file

    found = cached_file(_expanded(model), gguf_file, revision=revision)
    assert found is not None
    path = Path(found).resolve()
    told = path.stat()
    return copy.deepcopy(_parsed_header(path, told.st_size, told.st_mtime_ns))


@lru_cache(maxsize=16)
def _parsed_header(path: Path, size: int, mtime_ns: int) -> Any:
    """The configuration in a GGUF file; parsing takes seconds, size and time tell whether it is the same file still."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _gguf(gguf_file: str | None) -> dict[str, Any]:
    return {"gguf_file": gguf_file} if gguf_file else {}


def count_parameters(config: Any, *, remote_code: bool = False) -> int:
    """Parameters of a model with this configuration, without making it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
    return sum(p.numel() for p in model.parameters())


def fingerprint(role: str, model: str, *, revision: str | None = None, gguf_file: str | None = None) -> str:
    """What weights these are: the content of a folder's files, or the commit behind a hub id."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        commit = getattr(load_config(role, model, revision=revision, gguf_file=gguf_file), "_commit_hash", None)
        return f"{model}@{commit or revision}"
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        wanted = path.name == gguf_file if gguf_file else path.suffix in WEIGHTS or path.name == "config.json"
        if wanted and path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(4 << 20):
                    digest.update(block)
    return digest.hexdigest()


def load_tokenizer(
    role: str, model: str, *, revision: str | None = None, remote_code: bool = False, gguf_file: str | None = None
) -> Any | None:
    """The model's tokenizer; None for a folder that holds none."""
    from transformers import AutoTokenizer

    check_remote_code(role, revision, remote_code)
    folder = Path(model).expanduser()
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if folder.is_dir() and not own and not gguf_file:
        return None
    options = {} if own else _gguf(gguf_file)
    try:
        return AutoTokenizer.from_pretrained(
            _expanded(model), revision=revision, trust_remote_code=remote_code, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(role, model, "tokenizer", error) from error


def load_model(
    role: str,
    model: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    attention: str = "auto",
    remote_code: bool = False,
    gguf_file: str | None = None,
) -> Any:
    """A causal language model with its weights in `dtype` on `device`, in evaluation mode.

    Those of a GGUF file are dequantised: what comes is a plain model of its class.
    """
    from transformers import AutoModelForCausalLM

    check_remote_code(role, revision, remote_code)
    check_gguf(role, gguf_file)
    options = _gguf(gguf_file)
    if gguf_file:
        from transformers import GgufConfig, modeling_gguf_pytorch_utils
        from transformers.utils import logging

        # Its bar alone does not heed transformers' own switch for progress bars.
        modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            _expanded(model),
            revision=revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _unreadable(role, model, "weights", error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refusal(
            f"{_key(role, 'model')}: {model!r} lacks {len(missing)} weights of its own configuration, such as "
            f"{missing[0]!r}; they would be random: give a complete folder"
        )
    return loaded.to(device).eval()


def _expanded(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def _key(role: str, name: str) -> str:
    """A key of the recipe; where the role is empty, as of a model that no recipe names, the name alone."""
    return f"{role}.{name}" if role else name


def _unreadable(role: str, model: str, what: str, error: Exception) -> Refusal:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Refusal(f"{_key(role, 'model')}: the {what} of {model!r} could not be read ({first}); {OFFLINE_HINT}")


def check_saved_tokenizer(tokenizer: Any, config: Any, texts: list[str]) -> None:
    """The tokenizer, saved beside `config` and loaded afresh by AutoTokenizer, must give the ids it gives now.

    For some model types AutoTokenizer builds the tokenizer by rules of its own class and drops those in the folder:
    the student would be trained on ids that nobody who loads it will ever feed to it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": config.model_type}))
        again = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        now, later = (t(text, add_special_tokens=False, verbose=False)["input_ids"] for t in (tokenizer, again))
        if now != later:
            raise Refusal(
                f"this tokenizer does not survive in the folder of a {config.model_type!r} model: loaded again by "
                f"AutoTokenizer it becomes a {type(again).__name__} and gives other ids ({later[:8]} instead of "
                f"{now[:8]} for {text[:40]!r}); take a student of another model type, such as 'llama'"
            )
