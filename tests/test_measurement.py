"""`tailkd measure`: any model on any text, against slow loops; what it writes, what it refuses, its page in docs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
from test_cli import tailkd
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from tailkd import measurement
from tailkd.cli import measuring
from tailkd.errors import Refusal
from tailkd.measurement import Asked
from tailkd.models import load

CONTEXT = 40


def silent(line: str) -> None: ...


def slow_measures(stranger: SimpleNamespace, folder: Path) -> dict[str, float]:
    """One run of all documents, cut into rows as the model alone would be shown them, one position at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), stranger.tokenizer
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()]
    run = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    sums = dict.fromkeys(("cross_entropy", "entropy", "mismatch_rate", "1", "7"), 0.0)
    for first in range(1, len(run), CONTEXT):  # without a begin token the first one is only read
        row = torch.tensor(run[first - 1 : first + CONTEXT])
        with torch.no_grad():
            q = model(row[None, :-1]).logits[0, :, : len(tokenizer)].double().softmax(-1)
        labels, ranked = row[1:], q.sort(-1, descending=True)
        sums["cross_entropy"] -= float(q.gather(1, labels[:, None]).log().sum())
        sums["entropy"] -= float((q * q.log()).sum())
        sums["mismatch_rate"] += int((ranked.indices[:, 0] != labels).sum())
        for size in (1, 7):
            sums[str(size)] += float(ranked.values[:, size:].sum())
    return {name: value / (len(run) - 1) for name, value in sums.items()}


def test_measures_of_any_model(stranger: SimpleNamespace, tmp_path: Path) -> None:
    """Two models beside each other are measured as each alone; padded rows of the vocabulary have no part in it."""
    model = AutoModelForCausalLM.from_pretrained(stranger.student)
    model.resize_token_embeddings(448)
    with torch.no_grad():
        model.get_input_embeddings().weight[400:] = 5.0
    padded = tmp_path / "padded"
    model.save_pretrained(padded)
    stranger.tokenizer.save_pretrained(padded)
    data = ["--data", str(stranger.corpus), "--field", "body", "--context", str(CONTEXT), "--top-k", "7,1,7"]
    out = tmp_path / "new" / "out"
    arguments = [str(stranger.teacher), str(padded), *data, "--tokens", "1000000", "--out", str(out)]
    printed, said = tailkd("measure", *arguments, "--json")
    found = json.loads(printed)
    assert found == json.loads((out / "measures.json").read_text())
    assert list(found["models"]) == ["teacher", "padded"]
    for name, folder in (("teacher", stranger.teacher), ("padded", stranger.student)):
        one, expected = found["models"][name], slow_measures(stranger, folder)
        assert {k: one[k] for k in expected if k in one} == pytest.approx(
            {k: v for k, v in expected.items() if k in one}, rel=1e-4
        )
        assert one["tail_mass"] == pytest.approx({"1": expected["1"], "7": expected["7"]}, rel=1e-4)
        assert one["perplexity"] == pytest.approx(math.exp(expected["cross_entropy"]), rel=1e-3)
        assert (one["vocabulary"], one["context"], one["documents"]) == (400, CONTEXT, 120)
        assert one["tokens"] == pytest.approx(sum(mass for _, _, mass, _ in one["log_reliability"]))
    names = ["measures.json", *(f"{name}.{kind}" for name in ("tail_mass", "calibration") for kind in ("svg", "png"))]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert all(name in said for name in names)
    for figure in ("tail_mass.svg", "calibration.svg"):
        text = (out / figure).read_text()
        assert "padded" in text
        assert "teacher" in text
    assert "Tail mass against K (mismatch rate)" in (out / "tail_mass.svg").read_text()


def test_a_run_is_its_student(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Path) -> None:
    import tailkd as package

    recipe["training"] |= {"tokens": 500, "save_every_tokens": None}
    recipe["evaluate"] = {"tokens": 500}
    run = package.distill(recipe)
    asked = Asked(str(stranger.corpus), "body", positions=500)
    found = measurement.measure([str(run.folder), str(run.student)], asked, silent)["models"]
    assert list(found) == ["stranger", "student"]
    assert found["stranger"]["cross_entropy"] == found["student"]["cross_entropy"]
    assert found["student"]["context"] == 256  # what it takes
    assert 500 <= found["student"]["tokens"] < 500 + 256
    table = tailkd("measure", str(run.folder), "--data", str(stranger.corpus), "--field", "body", "--tokens", "300")[0]
    assert re.search(r"tail mass, K = 10 +\d+\.\d\d %", table)
    assert run.heldout["student"]["log_reliability"]
    (run.folder / "evaluation.json").unlink()
    with pytest.raises(Refusal, match="is not finished; finish it first"):
        measurement.measure([str(run.folder)], asked, silent)


