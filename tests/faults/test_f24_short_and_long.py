"""F24: one token to predict, documents of one token, and documents longer than a row have a defined result."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import running
import torch
from stepping import pair, rows

import tailkd
from tailkd.data.batches import Batch, Batches, collate
from tailkd.data.packing import IGNORED
from tailkd.objective import Objective, distillation_loss
from tailkd.objective.settings import DIVERGENCES
from tailkd.train.step import accumulate_gradients


def one_token() -> Batch:
    """Eight rows with one token to predict among them all: the document is one token long."""
    single, empty = rows([1])[0], rows([1])[0]
    empty.labels.fill(IGNORED)
    return collate([empty] * 5 + [single] + [empty] * 2, range(8))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_one_token_to_predict(divergence: str) -> None:
    """Seven micro-batches of eight have nothing to predict; what is left is the loss of that position alone."""
    student, teacher = pair(torch.float64)
    batch, objective = one_token(), Objective(divergence=divergence)
    assert batch.count == 1
    parts = accumulate_gradients(student, teacher, batch, objective=objective, micro_batch_size=1)
    ours = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    student.model.zero_grad()
    row = list(batch.micro_batches(1))[5]
    loss = distillation_loss(student(row.input_ids), teacher(row), row.labels, objective=objective)
    loss.mean(1).backward()
    theirs = torch.cat([p.grad.flatten() for p in student.model.parameters()])
    assert math.isfinite(parts["loss"].mean())
    assert parts["loss"].mean() == pytest.approx(loss.mean(1).item(), rel=1e-12)
    assert theirs.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_documents_of_one_token_and_of_many_rows() -> None:
    """None is dropped and none is cut short: every token is predicted once."""
    lengths = [1, 1, 40, 1, 3, 24, 1]
    made = rows(lengths)
    assert sum(lengths) % 14 == 1  # the last row predicts one token
    labels = [int(label) for row in range(len(made)) for label in made[row].labels if label != IGNORED]
    assert labels == list(range(10, 10 + sum(lengths)))
    student, teacher = pair(torch.float32)
    batch = Batches(made, batch_size=len(made), seed=0)[0]
    parts = accumulate_gradients(student, teacher, batch, objective=Objective(), micro_batch_size=2)
    assert parts["loss"].weight == batch.count == sum(lengths)
    assert all(torch.isfinite(p.grad).all() for p in student.model.parameters())


def test_a_corpus_of_both(recipe: dict[str, Any], stranger: SimpleNamespace, tmp_path: Any) -> None:
    """A whole run over documents of one letter and of thousands of tokens: all of them counted, all losses finite."""
    long = " ".join(json.loads(line)["body"] for line in stranger.corpus.open())
    texts = [*"abcdefghijklmnopqrstuvwxyz", long, long[5_000:], *(long[i : i + 700] for i in range(0, 7_000, 700))]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    recipe["data"] |= {"train": {"path": str(corpus), "text": "body"}, "heldout": {"fraction": 0.3}}
    run = tailkd.distill(recipe)
    documents = run.data["train"]["documents"] + run.data["heldout"]["documents"]
    assert (documents, run.data["skipped"]) == (len(texts), {})
    assert all(math.isfinite(record["loss"]) for record in run.metrics if record["kind"] == "step")
    assert len(running.steps(run)) == 12
