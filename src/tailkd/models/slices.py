"""Which part of each of a teacher's weights a smaller model of its class starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUERIES = ("q_proj",)
KEYS_AND_VALUES = ("k_proj", "v_proj")
FUSED = ("qkv_proj",)
OUTPUTS = ("o_proj", "dense")
HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


@dataclass(frozen=True)
class Sizes:
    """What a configuration makes of a decoder; `rotary`: how many of a head's first dimensions are rotated."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int

    @staticmethod
    def of(config: Any) -> Sizes:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return Sizes(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary=rotary_size(config, head_dim),
        )


def rotary_size(config: Any, head_dim: int) -> int:
    """Rotated dimensions of a head of this size: Phi rotates the first 0.4 of each."""
    return int(head_dim * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


def matching_pairs(teacher: int, student: int) -> list[int]:
    """For each rotary pair j of the student the teacher's pair of the nearest frequency, round(j * teacher / student).

    Arguments are rotated dimensions, two for a pair. Pair j turns by ``base ** (-2 * j / rotated)`` a position, so the
    frequencies are equal where ``j * teacher / student`` is whole (128 to 64: pair 2 * j).
    """
    return [round(pair * teacher / student) for pair in range(student // 2)]


def head_dimensions(teacher: Sizes, student: Sizes, *, keep_pairs: bool) -> list[int]:
    """Which dimensions of a teacher's head become the student's, in its order.

    The first ones; or with `keep_pairs` (i, i + rotary / 2) for each of the `matching_pairs`, and of the dimensions
    that are not rotated the first ones.
    """
    if not keep_pairs:
        return list(range(student.head_dim))
    pairs = matching_pairs(teacher.rotary, student.rotary)
    still = student.head_dim - student.rotary
    second = teacher.rotary // 2
    return [*pairs, *(second + pair for pair in pairs), *range(teacher.rotary, teacher.rotary + still)]


@dataclass(frozen=True)
class Slices:
    """``Slices(...)(name, weight)`` is the part of a teacher's parameter that the student's of the same name gets.

    Per head, ``d`` a width, ``d_H`` a head's size, T and S teacher and student, ``dims`` from `head_dimensions`::

        q, k, v, their biases     w.view(heads, d_H_T, d_T)[:, dims, :d_S]
        o                         w.view(d_T, heads, d_H_T)[:d_S, :, dims]
        norms of a head           w[dims]
        embeddings, head          w[:, :d_S]
        norms, o's bias           w[:d_S]
        vocabulary bias, MLP      w

    Fewer key and value heads: each is the mean of the adjacent ones whose queries it now serves (Ainslie et al. 2023,
    "GQA", section 2.1: better than taking one of them).
    With `rescale` a weight that reads fewer inputs is larger, so that a sum over inputs of one size keeps its own: q,
    k, v and an untied vocabulary head by sqrt(d_T / d_S), o by sqrt(d_H_T / d_H_S); biases, norms, embeddings stay.
    """

    teacher: Sizes
    student: Sizes
    dims: list[int]
    rescale: bool = False

    def __call__(self, name: str, weight: Tensor) -> Tensor:
        *_, module, kind = name.split(".")
        if module in HEAD_NORMS:
            return weight[self.dims]
        if module in QUERIES:
            return self._read(weight, self.teacher.heads, self.student.heads)
        if module in KEYS_AND_VALUES:
            return self._read(weight, self.teacher.kv_heads, self.student.kv_heads)
        if module in FUSED:
            return self._fused(weight)
        if module in OUTPUTS and kind == "weight":
            return self._written(weight)
        if module == "embed_tokens":
            return weight[:, : self.student.hidden_size]
        if module == "lm_head":
            return self._rescaled(self._inputs(weight), self.teacher.hidden_size, self.student.hidden_size)
        return weight if ".mlp." in name else weight[: self.student.hidden_size]

    def _read(self, weight: Tensor, teacher_heads: int, student_heads: int) -> Tensor:
        """Rows of some heads that read the hidden states; of a bias too."""
        part = self._of_heads(self._inputs(weight), teacher_heads, student_heads)
        return self._rescaled(part, self.teacher.hidden_size, self.student.hidden_size)

    def _fused(self, weight: Tensor) -> Tensor:
        """Queries, keys and values in one matrix."""
        counts = [(getattr(self.teacher, n), getattr(self.student, n)) for n in ("heads", "kv_heads", "kv_heads")]
        parts = weight.split([teacher * self.teacher.head_dim for teacher, _ in counts])
        return torch.cat([self._read(part, *count) for part, count in zip(parts, counts, strict=True)])

    def _written(self, weight: Tensor) -> Tensor:
        """Columns of the heads, whose outputs are written into the hidden states."""
        rows = weight[: self.student.hidden_size]
        part = self._of_heads(rows.T, self.teacher.heads, self.student.heads).T
        return self._rescaled(part, self.teacher.head_dim, self.student.head_dim)

    def _of_heads(self, weight: Tensor, teacher_heads: int, student_heads: int) -> Tensor:
        part = weight.unflatten(0, (teacher_heads, self.teacher.head_dim))[:, self.dims]
        if student_heads != teacher_heads:
            part = part.float().unflatten(0, (student_heads, teacher_heads // student_heads)).mean(1)
        return part.flatten(0, 1)

    def _inputs(self, weight: Tensor) -> Tensor:
        return weight if weight.dim() == 1 else weight[:, : self.student.hidden_size]

    def _rescaled(self, weight: Tensor, teacher: int, student: int) -> Tensor:
        if not self.rescale or teacher == student or weight.dim() == 1:
            return weight
        return weight.float() * math.sqrt(teacher / student)
