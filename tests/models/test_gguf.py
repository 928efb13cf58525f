"""Teachers out of GGUF files: dequantised, cut, distilled; and what is said where they cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import torch
import transformers
from gguf_files import write_gguf

import tailkd
from tailkd.cli.app import quiet
from tailkd.errors import Refusal
from tailkd.models import load

CPU, NAME = torch.device("cpu"), "tiny.gguf"


@pytest.fixture(scope="session")
def tiny(stranger: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model with grouped heads, and the folders with its GGUF file, in float32 and quantised."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = builders.build_model(
        len(stranger.tokenizer), hidden=64, num_key_value_heads=2, seed=1, initializer_range=0.2
    )
    folders = {quantised: tmp_path_factory.mktemp("gguf") for quantised in (False, True)}
    for quantised, folder in folders.items():
        write_gguf(folder / NAME, model, stranger.tokenizer, quantised=quantised)
    return SimpleNamespace(model=model, exact=folders[False], quantised=folders[True])


def loaded(folder: Path) -> Any:
    return load.load_model("teacher", str(folder), dtype=torch.float32, device=CPU, gguf_file=NAME)


def test_the_model_in_the_file_is_the_one_that_was_written(tiny: SimpleNamespace) -> None:
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    model = loaded(tiny.exact)
    assert type(model) is type(tiny.model)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, tiny.model(ids).logits, atol=1e-5)


def test_quantised_weights_come_dequantised(tiny: SimpleNamespace) -> None:
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    model = loaded(tiny.quantised)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        kl = torch.nn.functional.kl_div(
            model(ids).logits.log_softmax(-1), tiny.model(ids).logits.log_softmax(-1), log_target=True, reduction="sum"
        )
    assert 0 < kl / ids.numel() < 1e-2


def test_the_tokenizer_in_the_file_gives_the_same_ids(tiny: SimpleNamespace, stranger: SimpleNamespace) -> None:
    tokenizer = load.load_tokenizer("teacher", str(tiny.exact), gguf_file=NAME)
    assert tokenizer is not None
    texts = [json.loads(line)["body"] for line in stranger.corpus.open()][:20]
    for text in (*texts, "  two blanks\n\n\tand a tab"):
        assert tokenizer(text)["input_ids"] == stranger.tokenizer(text)["input_ids"]


def test_a_student_cut_out_of_it_learns(recipe: dict[str, Any], tiny: SimpleNamespace) -> None:
    """Tokenizer, vocabulary, cut and cosine loss, from the one file."""
    recipe["teacher"] = {"model": str(tiny.quantised), "gguf_file": NAME}
    recipe["student"] = {"from_teacher": {"layers": 1, "intermediate_size": 40, "freeze_embeddings": True}}
    recipe["objective"]["hidden"] = {"weight": 1.0}
    run = tailkd.distill(recipe)
    before, after = (run.evaluation[role]["kl"] for role in ("student_before", "student"))
    assert after < before
    assert load.load_model("student", str(run.student), dtype=torch.float32, device=CPU).config.num_hidden_layers == 1


def test_a_student_that_goes_with_it(recipe: dict[str, Any], tiny: SimpleNamespace) -> None:
    """Another folder's tokenizer is compared with the one in the file, id by id."""
    run = tailkd.distill({**recipe, "teacher": {"model": str(tiny.exact), "gguf_file": NAME}})
    assert run.evaluation["teacher"]["tokens"] > 0


def test_a_file_that_is_not_there(recipe: dict[str, Any], stranger: SimpleNamespace) -> None:
    with pytest.raises(Refusal, match=r"teacher.gguf_file.*no file 'absent.gguf'"):
        tailkd.distill({**recipe, "teacher": {"model": str(stranger.teacher), "gguf_file": "absent.gguf"}})


def test_a_header_is_parsed_once_while_the_file_is_the_same(
    tiny: SimpleNamespace, stranger: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / NAME
    shutil.copy(tiny.exact / NAME, file)
    real, parsed = transformers.AutoConfig.from_pretrained, 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal parsed
        parsed += 1
        return real(*arguments, **options)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", counted)
    first = load.load_config("teacher", str(tmp_path), gguf_file=NAME)
    first.num_hidden_layers = 99  # the caller's own
    monkeypatch.chdir(tmp_path.parent)
    assert load.load_config("teacher", tmp_path.name, gguf_file=NAME).num_hidden_layers == 2
    assert parsed == 1
    size = file.stat().st_size
    model = builders.build_model(len(stranger.tokenizer), hidden=64, num_key_value_heads=2, rms_norm_eps=0.5)
    write_gguf(file, model, stranger.tokenizer)
    assert file.stat().st_size == size
    assert load.load_config("teacher", str(tmp_path), gguf_file=NAME).rms_norm_eps == 0.5
    assert parsed == 2


def test_its_bar_heeds_the_switch(tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """Off as `tailkd` has it, nothing is written; on, as elsewhere, the bar is there; errors come either way."""
    logging = transformers.utils.logging
    was_on = logging.is_progress_bar_enabled()
    try:
        quiet()
        loaded(tiny.quantised)
        assert capsys.readouterr().err == ""
        logging.enable_progress_bar()
        loaded(tiny.quantised)
        assert "de-quantizing GGUF" in capsys.readouterr().err
    finally:
        (logging.enable_progress_bar if was_on else logging.disable_progress_bar)()


@pytest.mark.parametrize("missing", [("gguf",), ("gguf", "accelerate")])
def test_without_the_packages_that_read_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    (tmp_path / NAME).write_bytes(b"GGUF")
    monkeypatch.setattr(load, "find_spec", lambda name: None if name in missing else name)
    told = rf"teacher.gguf_file needs {' and '.join(missing)}: pip install 'tailkd\[gguf\]'"
    with pytest.raises(Refusal, match=told):
        tailkd.distill({**recipe, "teacher": {"model": str(tmp_path), "gguf_file": NAME}})
