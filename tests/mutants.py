"""Deliberate faults, applied one at a time; each must turn the tests red.

Run: python tests/mutants.py (`make mutants`). Prints which test caught which fault; exits 1 if one was not caught.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A fault: in `file`, `before` becomes `after`; `tests` are run first, then everything."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTANTS = (
    Mutant(
        "a last batch of an epoch is left out",
        "bill.py",
        "return batch * math.ceil(epochs * rows / batch) * recipe.data.context",
        "return batch * math.floor(epochs * rows / batch) * recipe.data.context",
        "tests/test_extends.py",
    ),
    Mutant(
        "a run's page does not hear of its tasks",
        "examination.py",
        "    _tell(Run(one.folder))\n",
        "",
        "tests/test_examination.py",
    ),
    Mutant(
        "the trainer learns to predict padding",
        "adapters/transformers.py",
        '_without(inputs["labels"], padding)[:, 1:]',
        'inputs["labels"][:, 1:]',
        "tests/adapters/test_reading.py",
    ),
    Mutant(
        "a mask of all ones lets documents see each other",
        "adapters/transformers.py",
        "(positions[:, 1:] == 0) & (mask[:, :-1] != 0)",
        "(positions[:, 1:] == 0) & (mask[:, :-1] == 0)",
        "tests/adapters/test_reading.py",
    ),
    Mutant(
        "labels that PEFT names go into the backbone",
        "models/head.py",
        "for name, value in inputs.items() if value is not None}",
        "for name, value in inputs.items()}",
        "tests/adapters/test_reading.py",
    ),
    Mutant(
        "a folder's path is told to the hub",
        "report/origins.py",
        "    if loaded is None:\n        return _local(name)\n    commit = loaded.parent.name\n",
        '    commit = "" if loaded is None else loaded.parent.name\n',
        "tests/report/test_card.py",
    ),
    Mutant(
        "a public repository takes what was to be private",
        "export.py",
        "        _refuse_other_readers(repository, bool(api.model_info(repository).private), public)\n",
        "",
        "tests/test_export.py",
    ),
    Mutant(
        "half an export under its name",
        "export.py",
        'staged = to.absolute().with_name(f".{to.absolute().name}.{os.getpid()}.partial")',
        "staged = to.absolute()",
        "tests/test_export.py",
    ),
    Mutant(
        "a secret beside the weights goes along",
        "export.py",
        "        if without_secrets(text) != text:",
        "        if False:",
        "tests/test_export.py",
    ),
    Mutant(
        "an item among its own examples",
        "evaluate/commonsense/harness.py",
        '"test_split": task.split, "fewshot_split": task.split',
        '"test_split": None, "validation_split": task.split, "fewshot_split": task.split',
        "tests/evaluate/test_commonsense.py",
    ),
    Mutant(
        "a right answer of another type counts as wrong",
        "evaluate/commonsense/tasks.py",
        "return lambda value: int(one_of(*allowed)(value))",
        "return one_of(*allowed)",
        "tests/evaluate/test_commonsense.py",
    ),
    Mutant(
        "results on other items compared with a baseline",
        "report/tasks.py",
        'keys = ("task", "shots", "items_hash")',
        'keys = ("task", "shots")',
        "tests/report/test_tasks.py",
    ),
    Mutant(
        "results of two models in one file",
        "examination.py",
        "    if others:\n",
        "    if False:\n",
        "tests/test_examination.py",
    ),
    Mutant(
        "the bootstrap's plain percentiles, which claim too much of few rows",
        "report/uncertainty.py",
        "confidence_level=float(expanded),",
        "confidence_level=0.95,",
        "tests/report/test_uncertainty.py",
    ),
    Mutant(
        "held-out rows resampled one side at a time",
        "report/uncertainty.py",
        "paired=True,\n        vectorized=True,",
        "paired=False,\n        vectorized=True,",
        "tests/report/test_uncertainty.py",
    ),
    Mutant(
        "a difference counts where one of two intervals leaves 0 out",
        "report/uncertainty.py",
        "return all(one.leaves_zero_out for one in self.known) if self.known else None",
        "return any(one.leaves_zero_out for one in self.known) if self.known else None",
        "tests/report/test_uncertainty.py",
    ),
    Mutant(
        "seeds are compared without their partners",
        "report/groups.py",
        "if len(common) < 2:",
        "if len(common) < 99:",
        "tests/report/test_compare.py",
    ),
    Mutant(
        "a student is made up between the untrained one and its first evaluation",
        "report/curves.py",
        "if not 1 < after < len(points):",
        "if not 0 < after < len(points):",
        "tests/report/test_compare.py",
    ),
    Mutant(
        "tasks are compared on other items",
        "report/scores.py",
        'one["items_hash"]): one for one',
        '""): one for one',
        "tests/report/test_compare.py",
    ),
    Mutant(
        "other held-out rows are compared",
        "report/differences.py",
        "return all(each == tokens[0] for each in tokens)",
        "return True",
        "tests/report/test_report.py",
    ),
    Mutant(
        "an id drawn often counts once",
        "objective/from_cache.py",
        "weights.tail * shares[:, -1:] * repeats",
        "weights.tail * shares[:, -1:] / ids.shape[1]",
        "tests/objective/test_cached.py",
    ),
    Mutant(
        "cached ids beyond top_k keep their share of the whole",
        "objective/from_cache.py",
        "shares, ours = (p[:, kept:] - log_a).exp()",
        "shares, ours = p[:, kept:].exp()",
        "tests/objective/test_cached.py",
    ),
    Mutant(
        "a cache of another temperature taken",
        "objective/checks.py",
        "if objective.temperature != cached.temperature:",
        "if False:",
        "tests/objective/test_cached.py",
    ),
    Mutant(
        "a cache of fewer ids taken",
        "objective/checks.py",
        "cached.top_k < min(objective.top_k, cached.vocabulary_size)",
        "cached.top_k < 0",
        "tests/objective/test_cached.py",
    ),
    Mutant(
        "a teacher writes ids beyond the usable ones",
        "teacher/rollout.py",
        "scores[:, self.usable :] = -torch.inf",
        "scores[:, self.usable :] -= 0",
        "tests/test_generate.py",
    ),
    Mutant(
        "padding is read as text where a teacher writes",
        "teacher/rollout.py",
        "mask.append([*[1] * shared, *[0] * padding,",
        "mask.append([*[1] * shared, *[1] * padding,",
        "tests/test_generate.py",
    ),
    Mutant(
        "the teacher's own sampling settings have a say",
        "teacher/rollout.py",
        "with _own_generation_config(self.model, GenerationConfig()):",
        "with _own_generation_config(self.model, self.model.generation_config):",
        "tests/test_generate.py",
    ),
    Mutant(
        "an interrupted batch is written a second time",
        "teacher/rollout.py",
        "yield from list(zip(batch, self.write(batch), strict=True))[done:]",
        "yield from list(zip(batch, self.write(batch), strict=True))",
        "tests/test_generate.py",
    ),
    Mutant(
        "an end token behind a text that was cut off",
        "data/encoding.py",
        "found.append(Encoded([*next(ids), *[end] * document.finished]))",
        "found.append(Encoded([*next(ids), end]))",
        "tests/test_generate.py",
    ),
    Mutant(
        "the next document learned as a continuation of one that was cut off",
        "data/packing.py",
        "(np.diff(segments) != 0) & (run[:-1] != self.end)",
        "(np.diff(segments) != 0) & (run[:-1] == self.end)",
        "tests/test_generate.py",
    ),
    Mutant(
        "held-out documents as prompts",
        "prompts.py",
        "if self._held_out(document.hash):",
        "if False:",
        "tests/test_generate.py",
    ),
    Mutant(
        "requests that nobody waits for are waited for",
        "teacher/server.py",
        "connection.sock.shutdown(2)",
        "pass",
        "tests/test_server.py",
    ),
    Mutant(
        "sign of the tail term",
        "objective/divergences.py",
        "split.head_kl + weight * split.tail_kl",
        "split.head_kl - weight * split.tail_kl",
        "tests/objective",
    ),
    Mutant(
        "sign of the tail term, chunked",
        "objective/blocks.py",
        "addcmul_(student, (weights.scale / found.student_total).to(wide))",
        "addcmul_(student, (-weights.scale / found.student_total).to(wide))",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "sign of the tail term, fused",
        "objective/kernels.py",
        "on_student * of_student - on_teacher * of_teacher",
        "on_student * of_student + on_teacher * of_teacher",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "a kept graph's gradient scaled in place",
        "objective/chunked.py",
        "in_place = dtype == gradient.dtype and not _graph_is_kept()",
        "in_place = dtype == gradient.dtype",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "mean tail mass over all rows, chunked and fused",
        "objective/work.py",
        "objective, log_mean = self.objective, self.log_mean[self.layout.group[start:stop]]",
        "objective, log_mean = self.objective, self.log_mean.exp().mean().log().expand(stop - start)",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "teacher and student swapped, chunked",
        "objective/blockwise.py",
        "self._divergence((s, t, buffers[2]),",
        "self._divergence((t, s, buffers[2]),",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "teacher and student swapped, fused",
        "objective/fused.py",
        "rows.head_kl(p, q)",
        "rows.head_kl(q, p)",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "tail mass as 1 - sum, chunked and fused",
        "objective/rows.py",
        "return Lumped(logits - log_sum_exp, log_sum_exp)",
        "log = logits - log_sum_exp\n        log[:, -1:] = (1 - log[:, :-1].exp().sum(1, keepdim=True)).log()\n"
        "        return Lumped(log, log_sum_exp)",
        "tests/objective/test_chunked.py",
    ),
    Mutant(
        "-inf rows as they are, fused",
        "objective/kernels.py",
        "return tl.where(x > -1e29, z, LOW)",
        "return z",
        "tests/objective/test_kernels.py",
    ),
    Mutant(
        "gradient of a sharded head left unreduced",
        "models/head.py",
        'full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)',
        "full_tensor()",
        "tests/models",
    ),
    Mutant(
        "mask dropped in the mean tail mass",
        "objective/divergences.py",
        "log_tail_mass.detach().masked_fill(~mask, NEGATIVE_INFINITY)",
        "log_tail_mass.detach()",
        "tests/objective",
    ),
    Mutant(
        "mean tail mass over the whole row",
        "train/step.py",
        "micro.labels.shape[1], micro.sequences)",
        "micro.labels.shape[1], None)",
        "tests/data/test_documents.py",
    ),
    Mutant(
        "attention over a document's border",
        "train/step.py",
        "head = student(micro.input_ids, micro.position_ids)",
        "head = student(micro.input_ids)",
        "tests/data/test_documents.py",
    ),
    Mutant(
        "a teacher that sees the neighbour",
        "teacher/live.py",
        "self._whole(batch.input_ids, batch.position_ids)",
        "self._whole(batch.input_ids)",
        "tests/data/test_documents.py",
    ),
    Mutant(
        "prompts learned",
        "data/packing.py",
        "labels[:count][~learned[1:]] = IGNORED",
        "pass",
        "tests/data",
    ),
    Mutant(
        "half an answer learned",
        "data/documents.py",
        "labels[:unlearned] = IGNORED",
        "pass",
        "tests/data/test_documents.py",
    ),
    Mutant(
        "an answer without its end token",
        "data/chat.py",
        "loss[at : ahead + 1] = [1] * (ahead + 1 - at)",
        "pass",
        "tests/data/test_chat.py",
    ),
    Mutant(
        "labels off by one",
        "data/packing.py",
        "run[:-1], run[1:], segments[:-1]",
        "run[:-1], run[:-1], segments[:-1]",
        "tests/data",
    ),
    Mutant(
        "teacher and student swapped",
        "objective/loss.py",
        "split = divergences.split_kl(log_p, log_q, divergences.top",
        "split = divergences.split_kl(log_q, log_p, divergences.top",
        "tests/objective",
    ),
    Mutant(
        "weight decay on norms",
        "train/optim.py",
        'if p.dim() < 2], "weight_decay": 0.0}',
        'if p.dim() < 2], "weight_decay": weight_decay}',
        "tests/train",
    ),
    Mutant(
        "tail mass as 1 - sum",
        "objective/divergences.py",
        "log_mass_p = log_sum_exp(log_p.masked_fill(head, NEGATIVE_INFINITY))",
        "log_mass_p = (1 - log_p.exp().masked_fill(~head, 0.0).sum(-1)).log()",
        "tests/objective",
    ),
    Mutant(
        "division per micro-batch",
        "train/step.py",
        "(total / max(divisor, 1)).backward()",
        "(total / max(micro.count, 1) / len(micros)).backward()",
        "tests/train",
    ),
    Mutant(
        "evaluation by mean of means",
        "evaluate/heldout.py",
        "measures = asked.means(table.sum(0),",
        "measures = asked.means((table / table[:, -1:]).mean(0) * table[:, -1].sum(),",
        "tests/evaluate",
    ),
    Mutant(
        "stale tokenizer fingerprint accepted",
        "data/tokens.py",
        '"tokenizer": tokenizer_fingerprint(tokenizer),',
        '"tokenizer": len(tokenizer),',
        "tests/data",
    ),
    Mutant(
        "held-out document in training",
        "data/packing.py",
        "return np.flatnonzero(~held), np.flatnonzero(held)",
        "return np.arange(len(held)), np.flatnonzero(held)",
        "tests/data",
    ),
    Mutant(
        "hash of files not compared",
        "train/commit.py",
        "if measure(folder / name) != expected:",
        "if False:",
        "tests/faults/test_f10_flipped.py",
    ),
    Mutant(
        "manifest's own hash not compared",
        "train/commit.py",
        'if raw != _manifest(content["format"], files):',
        "if False:",
        "tests/faults/test_f10_flipped.py",
    ),
    Mutant(
        "sizes and hash of files not compared",
        "train/commit.py",
        "for name, expected in files.items():\n            size",
        "files = {}\n        for name, expected in files.items():\n            size",
        "tests/faults/test_f09_truncated.py",
    ),
    Mutant(
        "files that are not listed accepted",
        "train/commit.py",
        "if extra := sorted(plain.keys() - listed):",
        "if extra := []:",
        "tests/faults/test_f11_missing.py",
    ),
    Mutant(
        "symbolic links taken for checkpoints",
        "train/commit.py",
        "wanted(e.name) and e.is_dir(follow_symlinks=False)",
        "wanted(e.name) and e.is_dir()",
        "tests/faults/test_f11_missing.py",
    ),
    Mutant(
        "names in a manifest not checked",
        "train/commit.py",
        "if not _NAME.fullmatch(name) or name == MANIFEST:",
        "if False:",
        "tests/faults/test_f40_hostile.py",
    ),
    Mutant(
        "parts of a tensor not checked",
        "train/tensors.py",
        "if not _covered(tensor):",
        "if False:",
        "tests/faults/test_f40_hostile.py",
    ),
    Mutant(
        "published before it is whole",
        "train/checkpoint.py",
        """        commit.seal(staged, {name: one for files, _ in parts for name, one in files.items()}, state)
        published = commit.publish(staged, taken.cursor.step)
