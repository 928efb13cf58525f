"""Students cut out of their teachers: every weight against a loop that spells the slice, family by family."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from teachers import FAMILIES, SHARED, build_teacher, half, logits
from torch import Tensor, nn

from tailkd.models.shrink import Cut, cut_student, source_layers, student_config

# ----- what stays


@pytest.mark.parametrize("attention", ["prefix", "rope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_sizes_gives_the_teachers_logits(family: str, attention: Any) -> None:
    teacher = build_teacher(family)
    student = cut_student(teacher, Cut(mlp="copy", attention=attention))
    assert type(student) is type(teacher)
    assert torch.equal(logits(student), logits(teacher))
    assert student.config.to_dict() == {**teacher.config.to_dict(), "initializer_range": 0.02, "dtype": "float32"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_keeps_type_window_and_rotary_base_of_its_source(family: str) -> None:
    teacher = build_teacher(family)
    chosen = [0, 2, 5]
    student = cut_student(teacher, Cut(layers=3, mlp="copy"))
    assert source_layers(teacher.config, Cut(layers=3)) == chosen
    for layer, number in zip(student.model.layers, chosen, strict=True):
        source = teacher.model.layers[number].self_attn
        for name in ("sliding_window", "layer_type", "scaling"):
            assert getattr(layer.self_attn, name, None) == getattr(source, name, None)
    if types := getattr(teacher.config, "layer_types", None):
        assert student.config.layer_types == [types[number] for number in chosen]
        assert set(student.config.layer_types) == {"sliding_attention", "full_attention"}
    assert getattr(student.config, "sliding_window", None) == getattr(teacher.config, "sliding_window", None)
    assert student.config.rope_parameters == teacher.config.rope_parameters
    assert torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)
    assert torch.equal(logits(student), logits(without_the_others(teacher, chosen)))


def without_the_others(teacher: Any, chosen: list[int]) -> Any:
    """The teacher with all but some of its layers taken out by hand."""
    model = copy.deepcopy(teacher)
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in chosen)
    model.config.num_hidden_layers = len(chosen)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [teacher.config.layer_types[number] for number in chosen]
    return model


@pytest.mark.parametrize(
    ("have", "layers", "expected"),
    [
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (32, 16, [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31]),
        (36, 18, [0, 2, 4, 6, 8, 10, 12, 14, 16, 19, 21, 23, 25, 27, 29, 31, 33, 35]),
        (42, 14, [0, 3, 6, 9, 13, 16, 19, 22, 25, 28, 32, 35, 38, 41]),
        (24, None, list(range(24))),
        (5, 1, [0]),
    ],
)
def test_layers_are_spread_evenly(have: int, layers: int | None, expected: list[int]) -> None:
    config = transformers.LlamaConfig(**{**SHARED, "num_hidden_layers": have})
    assert source_layers(config, Cut(layers=layers)) == expected
    assert expected == torch.linspace(0, have - 1, layers or have, dtype=torch.float64).round().int().tolist()


def test_layers_that_were_named() -> None:
    config = build_teacher("Gemma2").config
    cut = Cut(layer_choice=(1, 2, 5))
    assert source_layers(config, cut) == [1, 2, 5]
    assert student_config(config, cut).layer_types == ["full_attention", "sliding_attention", "full_attention"]
    windows = student_config(build_teacher("Qwen2").config, cut)
    assert windows.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert windows.max_window_layers == 2
    assert student_config(qwen15(), Cut(layers=2)).max_window_layers == qwen15().max_window_layers


# ----- what is cut, against a loop


def rotary_pairs(config: Any) -> list[tuple[int, int]]:
    """The dimensions of the teacher's head that turn together, by section 13 for heads of half the size."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return [(2 * pair, 2 * pair + rotated // 2) for pair in range(rotated // 4)]


