"""What loads what, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import builders

import tailkd


def loaded(code: str) -> set[str]:
    done = builders.fresh_python(f"import sys\n{code}\nprint('MODULES', *sys.modules)")
    line = next(line for line in done.stdout.splitlines() if line.startswith("MODULES"))
    return set(line.split())


def test_help_loads_neither_torch_nor_transformers() -> None:
    modules = loaded(
        "from typer.testing import CliRunner\nfrom tailkd.cli import app\n"
        "assert 'distill' in CliRunner().invoke(app, ['--help']).stdout"
    )
    assert not {"torch", "transformers", "pydantic", "numpy"} & modules


def test_the_objective_loads_torch_alone() -> None:
    modules = loaded("from tailkd.objective import Head, Objective, distillation_loss")
    assert "torch" in modules
    assert not {"transformers", "pydantic", "datasets", "typer", "scipy"} & modules


def test_models_and_the_step_load_no_pydantic_and_no_datasets() -> None:
    modules = loaded("import tailkd.train.step, tailkd.models.head, tailkd.teacher.live")
    assert not {"pydantic", "datasets", "typer"} & modules


def test_bad_recipes_load_no_torch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: {model: a/b}\nlearning_rat: 1\n")
    modules = loaded(
        f"sys.argv = ['tailkd', 'distill', {str(recipe)!r}]\nfrom tailkd.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert ended.code == 2"
    )
    assert not {"torch", "transformers"} & modules


def test_report_status_and_trackers_load_no_torch(stranger: SimpleNamespace, tmp_path: Path) -> None:
    run = tailkd.distill(
        {
            "name": "tiny",
            "out": str(tmp_path / "run"),
            "teacher": {"model": str(stranger.teacher)},
            "student": {"model": str(stranger.student)},
            "data": {"train": {"path": str(stranger.corpus), "text": "body"}, "context": 32},
            "training": {"tokens": 200, "batch_size": 2},
            "evaluate": {"tokens": 100},
        }
    )
    calls = (f"app([{verb!r}, {str(run.folder)!r}], standalone_mode=False)" for verb in ("report", "status"))
    modules = loaded("\n".join(["import tailkd.track.follow", "from tailkd.cli import app", *calls]))
    assert not {"torch", "transformers", "datasets"} & modules


def test_python_m_tailkd_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tailkd", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"tailkd {tailkd.__version__}\n"
    refused = subprocess.run(
        [sys.executable, "-m", "tailkd", "distill", "nothing.yaml"], capture_output=True, text=True, timeout=60
    )
    assert refused.returncode == 2
    assert "nothing.yaml: the recipe cannot be read" in refused.stderr
    assert "Traceback" not in refused.stderr