def refused(message: str, models: list[Any], stranger: SimpleNamespace, **changed: Any) -> None:
    values = {"path": str(stranger.corpus), "field": "body", **changed}
    with pytest.raises(Refusal, match=message):
        measurement.measure([str(model) for model in models], Asked(**values), silent)


def test_what_cannot_be_measured_is_refused(
    stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = builders.save_model(tmp_path / "bare", None, vocabulary=400)
    coder = tmp_path / "coder"
    T5ForConditionalGeneration(
        T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(coder)
    bert = tmp_path / "bert"
    BertLMHeadModel(
        BertConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            is_decoder=True,
        )
    ).save_pretrained(bert)
    for folder in (coder, bert):
        stranger.tokenizer.save_pretrained(folder)
    refused(r"no file at 'nowhere.jsonl'; expected a file", ["nowhere"], stranger, path="nowhere.jsonl")
    refused(r"no field 'text'; it has 'id', 'body'", [stranger.teacher], stranger, field="text")
    refused(r"^model: the configuration of 'nowhere' could not be read", ["nowhere"], stranger)
    refused("bare holds no tokenizer, so its text cannot be read", [bare], stranger)
    refused("^model: the weights of '.*coder' could not be read", [coder], stranger, context=8)
    refused("^BertLMHeadModel .*: hidden states times vocabulary matrix do not give", [bert], stranger)
    refused("takes at most 256 positions; take that or less", [stranger.teacher], stranger, context=300)
    refused("a model came twice", [stranger.teacher, stranger.teacher], stranger)
    refused("are those of one model; 2 came", [stranger.teacher, stranger.student], stranger, revision="main")
    monkeypatch.setattr(load, "GGUF_PACKAGES", ("no_such_package",))
    refused("^gguf_file needs no_such_package", [stranger.teacher], stranger, gguf_file="x.gguf")
    for asked in ("", "1,x", "0,5"):
        with pytest.raises(Refusal, match=r"^--top-k is .*; expected whole numbers from 1 on"):
            measuring.measure([str(stranger.teacher)], str(stranger.corpus), top_k=asked)
    with pytest.raises(Refusal, match="cannot be written"):
        measuring.measure([str(stranger.teacher)], str(stranger.corpus), out=stranger.corpus)


# ----- docs/measures.md


DATA = Path(os.environ.get("TAILKD_DATA", "nowhere"))
MODEL, TEXT = DATA / "models" / "stories260k", DATA / "instruct" / "gsm8k_train.jsonl.gz"
PAGE = (Path(__file__).parents[1] / "docs" / "measures.md").read_text()


@pytest.mark.skipif(not (MODEL.is_dir() and TEXT.is_file()), reason="TAILKD_DATA names no data folder")
def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command prints its table."""
    command, shown = re.findall(r"```\n(tailkd measure stories260k .*?)```\n.*?```text\n(.*?)```", PAGE, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    Path("stories260k").symlink_to(MODEL)
    Path("gsm8k_train.jsonl.gz").symlink_to(TEXT)
    printed, _ = tailkd(*shlex.split(command)[1:])
    lines = [[line.split() for line in text.splitlines() if line.strip()] for text in (printed, shown)]
    for one, other in zip(*lines, strict=True):
        assert len(one) == len(other)
        for word, expected in zip(one, other, strict=True):
            if re.fullmatch(r"[\d.,]+", expected) and "=" not in other:
                assert float(word.replace(",", "")) == pytest.approx(float(expected.replace(",", "")), rel=2e-3)
            else:
                assert word == expected or "=" in other
    assert Path("figure2/tail_mass.svg").is_file()


def test_the_page_names_every_measure(stranger: SimpleNamespace) -> None:
    found = measurement.measure([str(stranger.student)], Asked(str(stranger.corpus), "body", 300), silent)
    names = {*found["models"]["student"], "kl", "head_kl", "tail_kl", "top1_agreement", "acceptance"}
    assert not [name for name in names if f"`{name}`" not in PAGE]