def expected_dimensions(config: Any, attention: str) -> list[int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if attention == "prefix":
        return list(range(head_dim // 2))
    pairs = rotary_pairs(config)
    rotated = int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    dims = [first for first, _ in pairs] + [second for _, second in pairs]
    return dims + list(range(rotated, rotated + head_dim // 2 - len(dims)))


class Weights:
    """A layer's attention by the parts of section 13, the fused matrix of Phi-3 taken apart."""

    def __init__(self, model: Any, number: int) -> None:
        attention = model.model.layers[number].self_attn
        config = model.config
        self.heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
        self.size = attention.head_dim
        output = attention.dense if hasattr(attention, "dense") else attention.o_proj
        self.read, self.biases = {}, {}
        self.written, self.written_bias = output.weight.tolist(), output.bias
        if hasattr(attention, "qkv_proj"):
            rows, start = attention.qkv_proj.weight.tolist(), 0
            for part, heads in self.heads.items():
                self.read[part] = rows[start : start + heads * self.size]
                start += heads * self.size
            assert start == len(rows)
            return
        for part in self.heads:
            projection = getattr(attention, f"{part}_proj")
            self.read[part] = projection.weight.tolist()
            if projection.bias is not None:
                self.biases[part] = projection.bias.tolist()


@pytest.mark.parametrize("attention", ["prefix", "rope"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_weight_is_the_slice_of_section_13(family: str, attention: Any) -> None:
    teacher = build_teacher(family)
    student = cut_student(teacher, half(teacher, layers=2, attention=attention))
    dims = expected_dimensions(teacher.config, attention)
    assert len(dims) == student.model.layers[0].self_attn.head_dim
    for number, source in enumerate((0, 5)):
        ours, theirs = Weights(student, number), Weights(teacher, source)
        assert len(ours.written) == student.config.hidden_size == teacher.config.hidden_size // 2
        for part, heads in ours.heads.items():
            assert len(ours.read[part]) == heads * ours.size
            assert ours.biases.keys() == theirs.biases.keys()
            for head, (to, dim) in product(range(heads), enumerate(dims)):
                row, source_row = head * ours.size + to, head * theirs.size + dim
                for column in range(student.config.hidden_size):
                    assert ours.read[part][row][column] == theirs.read[part][source_row][column]
                if part in ours.biases:
                    assert ours.biases[part][row] == theirs.biases[part][source_row]
        for row, head in product(range(student.config.hidden_size), range(ours.heads["q"])):
            for to, dim in enumerate(dims):
                assert ours.written[row][head * ours.size + to] == theirs.written[row][head * theirs.size + dim]
            if ours.written_bias is not None:
                assert ours.written_bias[row] == theirs.written_bias[row]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_embeddings_are_prefixes(family: str) -> None:
    teacher = build_teacher(family)
    student = cut_student(teacher, half(teacher, layers=2))
    width = student.config.hidden_size
    own, source = (dict(model.named_parameters(remove_duplicate=False)) for model in (student, teacher))
    kept = {name: p for name, p in own.items() if "self_attn" not in name and ".mlp." not in name}
    assert sum("norm" in name for name in kept) == {"Gemma2": 9, "Phi": 6}.get(family, 5)
    for name, parameter in kept.items():
        value = source[name.replace("layers.1.", "layers.5.")]
        assert torch.equal(parameter, value if name == "lm_head.bias" else value[..., :width])
    assert ("lm_head.bias" in kept) == (family == "Phi")


@pytest.mark.parametrize("attention", ["prefix", "rope"])
def test_norms_of_a_head_keep_the_dimensions_of_the_head(attention: Any) -> None:
    for family, names in (("Qwen3", ("q_norm", "k_norm")), ("Phi", ("q_layernorm", "k_layernorm"))):
        teacher = build_teacher(family, **{"qk_layernorm": True} if family == "Phi" else {})
        student = cut_student(teacher, half(teacher, attention=attention))
        dims = expected_dimensions(teacher.config, attention)
        for name in names:
            ours, theirs = (getattr(model.model.layers[3].self_attn, name) for model in (student, teacher))
            assert ours.weight.tolist() == [theirs.weight[dim].item() for dim in dims]
            if family == "Phi":
                assert ours.bias.tolist() == [theirs.bias[dim].item() for dim in dims]


# ----- rotary positions


def frequencies(model: Any) -> list[float]:
    return model.model.rotary_emb.inv_freq.tolist()


def test_rope_matches_frequencies_exactly_for_128_to_64() -> None:
    teacher = build_teacher("Llama", head_dim=128, num_hidden_layers=1, rope_parameters=None)
    student = cut_student(teacher, Cut(head_dim=64, attention="rope"))
    assert frequencies(student) == frequencies(teacher)[::2]
    ours, theirs = (model.model.layers[0].self_attn.q_proj.weight for model in (student, teacher))
    kept = [*range(0, 64, 2), *range(64, 128, 2)]  # pairs (2 j, 2 j + 64)
    assert torch.equal(ours.view(4, 64, 32), theirs.view(4, 128, 32)[:, kept])


def test_rope_takes_the_nearest_frequency_for_128_to_96() -> None:
    teacher = build_teacher("Llama", head_dim=128, num_hidden_layers=1)
    student = cut_student(teacher, Cut(head_dim=96, attention="rope"))
    ours, theirs = (model.model.layers[0].self_attn.k_proj.weight for model in (student, teacher))
    pairs = [round(4 * j / 3) for j in range(48)]
    assert len(set(pairs)) == 48
    assert max(pairs) < 64
    kept = [*pairs, *(pair + 64 for pair in pairs)]
    assert torch.equal(ours.view(2, 96, 32), theirs.view(2, 128, 32)[:, kept])


def test_scores_of_kept_pairs_alone_are_the_teachers() -> None:
    """Where the teacher's other pairs are silent, `rope` keeps what the teacher attends to, up to the softmax scale."""
    teacher = build_teacher("Phi", num_hidden_layers=1)  # heads of 20, 8 rotated
    attention = teacher.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        for tensor in (projection.weight, projection.bias):
            per_head = tensor.data.unflatten(0, (4, 20))
            per_head[:, [1, 3, 5, 7, *range(14, 20)]] = 0.0  # pairs (1, 5) and (3, 7), and the end of the still part
            per_head *= 0.5**0.25 if projection is attention.q_proj else 1.0
    student = cut_student(teacher, Cut(head_dim=10, attention="rope"))
    found = [scores(model, scale) for model, scale in ((student, 10**0.5), (teacher, 20**0.5))]
    torch.testing.assert_close(*found)
    other = cut_student(teacher, Cut(head_dim=10, attention="prefix"))
    assert not torch.allclose(scores(other, 10**0.5), found[1], atol=0.1)


def scores(model: Any, scale: float) -> Tensor:
    """What the first layer's heads attend to before the softmax, from its logarithm: differences between keys."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.arange(9)[None], output_attentions=True).attentions[0].log() * scale
    return torch.where(weights.isfinite(), weights - weights[..., :1], 0.0)


def test_factors_of_long_contexts_stay_with_their_frequencies() -> None:
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [5.0, 6.0, 7.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, **factors}
    teacher = build_teacher("Phi3", hidden_size=32, rope_parameters=rope, original_max_position_embeddings=32)
    student = cut_student(teacher, half(teacher))
    assert student.config.rope_parameters["short_factor"] == [1.0, 3.0]
    assert student.config.rope_parameters["long_factor"] == [5.0, 7.0]
    assert teacher.config.rope_parameters["short_factor"] == factors["short_factor"]
    assert frequencies(student) == frequencies(teacher)[::2]
    student.config.validate()


# ----- sizes of published students


def qwen15() -> Any:
    return transformers.Qwen2Config(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    )


def phi2() -> Any:
    return transformers.PhiConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
    )


def qwen25() -> Any:
    return transformers.Qwen2Config(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def gemma2() -> Any:
    return transformers.Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    )


@pytest.mark.parametrize(
    ("teacher", "cut", "millions"),
    [
        (qwen15, None, "1836.829"),
        (qwen15, Cut(hidden_size=1536, head_dim=96, intermediate_size=4224, embeddings="slice"), "1160.566"),
        (
            qwen15,
            Cut(hidden_size=1024, head_dim=64, intermediate_size=2816, embeddings="slice", tie_word_embeddings=True),
            "463.988",
        ),
        (phi2, None, "2779.684"),
        (phi2, Cut(layers=16, intermediate_size=5120), "1101.430"),
        (qwen25, None, "3085.939"),
        (qwen25, Cut(layers=18, intermediate_size=7680), "1330.503"),
        (gemma2, None, "9241.706"),
        (gemma2, Cut(layers=14, intermediate_size=4096, head_dim=224), "2073.763"),
    ],
)
def test_published_models_have_their_number_of_parameters(teacher: Any, cut: Cut | None, millions: str) -> None:
    from tailkd.models.load import count_parameters

    config = teacher() if cut is None else student_config(teacher(), cut)
    config.validate()
    assert f"{count_parameters(config) / 1e6:.3f}" == millions


def test_a_student_is_a_plain_folder(tmp_path: Path) -> None:
    for family in FAMILIES:
        teacher = build_teacher(family)
        student = cut_student(teacher, half(teacher, layers=3))
        student.save_pretrained(tmp_path / family)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert type(again) is type(teacher)
        assert torch.equal(logits(again), logits(student))
        assert getattr(again.config, "layer_types", None) == getattr(student.config, "layer_types", None)
