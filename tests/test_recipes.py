"""The paper's experiments as recipes: what their files say, and that each is checked and trains with tiny models."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import pytest
import supervised
from recipe_figures import PUBLISHED, copied_tree, figures, first_stage, made_out
from typer.testing import CliRunner

import tailkd
from tailkd import catalogue, cli, inspection, pair, recipe_file
from tailkd import run as run_module
from tailkd.catalogue import BASE, RECIPES
from tailkd.errors import Refusal
from tailkd.ledger import published
from tailkd.recipe import MatchFlops, Recipe

FILES = catalogue.files()
NAMES = [entry.name for entry in catalogue.listed()]
CUT_OUT = {  # folder: the student that is cut out of its teacher
    "pretraining/qwen1.5-1.2b": "Qwen 1.2B",
    "pretraining/qwen1.5-0.5b": "Qwen 0.5B",
    "pretraining/phi-2-1.1b": "Phi-2 1.1B",
    "pretraining/qwen2.5-1.2b": "Qwen2.5 1.2B",
    "pretraining/gemma-2-2b": "Gemma2 2B",
}
GIVEN = ("continued/tinyllama-1.1b", "mathematics/tinyllama-1.1b", "mathematics/llama-2-7b")
SECOND = ("mathematics/tinyllama-1.1b-orcamel", "mathematics/llama-2-7b-orcamel")  # go on from the two before
TOP_K = {"tad-k1": 1, "tad-k5": 5, "tad": 10, "tad-k20": 20}
ORCA = "microsoft/orca-math-word-problems-200k"
BETA = {"tad-beta0.5": 0.5, "tad-beta1": 1.0, "tad-beta5": 5.0, "tad-beta10": 10.0}
SAMPLE = [
    "pretraining/qwen1.5-0.5b/tad-beta5",
    "pretraining/phi-2-1.1b/rkl",
    "pretraining/gemma-2-2b/clm-matched",
    "continued/tinyllama-1.1b/tad-k1",
    "pretraining/qwen2.5-1.2b/miniplm",
    "mathematics/tinyllama-1.1b/rho-1",
    "mathematics/tinyllama-1.1b-orcamel/tad-k5",
]


def path_of(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


@cache
def read(name: str) -> Recipe:
    return recipe_file.read(path_of(name), files=False)


# ----- what the files say


def test_there_is_one_of_each() -> None:
    expected = {f"{folder}/{file}" for folder in (*CUT_OUT, *GIVEN, *SECOND) for file in ("clm", "kl", *TOP_K)}
    expected |= {f"{folder}/{file}" for folder in CUT_OUT for file in ("clm-matched", "rkl")}
    expected |= {f"{folder}/{file}" for folder in list(CUT_OUT)[:2] for file in BETA}
    expected |= {f"{folder}/miniplm" for folder in (*CUT_OUT, "mathematics/tinyllama-1.1b")}
    expected |= {"mathematics/tinyllama-1.1b/rho-1"}
    assert set(NAMES) == expected
    assert len({read(name).name for name in NAMES}) == len(NAMES)  # each has a run folder of its own


def test_a_baseline_differs_in_four_lines_at_most() -> None:
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        if path.name != BASE:
            assert lines[0] == f"extends: {BASE}"
            assert len(lines) <= 4, path


def test_each_says_what_it_is() -> None:
    settings = {
        "clm": "none",
        "clm-matched": "none",
        "miniplm": "none",
        "rho-1": "none",
        "kl": "forward_kl",
        "rkl": "reverse_kl",
    }
    for name in NAMES:
        file, objective = name.split("/")[-1], read(name).objective
        assert objective.divergence == settings.get(file, "tail_aware"), name
        if file not in settings:
            assert (objective.top_k, objective.beta) == (TOP_K.get(file, 10), BETA.get(file, 2.0)), name
        frozen = name.rpartition("/")[0] in list(CUT_OUT)[2:]  # section 3.2.2
        assert (objective.hidden is not None) == (frozen and objective.divergence != "none"), name
        made = read(name).student.from_teacher
        assert (made is not None and made.freeze_embeddings) == frozen, name
        select, tokens = read(name).data.select, objective.tokens
        assert (None if select is None else select.ratio) == (0.5 if file == "miniplm" else None), name
        assert (None if tokens is None else tokens.ratio) == (0.6 if file == "rho-1" else None), name


def test_the_papers_settings() -> None:
    for name in NAMES:
        recipe = read(name)
        training, data = recipe.training, recipe.data
        if name.startswith(SECOND):
            continue
        assert (training.batch_size, data.context, training.weight_decay) == (128, 2048, 0.1)
        assert training.learning_rate == (1e-4 if name.startswith("pretraining") else 3e-5)
        assert recipe.objective.temperature == 1.0
        corpus = "open-web-math/open-web-math" if name.startswith("mathematics") else "sail/regmix-data-sample"
        assert data.train.hub == corpus
        fold = {32000: 2, 32007: 2} if name.startswith(GIVEN) else {}
        assert recipe.vocabulary.fold == fold
        if name.endswith("clm-matched"):
            assert training.tokens == MatchFlops(match_flops=str(path_of(name).with_name("tad.yaml")))
        else:
            billions = 2.8 if "0.5b" in name else 2.5 if name.startswith("mathematics") else 2.0
            assert training.tokens == billions * 1e9


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(SECOND)])
def test_the_second_stage_of_table_7(name: str) -> None:
    """The same teacher, student, vocabulary and objective as in the first, on another corpus."""
    recipe = read(name)
    first = read(name_of(first_stage(str(recipe.student.run))))
    assert name_of(first_stage(str(recipe.student.run))) == name.replace("-orcamel", "")
    assert (recipe.teacher, recipe.vocabulary, recipe.objective) == (first.teacher, first.vocabulary, first.objective)
    assert str(recipe.student.run) == f"runs/{first.name}"
    training, data = recipe.training, recipe.data
    assert (training.epochs, training.tokens, training.batch_size) == (3, None, 32)
    assert (training.learning_rate, training.weight_decay, data.packing) == (1e-5, 0.1, "documents")
    orca, camel = data.sources
    assert (orca.hub, orca.prompt, orca.completion) == (ORCA, "question", "answer")
    assert (camel.path, camel.prompt, camel.completion) == ("camel-math/math.zip", "message_1", "message_2")
    assert data.names == (ORCA, "camel-math")


def test_heads_are_complete() -> None:
    for path in FILES:
        said, recipe = catalogue.header(path), read(name_of(path))
        assert tuple(said) == catalogue.KEYS, path
        assert re.fullmatch(r"[1-7](, 2)?|none", said["table"]), path
        assert int(said["hardware"].split()[0]) == recipe.hardware.devices, path
        named = [
            *(source.hub for source in recipe.data.sources),
            recipe.teacher and recipe.teacher.model,
            recipe.student.model,
        ]
        named += [one and one.reference for one in (recipe.data.select, recipe.objective.tokens)]
        assert all(name in said["data"] for name in named if name), path
        assert said["data"].count("(") >= sum(name is not None for name in named), path  # a licence for each
        assert max(map(len, path.read_text().splitlines())) <= 120, path


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[Path], Recipe]]:
    """A function that reads a recipe with the published configurations for its models."""
    with made_out() as read_with_configurations:
        yield read_with_configurations


def test_students_are_those_of_table_8(made: Callable[[Path], Recipe]) -> None:
    for folder, student in CUT_OUT.items():
        found = pair.configurations(made(path_of(f"{folder}/tad")))[1]
        assert described(found) == described(published.config(student)), folder


def described(config: Any) -> dict[str, Any]:
    keys = (*SIZE_KEYS, "vocab_size", "tie_word_embeddings", "model_type")
    return {**{key: getattr(config, key) for key in keys}, "head_dim": head_dim(config)}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=name_of(p), marks=[] if name_of(p) in SAMPLE[:2] else pytest.mark.slow) for p in FILES],
)
def test_heads_agree_with_the_ledger(made: Callable[[Path], Recipe], path: Path) -> None:
    found, said = figures(made(path)), catalogue.header(path)
    assert {key: said[key] for key in found} == found, "python tests/recipe_figures.py writes it anew"


# ----- the list and copies


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list() -> None:
    entries = json.loads(invoke("recipes", "--json"))
    assert [entry["name"] for entry in entries] == NAMES
    entry = next(entry for entry in entries if entry["name"] == "pretraining/gemma-2-2b/tad")
    assert (entry["table"], entry["tokens"], entry["gpus"]) == ("4", 2_000_000_000, 2)
    assert entry["hours"] > 0
    assert entry["memory_bytes"] > 2 * published.TOTALS["Gemma2-9B"] * 1e6
    lines = invoke("recipes").splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert re.search(
        r"^pretraining/phi-2-1.1b/rkl +4 +2.00B +1 +[\d.]+ +\d+ GB  cross-entropy, reverse KL",
        lines[-1] + "\n" + "\n".join(lines),
        re.MULTILINE,
    )


def test_a_copy_reads_by_itself(tmp_path: Path) -> None:
    printed = invoke("init", "pretraining/phi-2-1.1b/clm-matched", "--to", str(tmp_path / "new"))
    assert [Path(line).name for line in printed.split()] == ["clm-matched.yaml", "base.yaml", "tad.yaml"]
    copy = recipe_file.read(tmp_path / "new" / "clm-matched.yaml", files=False)
    assert isinstance(copy.training.tokens, MatchFlops)
    assert Path(copy.training.tokens.match_flops).parent == tmp_path / "new"
    invoke("init", "pretraining/phi-2-1.1b/kl", "--to", str(tmp_path / "new"))  # the same base.yaml stays
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"clm-matched.yaml", "base.yaml", "tad.yaml", "kl.yaml"}


def test_a_copy_has_all_that_it_names(tmp_path: Path) -> None:
    for name in NAMES:
        copies = catalogue.copied(name, tmp_path / name)
        others = ["base.yaml", "tad.yaml"] if name.endswith("matched") else ["base.yaml"]
        assert [path.name for path in copies] == [f"{name.split('/')[-1]}.yaml", *others]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    catalogue.copied("pretraining/phi-2-1.1b/kl", tmp_path)
    (tmp_path / "base.yaml").write_text("changed: by hand\n")
    with pytest.raises(Refusal, match=r"base.yaml is there already and is not the recipe's; give another folder"):
        catalogue.copied("pretraining/phi-2-1.1b/rkl", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"base.yaml", "kl.yaml"}
    with pytest.raises(Refusal, match=r"no recipe can be copied there \(.*\); give a folder, --to DIR"):
        catalogue.copied("pretraining/phi-2-1.1b/rkl", tmp_path / "kl.yaml")


def test_an_unknown_name(tmp_path: Path) -> None:
    message = r"no recipe 'pretraining/phi2-1.1b/tad'; did you mean pretraining/phi-2-1.1b/tad or .*`tailkd recipes` li"
    with pytest.raises(Refusal, match=message):
        catalogue.copied("pretraining/phi2-1.1b/tad", tmp_path)
    with pytest.raises(Refusal, match=r"no recipe 'xyz'; `tailkd recipes` lists them"):
        catalogue.copied("xyz", tmp_path)


def test_list_and_copy_load_no_torch(tmp_path: Path) -> None:
    done = builders.fresh_python(
        "import sys\nfrom tailkd.cli import app\napp(['recipes'], standalone_mode=False)\n"
        "app(['init', sys.argv[1], '--to', sys.argv[2]], standalone_mode=False)\nprint('MODULES', *sys.modules)",
        "continued/tinyllama-1.1b/kl",
        str(tmp_path),
    )
    modules = set(done.stdout.splitlines()[-1].split())
    assert "tailkd.catalogue" in modules
    assert not {"torch", "transformers", "datasets"} & modules


# ----- with tiny models of the same families and relations


SIZES = {  # what is cut out of these has whole sizes in the published proportions
    "Qwen1.5-1.8B": (64, 86, 3, 4, 4),
    "Phi-2": (80, 160, 4, 4, 4),
    "Qwen2.5-3B": (64, 172, 4, 8, 1),
    "Gemma2-9B": (56, 112, 6, 4, 2),
    "Phi-3-mini": (48, 128, 4, 4, 4),
    "TinyLlama-1.1B": (32, 88, 2, 8, 1),
    "Phi-3-medium": (80, 280, 5, 4, 1),
    "Llama-2-7B": (64, 172, 4, 4, 4),
    "Qwen-104M": (32, 88, 2, 4, 4),
}
SIZE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MORE = {"Gemma2-9B": {"head_dim": 16, "query_pre_attn_scalar": 16}, "Phi-2": {"partial_rotary_factor": 0.4}}
PADDED = {"Qwen1.5-1.8B": 6, "Qwen-104M": 6, "Phi-2": 9, "Qwen2.5-3B": 6, "Phi-3-mini": 64, "Phi-3-medium": 64}
"""Rows of the vocabulary matrix above the ids that teacher and student share."""
ADDED = 11  # ids that Phi-3's tokenizer has above Llama's
CUTS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
}


def scaled(cut: dict[str, Any], model: str) -> dict[str, Any]:
    """The sizes of a cut, in the proportions in which it stands to the published teacher."""
    small, large = tiny_config(model, 2), published.config(model)
    pairs = {cut_key: (getattr(small, key), getattr(large, key)) for cut_key, key in CUTS.items()}
    pairs["head_dim"] = (head_dim(small), head_dim(large))
    return {**cut, **{key: whole(cut[key] * of_small, of_large) for key, (of_small, of_large) in pairs.items()}}


def whole(product: int, divisor: int) -> int:
    assert product % divisor == 0
    return product // divisor


def tiny_config(model: str, ids: int) -> Any:
    full = published.config(model)
    sizes = dict(zip(SIZE_KEYS, SIZES[model], strict=True))
    return type(full)(
        **sizes,
        **MORE.get(model, {}),
        vocab_size=ids + PADDED.get(model, 0),
        tie_word_embeddings=full.tie_word_embeddings,
        **{"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
    )


def tokenizer_of(model: str, corpus: Path) -> Any:
    from tokenizers.processors import TemplateProcessing

    specials = ("<s>", "</s>", "<|endoftext|>")  # the last one Qwen's tokenizer would add to any other
    texts = [json.loads(line)["text"] for line in corpus.open()]
    tokenizer = builders.build_tokenizer(texts, size=320, specials=specials)
    if model.startswith("Phi-3"):
        tokenizer.add_tokens([f"<|added {number}|>" for number in range(ADDED)], special_tokens=True)
    if "Llama" in model:
        begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def save_opt(folder: Path, corpus: Path) -> None:
    """A reference model with a tokenizer of its own."""
    from transformers import OPTConfig, OPTForCausalLM

    texts = [json.loads(line)["text"] for line in corpus.open()]
    tokenizer = builders.build_tokenizer(texts[:9], size=290, specials=("<s>", "</s>", "<pad>"))
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=64, **sizes)
    OPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All recipes in a folder whose base.yaml name tiny models, a small corpus and 20 steps."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("recipes")
    corpus = builders.write_corpus(folder / "corpus.jsonl")
    ids = len(tokenizer_of("", corpus))
    for model in SIZES:
        config = tiny_config(model, ids)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / model)
        tokenizer_of(model, corpus).save_pretrained(folder / model)
    for model in published.OPT_ROWS:
        save_opt(folder / model, corpus)
    step = 4 * 32  # tokens

    def change(values: dict[str, Any]) -> None:
        model = PUBLISHED[values["teacher"]["model"]]
        for role in ("teacher", "student"):
            if "model" in values[role]:
                values[role]["model"] = str(folder / PUBLISHED[values[role]["model"]])
        if "from_teacher" in values["student"]:
            values["student"]["from_teacher"] = scaled(dict(values["student"]["from_teacher"]), model)
        if "vocabulary" in values:
            values["vocabulary"]["fold"] = {ids + key - 32_000: 1 for key in values["vocabulary"]["fold"]}
        second = isinstance(values["data"]["train"], list)
        train = orcamel(folder) if second else {"path": str(corpus)}
        values["data"] |= {"train": train, "heldout": {"fraction": 0.1}, "context": 64 if second else 32}
        values["training"] |= {"batch_size": 4, "micro_batch_size": 2, "save_every_tokens": 10 * step}
        if not second:
            values["training"]["tokens"] = 20 * step
        values["evaluate"] |= {"every_tokens": 10 * step, "tokens": 400}

    def start(run: str) -> dict[str, str]:
        return {"run": str(folder / "runs" / Path(run).name)}

    tree = copied_tree(folder / "tree", change, lambda hub_id: folder / PUBLISHED[hub_id], start)
    return SimpleNamespace(tree=tree, ids=ids, runs=folder / "runs")


STEPS = 20  # of three epochs of these


def orcamel(folder: Path) -> list[dict[str, Any]]:
    """Both corpora of Table 7's second stage in their published fields and layout, and what a recipe says of them."""
    orca, camel = folder / "orca.jsonl", folder / "camel-math" / "math.zip"
    found = supervised.records(28)
    if not orca.is_file():
        supervised.write(orca, [{"question": one["question"], "answer": one["answer"]} for one in found[:20]])
        camel.parent.mkdir()
        with zipfile.ZipFile(camel, "w") as archive:
            for number, one in enumerate(found[20:]):
                example = {"topic;": "Sums", "message_1": one["question"], "message_2": one["answer"]}
                archive.writestr(f"math/{number:03}_001_001.json", json.dumps(example))
    return [
        {"path": str(orca), "prompt": "question", "completion": "answer"},
        {"path": str(camel), "prompt": "message_1", "completion": "message_2", "name": "camel-math"},
    ]


