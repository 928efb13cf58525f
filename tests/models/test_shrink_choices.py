"""Choices of a cut: what is random, tied, joined, rescaled or frozen; and cuts that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from teachers import SHARED, build_teacher, half, logits
from torch import Tensor

from tailkd.errors import Refusal
from tailkd.models.shrink import Cut, cut_student, freeze_embeddings, student_config


def parameters(model: Any, part: str) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False) if part in name}


# ----- what is random


@pytest.mark.parametrize("family", ["Llama", "Phi", "Phi3"])
def test_the_mlp_is_normal_with_0_02_and_has_no_bias(family: str) -> None:
    teacher = build_teacher(family, initializer_range=0.5)
    mlp = parameters(cut_student(teacher, Cut(intermediate_size=36)), ".mlp.")
    matrices = torch.cat([p.flatten() for p in mlp.values() if p.dim() == 2])
    assert abs(float(matrices.mean())) < 5e-4
    assert float(matrices.std()) == pytest.approx(0.02, rel=0.03)
    biases = [p for p in mlp.values() if p.dim() == 1]
    assert bool(biases) == (family != "Phi3")
    assert not any(p.any() for p in biases)


def test_the_seed_decides_and_nothing_else_moves() -> None:
    teacher = build_teacher("Qwen2")
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (cut_student(teacher, Cut(layers=2, seed=seed)).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, teacher.state_dict()[name]) for name, p in before.items())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {n for n in one if ".mlp." in n}
    assert all(
        p.untyped_storage().data_ptr() != q.untyped_storage().data_ptr() for p in one.values() for q in same.values()
    )


def test_random_attention_leaves_mlp_and_embeddings_as_they_were() -> None:
    teacher = build_teacher("Qwen3")
    kept, drawn = (cut_student(teacher, Cut(attention=attention)) for attention in ("prefix", "random"))
    for name, parameter in drawn.named_parameters():
        assert torch.equal(parameter, kept.get_parameter(name)) == (".self_attn." not in name)
    attention = parameters(drawn, "self_attn")
    assert all(torch.equal(p, torch.ones_like(p)) for name, p in attention.items() if "norm" in name)
    assert float(torch.cat([p.flatten() for p in attention.values() if p.dim() == 2]).std()) < 0.025


def test_a_student_that_is_all_random_knows_nothing_of_its_teacher() -> None:
    cut = Cut(attention="random", embeddings="random", layers=2, hidden_size=16)
    one = cut_student(build_teacher("Gemma2", hidden_size=32), cut)
    other = build_teacher("Gemma2", hidden_size=32)
    other.load_state_dict({name: p + 1 for name, p in other.state_dict().items()})
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), cut_student(other, cut).parameters(), strict=True))
    assert not any(p.any() for p in parameters(one, "layernorm").values())  # Gemma's ones


def test_random_embeddings_keep_the_teachers_norms() -> None:
    teacher = build_teacher("Llama")
    student = cut_student(teacher, Cut(hidden_size=16, embeddings="random"))
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight[:16])
    assert float(student.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(student.model.embed_tokens.weight[1:].detach().std()) == pytest.approx(0.02, rel=0.1)


# ----- heads, ties, scales, dtypes


@pytest.mark.parametrize("family", ["Qwen2", "Phi3"])
def test_fewer_key_and_value_heads_are_means_of_adjacent_ones(family: str) -> None:
    teacher = build_teacher(family, num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    student = cut_student(teacher, Cut(kv_heads=2, attention="rope"))
    ours, theirs = (model.model.layers[1].self_attn for model in (student, teacher))
    if family == "Phi3":
        parts = {"k": (slice(64, 80), slice(64, 96)), "v": (slice(80, 96), slice(96, 128))}
        pairs = [(ours.qkv_proj.weight[a], theirs.qkv_proj.weight[b]) for a, b in parts.values()]
        assert torch.equal(ours.qkv_proj.weight[:64], theirs.qkv_proj.weight[:64])
    else:
        pairs = [(getattr(ours, n).weight, getattr(theirs, n).weight) for n in ("k_proj", "v_proj")]
        pairs += [(getattr(ours, n).bias[:, None], getattr(theirs, n).bias[:, None]) for n in ("k_proj", "v_proj")]
    for small, large in pairs:
        for head in (0, 1):
            mean = (large[16 * head : 16 * head + 8] + large[16 * head + 8 : 16 * head + 16]) / 2
            torch.testing.assert_close(small[8 * head : 8 * head + 8], mean, rtol=0, atol=1e-7)
    assert ours.num_key_value_groups == 4


def test_equal_key_and_value_heads_may_be_joined_without_loss() -> None:
    teacher = build_teacher("Mistral", head_dim=8)
    for layer in teacher.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.data[8:] = projection.weight.data[:8]
    torch.testing.assert_close(logits(cut_student(teacher, Cut(kv_heads=1, mlp="copy"))), logits(teacher))


def test_a_tie_is_the_teachers_unless_it_is_said() -> None:
    tied, untied = build_teacher("Llama", tie_word_embeddings=True), build_teacher("Llama")
    for teacher, said, expected in (
        (tied, None, True),
        (untied, None, False),
        (untied, True, True),
        (tied, False, False),
    ):
        student = cut_student(teacher, Cut(tie_word_embeddings=said))
        assert (student.lm_head.weight is student.model.embed_tokens.weight) == expected
        assert student.config.tie_word_embeddings == expected
        assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
        head = student if expected else teacher
        assert torch.equal(student.lm_head.weight, head.lm_head.weight)


@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2"])
def test_rescale_keeps_the_size_of_sums_over_fewer_inputs(family: str) -> None:
    teacher = build_teacher(family)
    sizes = {"head_dim": 8, "hidden_size": 16} if family == "Gemma2" else {}
    plain, scaled = (cut_student(teacher, half(teacher, rescale=rescale, **sizes)) for rescale in (False, True))
    width = (teacher.config.hidden_size / plain.config.hidden_size) ** 0.5
    for name, parameter in plain.named_parameters():
        factor = 1.0
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "lm_head.weight")):
            factor = width
        elif name.endswith(("o_proj.weight", "dense.weight")):
            factor = 2**0.5
        torch.testing.assert_close(scaled.get_parameter(name), parameter * factor, rtol=1e-6, atol=0)


def test_a_teacher_in_bfloat16_gives_a_student_in_float32() -> None:
    teacher = build_teacher("Qwen2").bfloat16()
    teacher.config.dtype = torch.bfloat16
    student = cut_student(teacher, Cut(kv_heads=1))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    keys = teacher.model.layers[0].self_attn.k_proj.weight.float()
    assert torch.equal(student.model.layers[0].self_attn.k_proj.weight, (keys[:8] + keys[8:]) / 2)


def test_attention_and_generation_are_set_as_the_teachers() -> None:
    teacher = build_teacher("Gemma2")
    teacher.set_attn_implementation("eager")
    teacher.generation_config.eos_token_id = [2, 5]
    student = cut_student(teacher, Cut(mlp="copy"))
    assert student.config._attn_implementation == "eager"
    assert student.generation_config.eos_token_id == [2, 5]
    assert student.generation_config is not teacher.generation_config
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_frozen_embeddings_freeze_a_tied_head_and_no_other(family: str, tmp_path: Path) -> None:
    student = cut_student(build_teacher(family), Cut(layers=2))
    freeze_embeddings(student)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    assert student.lm_head.weight.requires_grad == (family == "Llama")
    student.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (family == "Llama")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (family == "Gemma2")
    assert json.loads((tmp_path / "config.json").read_text()).get("_name_or_path", "") == ""


# ----- cuts that cannot be


@pytest.mark.parametrize(
    ("family", "cut", "message"),
    [
        ("Llama", {"layers": 7}, r"student.from_teacher.layers is 7; the teacher has 6: take a number from 1 to 6"),
        ("Llama", {"layers": 0}, "layers is 0; the teacher has 6: take a number from 1 to 6"),
        ("Llama", {"intermediate_size": 41}, "intermediate_size is 41; the teacher has 40"),
        ("Qwen3", {"head_dim": 18}, "head_dim is 18; the teacher has 16"),
        ("Llama", {"kv_heads": 4}, "kv_heads is 4; the teacher has 2"),
        ("Llama", {"layer_choice": (0, 6)}, r"layer_choice is \[0, 6\]; expected layers .* in order, out of 0 to 5"),
        ("Llama", {"layer_choice": (2, 1)}, r"layer_choice is \[2, 1\]; expected layers of the teacher in order"),
        ("Llama", {"layer_choice": (1, 1)}, r"layer_choice is \[1, 1\]; expected layers of the teacher in order"),
        ("Llama", {"layer_choice": ()}, r"layer_choice is \[\]; expected layers of the teacher in order"),
        ("Llama", {"layer_choice": (0, 1), "layers": 3}, "layer_choice names 2 layers, .*layers is 3; leave"),
        (
            "Llama",
            {"hidden_size": 18},
            "hidden_size is 18, which does not divide by the teacher's 4 query heads; take 16",
        ),
        ("Llama", {"hidden_size": 16}, "embeddings is copy, but hidden_size is 16 and the teacher's 32; take .* slice"),
        ("Llama", {"mlp": "copy", "intermediate_size": 20}, "mlp is copy, .* 32 and 20, the teacher's 32 and 40; take"),
        ("Llama", {"mlp": "copy", "hidden_size": 16, "embeddings": "slice"}, "mlp is copy, .* are 16 and 40"),
        ("Phi", {"kv_heads": 3}, "kv_heads is 3, but the teacher's 4 key and value heads .* take one of 1, 2, 4"),
        ("Phi", {"head_dim": 8}, "head_dim is 8, of which 3 dimensions would be rotated; rotary positions turn pairs"),
        ("Qwen3", {"head_dim": 1}, "head_dim is 1, of which 1 dimensions would be rotated"),
        ("Phi-norms", {"head_dim": 10}, r"head_dim is 10, but this 'phi' model takes .* = 20; take head_dim 20"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(family: str, cut: dict[str, Any], message: str) -> None:
    family, _, norms = family.partition("-")
    config = build_teacher(family, **{"qk_layernorm": True} if norms else {}).config
    with pytest.raises(Refusal, match=message):
        student_config(config, Cut(**cut))


def test_another_family_is_refused_by_name() -> None:
    with pytest.raises(
        Refusal, match=r"no student can be cut out of a 'olmo2' model: .* qwen2, .*; give student.model"
    ):
        student_config(transformers.Olmo2Config(**SHARED), Cut())
