"""The offline example: corpus, tokenizer, teacher and students made on this machine, by the same code as `distill`."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tailkd import recipe_file
from tailkd.corpora import prepare
from tailkd.data.mixture import AnyRows
from tailkd.data.packing import IGNORED
from tailkd.pair import read_vocabulary
from tailkd.report.page import write_page
from tailkd.report.record import Run
from tailkd.run import distill

VOCABULARY = 1024
END = "<|endoftext|>"
CORPUS_BYTES = 5_000_000
LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "turtledemo")

TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}

TEACHER_TRAINING = {"tokens": 400_000, "batch_size": 4, "learning_rate": 3e-3}
STUDENT_TRAINING = {"tokens": 250_000, "batch_size": 4, "learning_rate": 4e-3}
EVALUATION = {"tokens": 20_000, "every_tokens": 50_000}

STUDENTS: dict[str, dict[str, Any]] = {
    "clm": {"divergence": "none"},
    "forward-kl": {"divergence": "forward_kl"},
    "forward-kl-x2": {"divergence": "forward_kl", "divergence_weight": 2.0},
    "reverse-kl": {"divergence": "reverse_kl"},
    "tad": {"divergence": "tail_aware", "top_k": 10, "beta": 2.0},
}
"""The objective of each student; nothing else differs between their recipes."""


def run(out: Path, *, fresh: bool = False) -> tuple[list[Run], Path]:
    """Make everything in `out`; the students' runs and the page that compares them."""
    corpus = corpus_of(out / "corpus.jsonl")
    starts = {name: start_model(out / f"{name}-start", corpus, sizes) for name, sizes in SIZES.items()}
    teacher = distill(_teacher_recipe(out, corpus, starts["teacher"]), fresh=fresh)
    runs = [
        distill(_student_recipe(out, corpus, teacher.student, starts["student"], name), fresh=fresh)
        for name in STUDENTS
    ]
    summary = {"unigram_cross_entropy": _unigram(out, corpus, teacher.student, starts["student"])}
    (out / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")
    return runs, write_page(runs, out / "report.html")


SIZES = {"teacher": TEACHER, "student": STUDENT}


def shared_recipe(out: Path, corpus: Path, name: str) -> dict[str, Any]:
    """What all runs of the demo share."""
    return {
        "name": name,
        "out": str(out / name),
        "data": {"train": {"path": str(corpus)}, "context": 128, "store": str(out / "tokens")},
        "evaluate": EVALUATION,
    }


def _teacher_recipe(out: Path, corpus: Path, start: Path) -> dict[str, Any]:
    return {
        **shared_recipe(out, corpus, "teacher"),
        "teacher": None,
        "student": {"model": str(start)},
        "objective": {"divergence": "none"},
        "training": TEACHER_TRAINING,
    }


def _student_recipe(out: Path, corpus: Path, teacher: Path, start: Path, name: str) -> dict[str, Any]:
    return {
        **shared_recipe(out, corpus, name),
        "teacher": {"model": str(teacher)},
        "student": {"model": str(start)},
        "objective": STUDENTS[name],
        "training": STUDENT_TRAINING,
    }


def corpus_of(path: Path) -> Path:
    """The sources of Python's standard library, a text that is on every machine that runs this."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for name, text in _sources():
                file.write(json.dumps({"id": name, "text": text}) + "\n")
        temporary.replace(path)
    return path


def _sources() -> Iterator[tuple[str, str]]:
    root, total = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(root.rglob("*.py"), key=lambda p: (len(p.relative_to(root).parts), p)):
        inside = path.relative_to(root)
        if set(inside.parts) & set(LEFT_OUT):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\x00" not in text:
            total += len(text)
            yield str(inside), text
        if total > CORPUS_BYTES:
            return


def start_model(folder: Path, corpus: Path, sizes: dict[str, Any]) -> Path:
    """A Llama of these sizes with random weights, and the tokenizer, as save_pretrained writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        tokenizer = _tokenizer(corpus)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _tokenizer(corpus: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    with corpus.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def _unigram(out: Path, corpus: Path, teacher: Path, start: Path) -> float:
    """Held-out cross-entropy of token frequencies alone: what a model that reads no context reaches."""
    recipe = recipe_file.read(_student_recipe(out, corpus, teacher, start, "clm"))
    vocabulary = read_vocabulary(recipe)
    train, heldout = prepare(recipe, vocabulary, lambda message: None)
    counts = 1.0 + _counts(train, vocabulary.usable)
    seen = _counts(heldout, vocabulary.usable)
    return float(-(seen * np.log(counts / counts.sum())).sum() / seen.sum())


def _counts(rows: AnyRows, size: int) -> np.ndarray:
    labels = np.concatenate([rows[i].labels for i in range(len(rows))])
    return np.bincount(labels[labels != IGNORED], minlength=size).astype(np.float64)