def train_first_stage(small: SimpleNamespace, run: Path) -> None:
    """The run that a second stage goes on from, once for all tests."""
    if not (run / "evaluation.json").is_file():
        tailkd.distill(read_small(small, name_of(first_stage(run.name)), run))


def read_small(small: SimpleNamespace, name: str, out: Path) -> Recipe:
    if name.startswith(SECOND):
        train_first_stage(small, small.runs / f"{name.split('/')[1].replace('-orcamel', '-owm')}-{name.split('/')[2]}")
    return recipe_file.read(small.tree / f"{name}.yaml", {"out": str(out)})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow) for n in NAMES])
def test_each_passes_check(small: SimpleNamespace, name: str, tmp_path: Path) -> None:
    recipe, second = read_small(small, name, tmp_path / "run"), name.startswith(SECOND)
    found = inspection.check(recipe)
    assert found["steps"] > 20 if name.endswith("clm-matched") else found["steps"] == (STEPS if second else 20)
    vocabulary, folded = found["vocabulary"], name.startswith(GIVEN)
    assert vocabulary["usable_ids"] == small.ids
    above = [vocabulary[f"{role}_rows"] - small.ids for role in ("teacher", "student")]
    assert above == ([64, 0] if folded else [PADDED.get(PUBLISHED[str(read(name).teacher.model)], 0)] * 2)
    assert len(vocabulary["folded"]) == (2 if folded else 0)
    assert vocabulary["begin_token"] == ("<s>" if folded else None)
    reads_teacher = found["pflop_per_million_tokens"]["teacher_forward"] > 0
    assert reads_teacher == (recipe.objective.divergence != "none")
    scores = found["pflop_per_million_tokens"]["selection"] > 0
    assert scores == (recipe.data.select is not None or recipe.objective.tokens is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_20_steps(
    small: SimpleNamespace, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "write_page", lambda *_: None)  # its charts take longer than 20 steps
    recipe = read_small(small, name, tmp_path / "run")
    run = tailkd.distill(recipe)
    steps = [record for record in run.metrics if record["kind"] == "step"]
    expected = STEPS if name.startswith(SECOND) else 20
    assert len(steps) == expected or (name.endswith("clm-matched") and 20 < len(steps) < 60)
    if name.startswith(SECOND):
        seen = json.loads((run.folder / "data.json").read_text())["sources"].values()
        assert all(source["epochs"] >= 3 for source in seen)
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert ("hidden" in steps[0]) == (recipe.objective.hidden is not None)
    assert math.isfinite(run.evaluation["student"]["kl"])
    assert run.evaluation["student"] != run.evaluation["student_before"]