""",
        """        published = commit.publish(staged, taken.cursor.step)
        commit.seal(published, {name: one for files, _ in parts for name, one in files.items()}, state)
""",
        "tests/faults/test_f02_killed.py",
    ),
    Mutant(
        "leftovers of dead saves stay",
        "train/commit.py",
        "shutil.rmtree(left)",
        "pass",
        "tests/faults/test_f02_killed.py",
    ),
    Mutant(
        "files not synced",
        "train/disk.py",
        "os.fsync(self._file)",
        "pass",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "parent folder not synced",
        "train/commit.py",
        "sync(target.parent)",
        "pass",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "files not read back",
        "train/commit.py",
        "if found != expected:",
        "if False:",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "rotation takes the one just saved",
        "train/commit.py",
        "if old != published:",
        "if True:",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "free space not asked for",
        "train/commit.py",
        "if free < needed:",
        "if False:",
        "tests/faults/test_f06_disk_full.py",
    ),
    Mutant(
        "half a save left where the disk is full",
        "train/checkpoint.py",
        "shutil.rmtree(staged, ignore_errors=True)",
        "pass",
        "tests/faults/test_f06_disk_full.py",
    ),
    Mutant(
        "checkpoints in the order of their dates",
        "train/commit.py",
        "is not None), key=step_of)",
        "is not None), key=lambda path: path.stat().st_mtime)",
        "tests/faults/test_f43_clock.py",
    ),
    Mutant(
        "a fresh start where all checkpoints are bad",
        "train/checkpoint.py",
        "if bad := commit.quarantined(self.folder):",
        "if bad := []:",
        "tests/faults/test_f12_all_bad.py",
    ),
    Mutant(
        "another identity accepted",
        "train/checkpoint.py",
        "        if refused:",
        "        if False:",
        "tests/faults/test_f14_changed.py",
    ),
    Mutant(
        "values that are not finite saved",
        "train/checkpoint.py",
        "if bad := [name for _, names in told for name in names]:",
        "if bad := []:",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "live tensors written instead of copies",
        "train/tensors.py",
        "self._held[name].copy_(tensor, non_blocking=True)",
        "self._held[name] = tensor",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "random state not restored",
        "train/checkpoint.py",
        'torch.set_rng_state(_bytes(saved[rank]["torch"]))',
        "pass",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "moments not restored",
        "train/tensors.py",
        'packed["state"].setdefault(numbers[parameter], {})[key] = value',
        "pass",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "names of parameters before they are shards again",
        "train/tensors.py",
        """    state = bare.state_dict()  # first: it makes fully_shard put its parameters back into shards
    names: dict[int, str] = {}
    for name, tensor in _all_named(bare):
        names.setdefault(id(tensor), name)
