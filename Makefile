# Everything a developer runs. Installs go through constraints.txt, which pins torch among others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check static format bench clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(VENV)/.demo ## a real queue, worker and storage on this machine; pictures in out/
	$(BIN)/calotype demo --out out

test: static ## every test, after the static checks
	$(BIN)/python -m pytest

check: static ## formatter, linter, types, import contracts, unit tests
	$(BIN)/python -m pytest tests/unit

static: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.demo ## the short benchmark, on the bundled model
	$(BIN)/python benchmarks/throughput.py

clean: ## remove the environment and all that was made
	rm -rf $(VENV) out dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Stamps: an environment is installed once, and again when what it depends on changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[worker,gateway,embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[worker,gateway,embedded,test,dev]'
	@touch $@ $(VENV)/.demo
