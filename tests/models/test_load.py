from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from tailkd.errors import Refusal
from tailkd.models import load, precision

CPU = torch.device("cpu")


def test_a_folder_that_lacks_weights_is_refused(stranger: SimpleNamespace, tmp_path: Path) -> None:
    tensors = load_file(stranger.teacher / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    del tensors[name]
    (tmp_path / "config.json").write_text((stranger.teacher / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refusal, match=rf"lacks 1 weights.*{name}"):
        load.load_model("teacher", str(tmp_path), dtype=torch.float32, device=CPU)


def test_unreachable_hub_ids_say_what_to_do() -> None:
    with pytest.raises(Refusal, match=r"teacher.model: .*could not be read.*give a folder"):
        load.load_model("teacher", "nobody/nothing", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_remote_code_needs_a_pinned_revision(revision: str | None) -> None:
    with pytest.raises(Refusal, match="40-digit"):
        load.load_config("student", "x/y", revision=revision, remote_code=True)


def test_weights_come_in_the_dtype_asked_for(stranger: SimpleNamespace) -> None:
    model = load.load_model("teacher", str(stranger.teacher), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_a_tokenizer_that_its_folder_would_change_is_refused(stranger: SimpleNamespace) -> None:
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()][:100]
    load.check_saved_tokenizer(stranger.tokenizer, LlamaConfig(), texts)
    own_rules = builders.build_tokenizer(texts)
    own_rules.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(Refusal, match=r"'qwen2' model.*gives other ids"):
        load.check_saved_tokenizer(own_rules, Qwen2Config(), texts)


def test_precision() -> None:
    assert precision.resolve("auto", CPU) == torch.float32
    assert precision.resolve("bfloat16", CPU) == torch.bfloat16


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    gpu = torch.device("cuda")
    assert precision.resolve("auto", gpu) == torch.float32
    with pytest.raises(Refusal, match=r"training.precision is bfloat16 but this GPU has none; take float32"):
        precision.resolve("bfloat16", gpu)