""",
        """    names: dict[int, str] = {}
    for name, tensor in _all_named(bare):
        names.setdefault(id(tensor), name)
    state = dict(_all_named(bare))
""",
        "tests/faults/test_f15_ranks.py",
    ),
    Mutant(
        "teacher not looked at",
        "train/step.py",
        "self.bad = self.bad | ~torch.isfinite(numbers).all()",
        "pass",
        "tests/faults/test_f18_not_finite.py",
    ),
    Mutant(
        "update applied though something is not finite",
        "train/step.py",
        "if not_finite is None and batch.count:",
        "if batch.count:",
        "tests/faults/test_f18_not_finite.py",
    ),
    Mutant(
        "one rank skips an update alone",
        "train/step.py",
        "found = self.ranks.largest(flags).tolist()",
        "found = flags.tolist()",
        "tests/train/test_ranks.py",
    ),
    Mutant(
        "divergence goes on",
        "train/loop.py",
        "if self.cursor.skipped_in_a_row >= SKIPS_IN_A_ROW:",
        "if False:",
        "tests/faults/test_f18_not_finite.py",
    ),
    Mutant(
        "signals ignored",
        "train/signals.py",
        "        if asked:",
        "        if False:",
        "tests/faults/test_f03_asked_to_stop.py",
    ),
    Mutant(
        "an interrupted evaluation is forgotten",
        "train/loop.py",
        "while self.cursor.evaluation_due or self.cursor.step < self.plan.steps:\n"
        "                self._evaluate_if_due()",
        "self.cursor = replace(self.cursor, evaluation_due=False)\n"
        "            while self.cursor.step < self.plan.steps:",
        "tests/faults/test_f03_asked_to_stop.py",
    ),
    Mutant(
        "records after the checkpoint stay",
        "run.py",
        "resume_at=cursor.metrics_bytes)",
        'resume_at=cursor.metrics_bytes and (run.folder / "metrics.jsonl").stat().st_size)',
        "tests/faults/test_f03_asked_to_stop.py",
    ),
    Mutant(
        "no lock",
        "folder.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/faults/test_f13_two_processes.py",
    ),
    Mutant(
        "another corpus accepted",
        "run.py",
        '"data (content)": parts.fingerprint',
        '"data (content)": ""',
        "tests/faults/test_f30_changed_data.py",
    ),
    Mutant(
        "secrets written down",
        "secrets.py",
        "text = form.sub(shown, text)",
        "pass",
        "tests/faults/test_f42_crash.py",
    ),
    Mutant(
        "memory that runs out is a bug",
        "train/step.py",
        "if not _is_out_of_memory(error):",
        "if True:",
        "tests/faults/test_f33_out_of_memory.py",
    ),
    Mutant(
        "a border belongs to the bin above",
        "evaluate/calibration.py",
        "(probabilities * bins).ceil().long().sub(1)",
        "(probabilities * bins).floor().long()",
        "tests/evaluate",
    ),
    Mutant(
        "the teacher's first ids taken for the student's",
        "evaluate/heldout.py",
        "if alone else blocks.largest(s, few)[1]",
        "",
        "tests/evaluate",
    ),
    Mutant(
        "bins by size half as wide",
        "evaluate/calibration.py",
        "unflatten(1, (-1, 16))",
        "unflatten(1, (-1, 8))",
        "tests/evaluate",
    ),
    Mutant(
        "padded rows are measured",
        "measurement.py",
        "SplitModel(model, usable=one.usable, compute_dtype=dtype)",
        "SplitModel(model, compute_dtype=dtype)",
        "tests/test_measurement.py",
    ),
    Mutant(
        "any bracket is as good as another",
        "evaluate/mathematics/equality.py",
        "if len(brackets) > 1:",
        "if len(brackets) > 2:",
        "tests/evaluate",
    ),
    Mutant(
        "percent and fractions are strangers",
        "evaluate/mathematics/equality.py",
        "(1.0, 0.01, 100.0)",
        "(1.0,)",
        "tests/evaluate",
    ),
    Mutant(
        "a judge that hangs is asked again",
        "evaluate/mathematics/judge.py",
        "        if answer is None:\n            self.close()\n",
        "        if answer is None:\n",
        "tests/evaluate",
    ),
    Mutant(
        "the first box, not the last",
        "evaluate/mathematics/extraction.py",
        'text.rpartition("boxed")',
        'text.partition("boxed")',
        "tests/evaluate",
    ),
    Mutant(
        "selection in the order of its scores",
        "data/select.py",
        'return np.sort(np.argsort(-differences, kind="stable")[:count])',
        'return np.argsort(-differences, kind="stable")[:count]',
        "tests/data/test_select.py",
    ),
    Mutant(
        "scorings of other rows compared",
        "selection.py",
        'if not same or not np.array_equal(teacher["weight"], reference["weight"]):',
        "if False:",
        "tests/test_selection.py",
    ),
    Mutant(
        "chunk of scores believed",
        "teacher/score.py",
        "return content if xxhash.xxh3_128_digest(content) == digest else None",
        "return content",
        "tests/test_selection.py",
    ),
    Mutant(
        "cached row believed",
        "teacher/shards.py",
        "if digest_of(self.keys[place].numpy().tobytes(), entry) != self._digests[place].tobytes():",
        "if False:",
        "tests/test_cache.py",
    ),
    Mutant(
        "cached rows draw alike",
        "teacher/cache_writing.py",
        'np.random.Philox(key=int.from_bytes(key, "little"))',
        "np.random.Philox(key=0)",
        "tests/test_cache.py",
    ),
    Mutant(
        "cache of another teacher",
        "cache.py",
        "now = _made_of(recipe, shared, ranks) if recipe.teachers else _vocabulary(recipe, shared)",
        "now = _vocabulary(recipe, shared)",
        "tests/test_cache.py",
    ),
    Mutant(
        "cache without some of the rows",
        "cache.py",
        "    if lacking:\n",
        "    if False:\n",
        "tests/test_cache.py",
    ),
    Mutant(
        "tokens chosen by batch",
        "train/step.py",
        "excess_weights(losses, reference, micro.row_borders, micro.learned)",
        "excess_weights(losses, reference, (0, micro.count), micro.learned)",
        "tests/train/test_excess.py",
    ),
    Mutant(
        "chosen tokens' loss over all tokens",
        "train/step.py",
        "divisor=batch.learned_count / self.ranks.world,",
        "divisor=batch.count / self.ranks.world,",
        "tests/train/test_excess.py",
    ),
    Mutant(
        "a step is shown twice after a resume",
        "track/follow.py",
        'if record["step"] > sink.last:',
        "if sink.last is not None:",
        "tests/test_track.py",
    ),
    Mutant(
        "a tool that hangs is waited for",
        "track/trackers.py",
        "if process.wait(max(0.0, until - time.monotonic())):",
        "if process.wait(40 + max(0.0, until - time.monotonic())):",
        "tests/test_track.py",
    ),
    Mutant(
        "a call of a tool may take for ever",
        "track/follow.py",
        "signal.alarm(PATIENCE)",
        "signal.alarm(0)",
        "tests/test_track.py",
    ),
    Mutant(
        "what a tool started lives on",
        "track/trackers.py",
        "os.killpg(process.pid, signal.SIGKILL)",
        "os.kill(process.pid, signal.SIGKILL)",
        "tests/test_track.py",
    ),
    Mutant(
        "a run that is looked at is taken for one in use",
        "folder.py",
        "if time.monotonic() < until:",
        "if time.monotonic() < 0:",
        "tests/test_watching.py",
    ),
    Mutant(
        "padding inside a window",
        "teacher/rollout.py",
        "if any(type(layer) is not DynamicLayer for layer in cache.layers):",
        "if False:",
        "tests/evaluate/test_solving.py",
    ),
    Mutant(
        "torn batch left in a log",
        "evaluate/mathematics/log.py",
        "self._file.truncate(end)",
        "pass",
        "tests/evaluate/test_mathematics.py",
    ),
    Mutant(
        "another model's samples taken",
        "evaluate/mathematics/log.py",
        "        if others:",
        "        if False:",
        "tests/evaluate/test_solving.py",
    ),
)


def first_failure(sources: Path, *arguments: str) -> str | None:
    """Name of the first test that fails on these sources."""
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert found or done.returncode == 0, done.stdout + done.stderr
    return found.group(1) if found else None


def caught_by(mutant: Mutant) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src" / "tailkd", Path(folder) / "tailkd")
        path = Path(folder) / "tailkd" / mutant.file
        text = path.read_text("utf-8")
        assert text.count(mutant.before) == 1, (
            f"{mutant.name}: {mutant.file} holds its place {text.count(mutant.before)} times"
        )
        path.write_text(text.replace(mutant.before, mutant.after), "utf-8")
        return first_failure(Path(folder), mutant.tests) or first_failure(Path(folder))


def main() -> int:
    missed = 0
    for mutant in MUTANTS:
        test = caught_by(mutant)
        missed += test is None
        print(f"{mutant.name:<40} {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} faults caught")
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
