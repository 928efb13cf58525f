"""A student cut out of its teacher: a smaller model of the same class that starts from the teacher's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from tailkd.errors import Refusal
from tailkd.models.slices import Sizes, Slices, head_dimensions, matching_pairs, rotary_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "phi", "phi3", "gemma2")
SPREAD = 0.02  # standard deviation of what is not the teacher's
KEY = "student.from_teacher"


@dataclass(frozen=True)
class Cut:
    """What a student keeps of its teacher; None keeps the teacher's size.

    layer_choice: "even" takes layers round(linspace(0, teacher's - 1, layers)); or their numbers, from 0, ascending.
    attention: dimensions of each head, its norms too: "prefix" the first (Tail-Aware Distillation, section 3.2),
        "rope" rotary pairs of matching frequencies (see `models.slices`), "random" nothing of the teacher's.
    mlp: "copy" needs the teacher's hidden_size and intermediate_size.
    embeddings: the vocabulary head too; "copy" needs the teacher's hidden_size, "slice" takes the first dimensions.
    tie_word_embeddings: a tied head of an untied teacher's student is its input embeddings; None: as the teacher.
    rescale: enlarge weights that read fewer inputs than the teacher's (see `models.slices.Slices`).
    seed: of what is "random", N(0, 0.02) with biases of 0.

    Norms are the teacher's, their first dimensions; where attention, MLP and embeddings are all random, they are new.
    The number of query heads is always the teacher's.
    """

    layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    layer_choice: Literal["even"] | tuple[int, ...] = "even"
    attention: Literal["prefix", "rope", "random"] = "prefix"
    mlp: Literal["random", "copy"] = "random"
    embeddings: Literal["copy", "slice", "random"] = "copy"
    tie_word_embeddings: bool | None = None
    rescale: bool = False
    seed: int = 0


def source_layers(config: PreTrainedConfig, cut: Cut) -> list[int]:
    """For each of the student's layers the number, from 0, of the teacher's that it comes from.

    Raises:
        Refusal: layers that the teacher does not have, or another number of them than `layers`.
    """
    have = Sizes.of(config).layers
    if cut.layer_choice == "even":
        layers = have if cut.layers is None else _within("layers", cut.layers, have)
        return [round(number * (have - 1) / max(layers - 1, 1)) for number in range(layers)]
    chosen = list(cut.layer_choice)
    if not chosen or chosen != sorted({number for number in chosen if 0 <= number < have}):
        raise Refusal(
            f"{KEY}.layer_choice is {chosen}; expected layers of the teacher in order, out of 0 to {have - 1}"
        )
    if cut.layers not in (None, len(chosen)):
        raise Refusal(
            f"{KEY}.layer_choice names {len(chosen)} layers, {KEY}.layers is {cut.layers}; leave {KEY}.layers out, or "
            "take layer_choice: even"
        )
    return chosen


def student_config(config: PreTrainedConfig, cut: Cut) -> PreTrainedConfig:
    """The student's configuration: the teacher's but for the sizes, with type and window of each source layer.

    Rotary base and scaling, positions, norms' epsilon and Gemma-2's query_pre_attn_scalar and soft-caps stay.

    Raises:
        Refusal: another family, or sizes that cannot be.
    """
    chosen = source_layers(_known(config), cut)
    teacher, sizes = Sizes.of(config), _sizes(config, cut, len(chosen))
    student: Any = copy.deepcopy(config)
    student._name_or_path = ""
    student.dtype = torch.float32
    student.initializer_range = SPREAD
    student.num_hidden_layers, student.hidden_size = sizes.layers, sizes.hidden_size
    student.intermediate_size, student.num_key_value_heads = sizes.intermediate_size, sizes.kv_heads
    if hasattr(config, "head_dim") or sizes.head_dim != sizes.hidden_size // sizes.heads:
        student.head_dim = sizes.head_dim
    if cut.tie_word_embeddings is not None:
        student.tie_word_embeddings = cut.tie_word_embeddings
    if getattr(config, "layer_types", None) is not None:
        student.layer_types = [student.layer_types[number] for number in chosen]
    if getattr(config, "use_sliding_window", False):  # Qwen's: from this layer on all are sliding
        student.max_window_layers = sum(number < student.max_window_layers for number in chosen)
    if sizes.rotary != teacher.rotary:
        pairs = matching_pairs(teacher.rotary, sizes.rotary)
        for name in student.rope_parameters.keys() & {"short_factor", "long_factor"}:  # longrope: one for each pair
            factors = student.rope_parameters[name]
            student.rope_parameters[name] = [factors[pair] for pair in pairs]
    return student


def cut_student(teacher: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """The student in float32 on the CPU, in evaluation mode: a plain model of the teacher's class.

    The teacher, on any device and of any dtype, is only read, a parameter at a time. With all of its sizes and
    ``mlp="copy"`` the student gives the teacher's logits. Equal cuts of equal teachers are equal, bit by bit.

    Raises:
        Refusal: another family, sizes that cannot be, or a copy of another width.
    """
    config = student_config(teacher.config, cut)
    sizes, chosen = Sizes.of(config), source_layers(teacher.config, cut)
    dims = head_dimensions(Sizes.of(teacher.config), sizes, keep_pairs=cut.attention == "rope")
    slices = Slices(Sizes.of(teacher.config), sizes, dims, cut.rescale)
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(cut.seed)
        student = type(teacher)._from_config(config, dtype=torch.float32).eval()
    weights = dict(teacher.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if _is_taken(name, cut):
                source = _source_name(name, chosen)
                part = slices(source, weights[source].detach())
                assert part.shape == parameter.shape, name  # copy_ would broadcast
                parameter.copy_(part)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def freeze_embeddings(model: Any) -> None:
    """Input embeddings, and with them a tied vocabulary head, are not trained; before the optimizer is made."""
    model.get_input_embeddings().weight.requires_grad_(False)


def _is_taken(name: str, cut: Cut) -> bool:
    if ".self_attn." in name:
        return cut.attention != "random"
    if ".mlp." in name:
        return cut.mlp == "copy"
    if "embed_tokens" in name or "lm_head" in name:
        return cut.embeddings != "random"
    return (cut.attention, cut.mlp, cut.embeddings) != ("random", "random", "random")  # norms


def _source_name(name: str, chosen: list[int]) -> str:
    before, layers, after = name.partition(".layers.")
    if not layers:
        return name
    number, dot, rest = after.partition(".")
    return f"{before}{layers}{chosen[int(number)]}{dot}{rest}"


def _known(config: PreTrainedConfig) -> PreTrainedConfig:
    if config.model_type not in FAMILIES:
        raise Refusal(
            f"no student can be cut out of a {config.model_type!r} model: how its heads lie in its weights is known "
            f"for {', '.join(FAMILIES)}; give student.model, a folder with a model of your own"
        )
    return config


def _sizes(config: Any, cut: Cut, layers: int) -> Sizes:
    """The student's sizes, found possible."""
    teacher = Sizes.of(config)
    names = ("hidden_size", "intermediate_size", "head_dim", "kv_heads")
    asked = {name: getattr(cut, name) for name in names if getattr(cut, name) is not None}
    found = {name: _within(name, asked.get(name, getattr(teacher, name)), getattr(teacher, name)) for name in names}
    sizes = Sizes(layers=layers, heads=teacher.heads, rotary=rotary_size(config, found["head_dim"]), **found)
    _refuse_impossible(config, teacher, sizes)
    same_width = sizes.hidden_size == teacher.hidden_size
    if cut.embeddings == "copy" and not same_width:
        raise Refusal(
            f"{KEY}.embeddings is copy, but hidden_size is {sizes.hidden_size} and the teacher's "
            f"{teacher.hidden_size}; take embeddings: slice (its first dimensions) or random"
        )
    if cut.mlp == "copy" and not (same_width and sizes.intermediate_size == teacher.intermediate_size):
        raise Refusal(
            f"{KEY}.mlp is copy, but hidden_size and intermediate_size are {sizes.hidden_size} and "
            f"{sizes.intermediate_size}, the teacher's {teacher.hidden_size} and {teacher.intermediate_size}; take "
            "mlp: random, or the teacher's sizes"
        )
    return sizes


def _refuse_impossible(config: Any, teacher: Sizes, sizes: Sizes) -> None:
    per_head = sizes.hidden_size // sizes.heads
    if sizes.hidden_size != teacher.hidden_size and sizes.hidden_size % sizes.heads:
        raise Refusal(
            f"{KEY}.hidden_size is {sizes.hidden_size}, which does not divide by the teacher's {sizes.heads} query "
            f"heads; take {per_head * sizes.heads or sizes.heads} or another multiple of {sizes.heads}"
        )
    if teacher.kv_heads % sizes.kv_heads:
        divisors = [str(n) for n in range(1, teacher.kv_heads + 1) if teacher.kv_heads % n == 0]
        raise Refusal(
            f"{KEY}.kv_heads is {sizes.kv_heads}, but the teacher's {teacher.kv_heads} key and value heads are joined "
            f"in equal groups; take one of {', '.join(divisors)}"
        )
    if sizes.rotary < 2 or sizes.rotary % 2:
        raise Refusal(
            f"{KEY}.head_dim is {sizes.head_dim}, of which {sizes.rotary} dimensions would be rotated; rotary "
            "positions turn pairs, so take a head_dim that gives an even number of them, 2 or more"
        )
    derived = getattr(config, "qk_layernorm", False) or "long_factor" in (config.rope_parameters or {})
    if derived and sizes.head_dim != per_head:
        raise Refusal(
            f"{KEY}.head_dim is {sizes.head_dim}, but this {config.model_type!r} model takes its norms or rotary "
            f"factors for heads of hidden_size / heads = {per_head}; take head_dim {per_head} or another hidden_size"
        )


def _within(name: str, value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise Refusal(f"{KEY}.{name} is {value}; the teacher has {most}: take a number from 1 to {most}")
    return value
